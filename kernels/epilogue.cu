// The gradient in front of a convolution's epilogue act(z + b), and the bias gradient with it.
//
//   d  = dy * act'(z), the derivative taken from y = act(z)
//   dz = d, and db[c] = the sum of d over everything but the channel c
//
// Engines whose gradient kernels do not do this themselves are given dz. As array operations it
// is four passes over memory at least: the derivative, the product, and dz once more for the
// sums. Here dy and y are read once and dz is written once: 3 * size of y bytes, which is the
// floor, or a read of dy alone for a plain bias gradient. There are two operations a number, so
// nothing but bytes counts: VEC elements, up to 16 bytes, are moved at a time.
//
// A thread adds up what it sees in registers, float32 for 16-bit types. Channels last, that is
// VEC channels of every blockDim.y-th row of a strip, the lanes of a warp side by side along the
// channels; channels first, VEC positions of one channel, whose sums are put together. Then
// reduce.cuh: one row of sums for each strip, and the strips in order. A grid of one strip
// writes db at once.
//
// Compile-time constants: DTYPE_*, INDEX_64, ACT, VEC (a power of two that divides the channels,
// or the positions of a plane if channels are first, and the alignment of all arrays). Blocks are
// (x, y), powers of two of 256 threads at most, x = 1 if channels are first. Grids: (tiles of
// blockDim.x vectors, strips) or (channels, strips). A null y is no activation, a null dz or db
// a result that nobody asked for; parts is used where there is more than one strip.

#include "common.cuh"
#include "activations.cuh"
#include "vector.cuh"
#include "reduce.cuh"

// Adds VEC gradients from at into sums[], or into sums[0] if they are of one channel.
template <int N, typename T, typename S>
__device__ __forceinline__ void step(const T* dy, const T* y, T* dz, Index at, S (&sums)[N]) {
  const Vector<T, VEC> above = load_vector<VEC>(dy + at);
  Vector<T, VEC> value, result;
  if (y != nullptr) value = load_vector<VEC>(y + at);
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    S d = to_sum(above.v[k]);
    if (y != nullptr) d *= activation_grad(to_sum(value.v[k]));
    sums[N == 1 ? 0 : k] += d;
    result.v[k] = from_sum<T>(d);
  }
  if (dz != nullptr) store_vector(dz + at, result);
}

template <typename T, typename S>
__device__ __forceinline__ void grad_last(const T* dy, const T* y, T* dz, S* parts, T* db,
                                          Index rows, Index channels, Index strip) {
  __shared__ S shared[256 * VEC];
  const Index first = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * VEC;
  const Index begin = Index(blockIdx.y) * strip;
  const Index end = begin + strip < rows ? begin + strip : rows;
  S sums[VEC] = {};
  if (first < channels) {
#pragma unroll 4
    for (Index row = begin + threadIdx.y; row < end; row += blockDim.y)
      step(dy, y, dz, row * channels + first, sums);
  }
  if (db == nullptr) return;
  block_sums(sums, shared);
  if (threadIdx.y != 0 || first >= channels) return;
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    if (gridDim.y == 1) db[first + k] = from_sum<T>(sums[k]);
    else parts[blockIdx.y * channels + first + k] = sums[k];
  }
}

// A strip is so many vectors of one channel's positions, counted over the batch.
template <typename T, typename S>
__device__ __forceinline__ void grad_first(const T* dy, const T* y, T* dz, S* parts, T* db,
                                           Index batch, Index channels, Index positions,
                                           Index strip) {
  __shared__ S shared[256];
  const Index plane = positions / VEC, count = batch * plane;
  const Index begin = Index(blockIdx.y) * strip;
  const Index end = begin + strip < count ? begin + strip : count;
  S sums[1] = {};
#pragma unroll 4
  for (Index e = begin + threadIdx.y; e < end; e += blockDim.y) {
    const Index n = e / plane;
    step(dy, y, dz, (n * channels + blockIdx.x) * positions + (e - n * plane) * VEC, sums);
  }
  if (db == nullptr) return;
  block_sums(sums, shared);
  if (threadIdx.y != 0) return;
  if (gridDim.y == 1) db[blockIdx.x] = from_sum<T>(sums[0]);
  else parts[blockIdx.y * channels + blockIdx.x] = sums[0];
}

#define KERNELS(T, TYPE)                                                                         \
  extern "C" __global__ void __launch_bounds__(256) epilogue_grad_last_##TYPE(                   \
      const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dz,                     \
      Sum<T>::type* __restrict__ parts, T* __restrict__ db, long long rows, long long channels,  \
      long long strip) {                                                                         \
    grad_last(dy, y, dz, parts, db, Index(rows), Index(channels), Index(strip));                 \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) epilogue_grad_first_##TYPE(                  \
      const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dz,                     \
      Sum<T>::type* __restrict__ parts, T* __restrict__ db, long long batch,                     \
      long long channels, long long positions, long long strip) {                                \
    grad_first(dy, y, dz, parts, db, Index(batch), Index(channels), Index(positions),            \
               Index(strip));                                                                    \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) epilogue_bias_sums_##TYPE(                   \
      const Sum<T>::type* __restrict__ parts, T* __restrict__ db, int strips,                    \
      long long channels) {                                                                      \
    strip_sums<T>(parts, db, strips, Index(channels));                                           \
  }

#ifdef DTYPE_F32
KERNELS(float, f32)
#endif
#ifdef DTYPE_F64
KERNELS(double, f64)
#endif
#ifdef DTYPE_F16
KERNELS(__half, f16)
#endif
#ifdef DTYPE_BF16
KERNELS(__nv_bfloat16, bf16)
#endif
