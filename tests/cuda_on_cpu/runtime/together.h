// What the threads of a block and of a warp do together.
//
// Everything a warp does rests on one primitive, cuda_on_cpu_gather: each lane sees the value of
// every other. Operations on fragments (mma.sync, ldmatrix) can be written on it as well: gather
// a pointer to each lane's fragment, compute this lane's part, and gather again before returning.
#pragma once

// ----------------------------------------------------------------------------------------- block

inline void __syncthreads(CUDA_ON_CPU_LINE) { cuda_on_cpu_barrier(0, 0, line); }
inline int __syncthreads_count(int p, CUDA_ON_CPU_LINE) { return cuda_on_cpu_barrier(1, p, line); }
inline int __syncthreads_and(int p, CUDA_ON_CPU_LINE) { return cuda_on_cpu_barrier(2, p, line); }
inline int __syncthreads_or(int p, CUDA_ON_CPU_LINE) { return cuda_on_cpu_barrier(3, p, line); }

// Memory is seen in program order by all threads here.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ------------------------------------------------------------------------------------------ warp

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_LINE) {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_gather(GATHER_SYNC, mask, 0, all, line);
}

namespace cuda_on_cpu {

template <class T> inline cuda_on_cpu_bits pack(T value) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 64 bits");
  cuda_on_cpu_bits bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T> inline T unpack(cuda_on_cpu_bits bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The lane that a shuffle reads: idx, up, down and bfly of PTX's shfl.
enum { INDEX, UP, DOWN, XOR };
inline int source(int how, int lane, int by, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  const int from = how == INDEX ? first + (by & (width - 1))
                   : how == UP  ? lane - by
                   : how == DOWN ? lane + by
                                 : lane ^ by;
  return from > last || (how == UP && from < first) ? lane : from;
}

template <class T>
inline T shuffle(int how, unsigned mask, T value, int by, int width, int line) {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_gather(GATHER_SHUFFLE, mask, pack(value), all, line);
  return unpack<T>(all[source(how, (int)cuda_on_cpu_lane(), by, width)]);
}

template <class T, class F>
inline T reduce(unsigned mask, T value, int line, F combine) {
  cuda_on_cpu_bits all[32];
  mask = cuda_on_cpu_gather(GATHER_REDUCE, mask, pack(value), all, line);
  bool first = true;
  T total = value;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) {
      total = first ? unpack<T>(all[i]) : combine(total, unpack<T>(all[i]));
      first = false;
    }
  return total;
}

}  // namespace cuda_on_cpu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::INDEX, mask, value, lane, width, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::UP, mask, value, (int)by, width, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::DOWN, mask, value, (int)by, width, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::XOR, mask, value, by, width, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_LINE) {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_gather(GATHER_VOTE, mask, predicate != 0, all, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1 && all[i] == 1) votes |= 1u << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_LINE) {
  cuda_on_cpu_bits all[32];
  mask = cuda_on_cpu_gather(GATHER_MATCH, mask, cuda_on_cpu::pack(value), all, line);
  unsigned same = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1 && all[i] == cuda_on_cpu::pack(value)) same |= 1u << i;
  return same;
}
inline unsigned __activemask() { return cuda_on_cpu_active_mask(); }

#define CUDA_ON_CPU_REDUCE(NAME, T, EXPRESSION)                                                  \
  inline T NAME(unsigned mask, T value, CUDA_ON_CPU_LINE) {                                      \
    return cuda_on_cpu::reduce(mask, value, line, [](T a, T b) -> T { return EXPRESSION; });     \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int, (int)((unsigned)a + (unsigned)b))
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, a & b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUDA_ON_CPU_REDUCE
