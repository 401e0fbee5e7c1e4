// Tensor cores and asynchronous copies: the instructions that C++ has no words for.
//
// A warp multiplies together. mma.sync takes a tile of A (16 x K) and of B (K x 8), both spread
// over the registers of 32 threads, and adds their product to a tile of C (16 x 8) of float32,
// spread likewise. Who holds what is fixed; with g = lane / 4 and t = lane % 4:
//
//   C       d[0], d[1] = C[g][2t], C[g][2t+1]          d[2], d[3] = the same of row g+8
//   16 bit  two values a register, the lower half first: columns of A, rows of B
//           K = 16   a[0] = A[g][2t..]    a[1] = A[g+8][2t..]   a[2], a[3] = the same, 8 columns on
//                    b[0] = B[2t..][g]    b[1] = B[2t+8..][g]
//           K = 8    a[0], a[1] and b[0] alone
//   TF32    one float a register
//           K = 8    a[0] = A[g][t]       a[1] = A[g+8][t]      a[2], a[3] = the same, 4 columns on
//                    b[0] = B[t][g]       b[1] = B[t+4][g]
//
// ldmatrix fills such registers from shared memory: 8 x 8 tiles of 16-bit values, 16 bytes a
// row, the address of row r of tile i given by lane 8i + r. Lane 4r + c gets the c-th pair of row
// r; transposed, column r of rows 2c and 2c+1. A row of 16 bytes is four floats as well: that is
// how TF32's tiles are read. Eight rows that lie in different banks of shared memory (16 bytes
// each, 128 in all) are read at once.
//
// cp.async copies from global to shared memory while the thread goes on. A thread gathers its
// copies into groups (commit) and waits until all but the newest N groups have landed; what other
// threads have copied is there after that and a barrier. In between the bytes are undefined.
//
// Needs: float16 sm_75; bfloat16, TF32 and copies that are asynchronous sm_80. What an
// architecture lacks is not declared there, so that a kernel which asks for it does not compile;
// but copies are then plain ones, so that one text serves all.
#pragma once

// ------------------------------------------------------------------------------------- copies

#if !defined(CUDA_ON_CPU) && __CUDA_ARCH__ < 800
template <int BYTES> struct Bytes;
template <> struct Bytes<4> { typedef unsigned type; };
template <> struct Bytes<8> { typedef uint2 type; };
template <> struct Bytes<16> { typedef uint4 type; };
#endif

// Copies 4, 8 or 16 bytes, both addresses multiples of that. Where valid is false it writes
// zeros, and what global points to is not read.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ < 800
#ifdef CUDA_ON_CPU
  cuda_on_cpu::copy<BYTES>(shared, global, valid);
#else
  typedef typename Bytes<BYTES>::type Unit;
  *static_cast<Unit*>(shared) = valid ? *static_cast<const Unit*>(global) : Unit();
#endif
#elif defined(CUDA_ON_CPU)
  cuda_on_cpu::copy_async<BYTES>(shared, global, valid);
#else
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  const unsigned size = valid ? BYTES : 0;
  if (BYTES == 16)  // past the L1 cache, which only this size may
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(to), "l"(global), "n"(BYTES), "r"(size) : "memory");
#endif
}

// Makes a group of this thread's copies since the last; it may be empty.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
#ifdef CUDA_ON_CPU
  cuda_on_cpu_copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
#endif
}

// Waits for all of this thread's groups but the newest N.
template <int N> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
#ifdef CUDA_ON_CPU
  cuda_on_cpu_copy_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
#endif
}

// ---------------------------------------------------------------------------------- fragments

#if __CUDA_ARCH__ >= 750

// Reads 1, 2 or 4 tiles of 8 x 8 16-bit values, a register each. Every lane gives an address,
// though only those of the first 8 * TILES lanes count.
template <int TILES, bool TRANSPOSED = false>
__device__ __forceinline__ void ldmatrix(unsigned* r, const void* row) {
  static_assert(TILES == 1 || TILES == 2 || TILES == 4, "ldmatrix reads 1, 2 or 4 tiles");
#ifdef CUDA_ON_CPU
  cuda_on_cpu::ldmatrix<TILES, TRANSPOSED>(r, row);
#else
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if constexpr (TILES == 1 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(from) : "memory");
  if constexpr (TILES == 1 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(from) : "memory");
  if constexpr (TILES == 2 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  if constexpr (TILES == 2 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  if constexpr (TILES == 4 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  if constexpr (TILES == 4 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
#endif
}

// d += A B, float16, K = 8: two registers of A, one of B.
__device__ __forceinline__ void mma_m16n8k8_f16(float* d, const unsigned* a, const unsigned* b) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mma<cuda_on_cpu::MMA_F16_K8>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

// d += A B, float16, K = 16: four registers of A, two of B. Before sm_80 that is twice K = 8.
__device__ __forceinline__ void mma_m16n8k16_f16(float* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ < 800
  mma_m16n8k8_f16(d, a, b);
  mma_m16n8k8_f16(d, a + 2, b + 1);
#elif defined(CUDA_ON_CPU)
  cuda_on_cpu::mma<cuda_on_cpu::MMA_F16_K16>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#endif  // sm_75

#if __CUDA_ARCH__ >= 800

// d += A B, bfloat16, K = 16: four registers of A, two of B.
__device__ __forceinline__ void mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mma<cuda_on_cpu::MMA_BF16_K16>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += A B, TF32, K = 8: four registers of A, two of B. It takes the upper 19 bits of a float
// and ignores the rest: what is to be rounded goes through to_tf32 before.
__device__ __forceinline__ void mma_m16n8k8_tf32(float* d, const unsigned* a, const unsigned* b) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mma<cuda_on_cpu::MMA_TF32_K8>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The bits of a float rounded to TF32's 10 of mantissa, halves away from zero.
__device__ __forceinline__ unsigned to_tf32(float value) {
#ifdef CUDA_ON_CPU
  return cuda_on_cpu::to_tf32(value);
#else
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

#endif  // sm_80
