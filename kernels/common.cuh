// What every kernel file shares: the index type, the types sums are held in, loads and stores.
#pragma once

#ifdef DTYPE_F16
#include <cuda_fp16.h>
#endif
#ifdef DTYPE_BF16
#include <cuda_bf16.h>
#endif

// Offsets into a tensor: 32 bits where the largest tensor allows it, which is faster, else 64.
#ifdef INDEX_64
typedef long long Index;
#else
typedef int Index;
#endif

// Sums of float16 and bfloat16 are held in float32.
template <typename T> struct Sum { typedef T type; };

template <typename T> __device__ __forceinline__ T to_sum(T value) { return value; }
template <typename T, typename S> __device__ __forceinline__ T from_sum(S value) { return value; }

#ifdef DTYPE_F16
template <> struct Sum<__half> { typedef float type; };
__device__ __forceinline__ float to_sum(__half value) { return __half2float(value); }
template <> __device__ __forceinline__ __half from_sum<__half, float>(float value) {
  return __float2half_rn(value);
}
#endif

#ifdef DTYPE_BF16
template <> struct Sum<__nv_bfloat16> { typedef float type; };
__device__ __forceinline__ float to_sum(__nv_bfloat16 value) { return __bfloat162float(value); }
template <> __device__ __forceinline__ __nv_bfloat16 from_sum<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}
#endif
