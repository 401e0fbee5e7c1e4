// Atomic operations. Threads switch at known points only, so that a plain read and write is
// atomic; the checking runtime is told, and may switch before.
#pragma once

namespace cuda_on_cpu {

template <class T, class F> CUDA_ON_CPU_UNWATCHED T change(T* address, F changed) {
#if defined(CUDA_ON_CPU_CHECKED)
  cuda_on_cpu_atomic(address, sizeof(T), __builtin_return_address(0));
#endif
  const T old = *address;
  *address = changed(old);
  return old;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(NAME, T, EXPRESSION)                                                  \
  inline T NAME(T* address, T value) {                                                           \
    return cuda_on_cpu::change(address, [value](T old) -> T { return EXPRESSION; });             \
  }
#define CUDA_ON_CPU_ATOMIC_INTEGER(T)                                                            \
  CUDA_ON_CPU_ATOMIC(atomicMin, T, old < value ? old : value)                                    \
  CUDA_ON_CPU_ATOMIC(atomicMax, T, old > value ? old : value)                                    \
  CUDA_ON_CPU_ATOMIC(atomicAnd, T, old & value)                                                  \
  CUDA_ON_CPU_ATOMIC(atomicOr, T, old | value)                                                   \
  CUDA_ON_CPU_ATOMIC(atomicXor, T, old ^ value)                                                  \
  CUDA_ON_CPU_ATOMIC(atomicExch, T, (void(old), value))                                          \
  inline T atomicCAS(T* address, T compare, T value) {                                           \
    const T old = cuda_on_cpu::change(                                                           \
        address, [=](T now) -> T { return now == compare ? value : now; });                      \
    if (old != compare) cuda_on_cpu_yield(); /* it may wait for another thread */                \
    return old;                                                                                  \
  }

CUDA_ON_CPU_ATOMIC_INTEGER(int)
CUDA_ON_CPU_ATOMIC_INTEGER(unsigned)
CUDA_ON_CPU_ATOMIC_INTEGER(unsigned long long)
CUDA_ON_CPU_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)value))
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned long long, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, float, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, double, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)value))
CUDA_ON_CPU_ATOMIC(atomicSub, unsigned, old - value)
CUDA_ON_CPU_ATOMIC(atomicExch, float, (void(old), value))
CUDA_ON_CPU_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)

inline unsigned short atomicCAS(unsigned short* address, unsigned short compare,
                                unsigned short value) {
  const unsigned short old = cuda_on_cpu::change(
      address, [=](unsigned short now) { return now == compare ? value : now; });
  if (old != compare) cuda_on_cpu_yield();
  return old;
}
