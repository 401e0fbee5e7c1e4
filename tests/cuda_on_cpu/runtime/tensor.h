// What kernels/mma.cuh needs: products of tiles that a warp holds, and asynchronous copies.
//
// Layouts are those of the PTX manual (matrix fragments of mma.m16n8k8 and m16n8k16, ldmatrix).
#pragma once

namespace cuda_on_cpu {

// ------------------------------------------------------------------------------------- copies

// Before sm_80: at once.
template <int BYTES> inline void copy(void* shared, const void* global, bool valid) {
  struct __attribute__((aligned(BYTES))) Unit {
    unsigned words[BYTES / 4];
  };
  *(Unit*)shared = valid ? *(const Unit*)global : Unit();
}

template <int BYTES>
CUDA_ON_CPU_UNWATCHED void copy_async(void* shared, const void* global, bool valid) {
  cuda_on_cpu_copy_async(shared, global, BYTES, valid, __builtin_return_address(0));
}

// ---------------------------------------------------------------------------------- fragments

template <int TILES, bool TRANSPOSED> inline void ldmatrix(unsigned* r, const void* row) {
  if ((uintptr_t)row % 16)
    cuda_on_cpu_fail("ldmatrix: lane %u gives an address that is no multiple of 16 bytes",
                     cuda_on_cpu_lane());
  cuda_on_cpu_bits rows[32];
  cuda_on_cpu_whole_warp(GATHER_LDMATRIX + TILES * 2 + TRANSPOSED, pack(row), rows, nullptr);
  const unsigned upper = cuda_on_cpu_lane() / 4, lower = cuda_on_cpu_lane() % 4 * 2;
  // These reads are the lane's own, watched as such.
  for (int i = 0; i < TILES; i++) {
    if (TRANSPOSED)
      r[i] = unpack<const unsigned short*>(rows[8 * i + lower])[upper] |
             (unsigned)unpack<const unsigned short*>(rows[8 * i + lower + 1])[upper] << 16;
    else
      r[i] = unpack<const unsigned*>(rows[8 * i + upper])[lower / 2];
  }
}

enum Product { MMA_F16_K8, MMA_F16_K16, MMA_BF16_K16, MMA_TF32_K8 };

inline unsigned to_tf32(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;  // NaN
  if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// The value number `half` of a register, as the tensor core sees it.
template <Product P> inline float element(unsigned bits, int half) {
  if (P == MMA_TF32_K8) return __uint_as_float(bits & ~0x1fffu);
  const unsigned short one = (unsigned short)(half ? bits >> 16 : bits);
  return P == MMA_BF16_K16 ? __uint_as_float((unsigned)one << 16) : half_value(one);
}

struct Fragment {
  float* d;
  const unsigned *a, *b;
};

// A product of all lanes' fragments, which the last of them to arrive computes.
template <Product P> CUDA_ON_CPU_UNWATCHED void multiply(const cuda_on_cpu_bits* all) {
  const int k_of = P == MMA_F16_K16 || P == MMA_BF16_K16 ? 16 : 8;
  const int in_register = P == MMA_TF32_K8 ? 1 : 2, step = 4 * in_register;
  typedef float Row __attribute__((vector_size(32)));
  float a[16][k_of];
  Row b[k_of], c[16];
  for (int lane = 0; lane < 32; lane++) {
    const Fragment& f = *unpack<const Fragment*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < k_of / step; k++)
      for (int half = 0; half < in_register; half++) {
        const int at = k * step + t * in_register + half;
        a[g][at] = element<P>(f.a[2 * k], half);
        a[g + 8][at] = element<P>(f.a[2 * k + 1], half);
        b[at][g] = element<P>(f.b[k], half);
      }
    for (int i = 0; i < 4; i++) c[g + i / 2 * 8][2 * t + i % 2] = f.d[i];
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < k_of; k++) c[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      unpack<const Fragment*>(all[lane])->d[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <Product P> inline void mma(float* d, const unsigned* a, const unsigned* b) {
  const Fragment mine = {d, a, b};
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_whole_warp(GATHER_MMA + P, pack(&mine), all, multiply<P>);
}

}  // namespace cuda_on_cpu
