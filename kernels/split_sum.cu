// Adds up the parts of a sum that was divided among blocks, in their order; then bias, activation.
//
// Where a product has few tiles and a long inner index, each of several blocks computes a part of
// the same tile (conv_implicit_gemm.cu, conv_tensor_core.cu) and writes it here and there. A thread
// takes one element, adds its parts first to last and writes the result where it belongs, or adds
// it to a total over parts of a batch: no atomics, so the same bits every time. Bytes: parts + 1
// numbers an element, read in order; that is the floor, and the reason to divide no further than
// the device needs.
//
// Compile-time constants: DTYPE_*, INDEX_64, ACT. Any launch of blocks in one dimension will do.

#include "common.cuh"
#include "activations.cuh"

// The result: sizes and strides of its axes, the last (channels) the fastest in the parts.
struct Result {
  int size[5];
  Index stride[5];
};

template <typename T>
__device__ __forceinline__ void split_sum(const typename Sum<T>::type* parts, const T* bias, T* y,
                                          typename Sum<T>::type* total, const Result& r,
                                          int count) {
  typedef typename Sum<T>::type S;
  const Index elements = Index(r.size[0]) * r.size[1] * r.size[2] * r.size[3] * r.size[4];
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < elements; e += threads) {
    S sum = parts[e];
    for (int i = 1; i < count; i++) sum += parts[static_cast<long long>(i) * elements + e];
    Index rest = e, to = 0;
    const int channel = int(e % r.size[4]);
#pragma unroll
    for (int axis = 4; axis > 0; axis--) {
      to += rest % r.size[axis] * r.stride[axis];
      rest /= r.size[axis];
    }
    to += rest * r.stride[0];
    if (total != nullptr) {
      total[to] += sum;
      continue;
    }
    if (bias != nullptr) sum += to_sum(bias[channel]);
    y[to] = from_sum<T>(activate(sum));
  }
}

#define KERNEL(T, TYPE)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) conv_split_sum_##TYPE(                       \
      const Sum<T>::type* __restrict__ parts, const T* __restrict__ bias, T* __restrict__ y,     \
      Sum<T>::type* __restrict__ total, const Result result, int count) {                        \
    split_sum<T>(parts, bias, y, total, result, count);                                          \
  }

#ifdef DTYPE_F32
KERNEL(float, f32)
#endif
#ifdef DTYPE_F64
KERNEL(double, f64)
#endif
#ifdef DTYPE_F16
KERNEL(__half, f16)
#endif
#ifdef DTYPE_BF16
KERNEL(__nv_bfloat16, bf16)
#endif
