// Products of a whole warpgroup on operands in shared memory (wgmma), of compute capability 9.0.
//
// A warpgroup is four warps in a row, the first a multiple of four. wgmma.mma_async multiplies a
// tile of A, 64 x K, with one of B, K x N, both read from shared memory as the tensor cores need
// them, and adds the product to 64 x N sums of float32 in registers. K is 32 bytes: 16 values of
// 16 bits or 8 of TF32. Warp w holds rows 16w to 16w+15; with g = lane / 4 and t = lane % 4,
// for j = 0 .. N/8 - 1:
//
//   d[4j], d[4j+1] = D[16w + g][8j + 2t], D[16w + g][8j + 2t + 1]
//   d[4j+2], d[4j+3] = the same of row 16w + g + 8
//
// which is the layout of mma.sync (mma.cuh), N/8 tiles side by side.
//
// It runs asynchronously. Order is the program's to keep:
//   wgmma_fence      before the first product, and after other code has touched the sums
//   wgmma_commit     makes a group of the products since the last
//   wgmma_wait<N>    until all but the newest N groups are done. Before that the sums are
//                    undefined, and nobody may write what the products read.
//
// Where an operand lies is told by a descriptor. With swizzling of 128 bytes it is made of
// patterns of 8 rows of 128 bytes, 1024 bytes, each on a multiple of that; in a row of number r,
// 16-byte chunk c lies at chunk c ^ r % 8. TMA (tma.cuh) writes that very pattern. An operand is
//   K-major    a row is a row of A (a column of B), and runs along K. A product takes 32 bytes of
//              each row: the next one starts 32 bytes on. `stride`: from 8 rows to the next 8.
//   MN-major   a row is one position along K, and runs along M (or N). A product takes 32 bytes'
//              worth of values as rows: 16. `stride`: from 8 rows to the next 8; `leading`: from
//              the first 128 bytes of M (or N) to the next. For values of 16 bits only.
//
// The layouts are those of the PTX manual, "Asynchronous Warpgroup Level Matrix Instructions".
// Needs sm_90a: later architectures have other instructions in their place.
#pragma once

#include "tma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where an operand starts, and its distances, in bytes.
__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned start, unsigned leading,
                                                                unsigned stride) {
  const unsigned long long swizzle_128 = 1;
  return (unsigned long long)((start & 0x3ffff) >> 4) | (unsigned long long)(leading >> 4) << 16 |
         (unsigned long long)(stride >> 4) << 32 | swizzle_128 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
#ifdef CUDA_ON_CPU
  cuda_on_cpu_wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef CUDA_ON_CPU
  cuda_on_cpu_wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int N> __device__ __forceinline__ void wgmma_wait() {
#ifdef CUDA_ON_CPU
  cuda_on_cpu_wgmma_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// Keeps the compiler from moving what it does with the sums across this place.
template <int COUNT> __device__ __forceinline__ void wgmma_hold(float (&d)[COUNT]) {
#ifndef CUDA_ON_CPU
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#define WGMMA_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
#define WGMMA_NAMES_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, " \
  "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, " \
  "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
  "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_8(i)                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_SUMS_32(i) WGMMA_8(i), WGMMA_8(i + 8), WGMMA_8(i + 16), WGMMA_8(i + 24)
#define WGMMA_SUMS_64(i) WGMMA_SUMS_32(i), WGMMA_SUMS_32(i + 32)
#define WGMMA_SUMS_128(i) WGMMA_SUMS_64(i), WGMMA_SUMS_64(i + 64)

// d += A B for COUNT sums a thread, N = 2 COUNT. A_ and B_: the descriptors' numbers among the
// operands, P_ that of whether d counts, X_ and Y_ those of whether A and B are MN-major.
#ifdef CUDA_ON_CPU
#define WGMMA_16(NAME, TYPE, COUNT, N, A_, B_, P_, X_, Y_)                                       \
  template <bool A_MN, bool B_MN>                                                                \
  __device__ __forceinline__ void wgmma_##NAME(float (&d)[COUNT], unsigned long long a,          \
                                               unsigned long long b) {                           \
    cuda_on_cpu::wgmma(cuda_on_cpu::WGMMA_##NAME, d, COUNT, a, b, A_MN, B_MN);                   \
  }
#define WGMMA_32(COUNT, N, A_, B_, P_)                                                           \
  __device__ __forceinline__ void wgmma_tf32(float (&d)[COUNT], unsigned long long a,            \
                                             unsigned long long b) {                             \
    cuda_on_cpu::wgmma(cuda_on_cpu::WGMMA_tf32, d, COUNT, a, b, false, false);                   \
  }
#else
#define WGMMA_16(NAME, TYPE, COUNT, N, A_, B_, P_, X_, Y_)                                       \
  template <bool A_MN, bool B_MN>                                                                \
  __device__ __forceinline__ void wgmma_##NAME(float (&d)[COUNT], unsigned long long a,          \
                                               unsigned long long b) {                           \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" P_ ", 0; "                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " "              \
                 "{" WGMMA_NAMES_##COUNT "}, %" A_ ", %" B_ ", p, 1, 1, %" X_ ", %" Y_ "; }"     \
                 : WGMMA_SUMS_##COUNT(0)                                                         \
                 : "l"(a), "l"(b), "r"(1), "n"(int(A_MN)), "n"(int(B_MN))                        \
                 : "memory");                                                                    \
  }
#define WGMMA_32(COUNT, N, A_, B_, P_)                                                           \
  __device__ __forceinline__ void wgmma_tf32(float (&d)[COUNT], unsigned long long a,            \
                                             unsigned long long b) {                             \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" P_ ", 0; "                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N "k8.f32.tf32.tf32 "                       \
                 "{" WGMMA_NAMES_##COUNT "}, %" A_ ", %" B_ ", p, 1, 1; }"                       \
                 : WGMMA_SUMS_##COUNT(0)                                                         \
                 : "l"(a), "l"(b), "r"(1)                                                        \
                 : "memory");                                                                    \
  }
#endif

WGMMA_16(f16, "f16", 32, "64", "32", "33", "34", "35", "36")
WGMMA_16(f16, "f16", 64, "128", "64", "65", "66", "67", "68")
WGMMA_16(f16, "f16", 128, "256", "128", "129", "130", "131", "132")
WGMMA_16(bf16, "bf16", 32, "64", "32", "33", "34", "35", "36")
WGMMA_16(bf16, "bf16", 64, "128", "64", "65", "66", "67", "68")
WGMMA_16(bf16, "bf16", 128, "256", "128", "129", "130", "131", "132")
WGMMA_32(32, "64", "32", "33", "34")
WGMMA_32(64, "128", "64", "65", "66")
WGMMA_32(128, "256", "128", "129", "130")

#endif  // sm_90a
