// Batch normalisation of a matrix (rows, columns), a column being a channel: four kernels.
//
//   moments     mean and squared distances from it, of every column in a strip of rows
//   normalize   y = act((x - mean) * factor + offset)
//   grad_sums   sums of d * (x - mean) and of d, d = dy * act'(z), of every column in a strip
//   grad        dx = slope * (d + bend * (x - mean) + level)
//
// All of them move every number once and compute little: what counts is to read in order. So the
// 32 threads of a warp take neighbouring columns, and a block's 8 warps every eighth row of its
// strip; then the 8 results of a column meet in shared memory, and one is written for the strip.
// The few strips are put together outside, always in the same order: no atomics, so the same bits
// every time.
//
// The mean moves along with the numbers (Welford 1962), and parts are joined by the formula of
// Chan, Golub and LeVeque (1979): a mean far from zero costs no digits.
//
// Compile-time constants: DTYPE_F32 | DTYPE_F64 | DTYPE_F16 | DTYPE_BF16, INDEX_64, ACT. Blocks are (32, 8);
// grids (tiles of 32 columns, strips) for the sums, and any in one dimension for the rest.

#include "common.cuh"
#include "activations.cuh"
#include "reduce.cuh"

#define LANES 32
#define WARPS 8

// Rows of the strip that a warp sees: first, first + WARPS, ...
__device__ __forceinline__ int rows_of(Index first, Index end) {
  return first < end ? int((end - first + WARPS - 1) / WARPS) : 0;
}

template <typename T>
__device__ __forceinline__ void moments(const T* x, typename Sum<T>::type* parts, Index rows,
                                        Index columns, Index strip) {
  typedef typename Sum<T>::type S;
  __shared__ S means[WARPS][LANES];
  __shared__ S squares[WARPS][LANES];
  const Index column = Index(blockIdx.x) * LANES + threadIdx.x;
  const Index begin = Index(blockIdx.y) * strip;
  const Index end = begin + strip < rows ? begin + strip : rows;
  S mean = 0, square = 0;
  int count = 0;
  if (column < columns) {
    // Each step waits for the mean of the one before: unrolled, it would only spill registers.
#pragma unroll 1
    for (Index row = begin + threadIdx.y; row < end; row += WARPS) {
      const S value = to_sum(x[row * columns + column]);
      const S apart = value - mean;
      mean += apart / S(++count);
      square += apart * (value - mean);
    }
  }
  means[threadIdx.y][threadIdx.x] = mean;
  squares[threadIdx.y][threadIdx.x] = square;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  for (int warp = 1; warp < WARPS; warp++) {
    const int more = rows_of(begin + warp, end);
    if (more == 0) break;
    const S apart = means[warp][threadIdx.x] - mean;
    const S share = S(more) / S(count + more);
    mean += apart * share;
    square += squares[warp][threadIdx.x] + apart * apart * S(count) * share;
    count += more;
  }
  parts[(Index(blockIdx.y) * 2 + 0) * columns + column] = mean;
  parts[(Index(blockIdx.y) * 2 + 1) * columns + column] = square;
}

template <typename T>
__device__ __forceinline__ void normalize(const T* x, const typename Sum<T>::type* mean,
                                          const typename Sum<T>::type* factor,
                                          const typename Sum<T>::type* offset, T* y, Index size,
                                          Index columns) {
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < size; e += threads) {
    const Index c = e % columns;
    y[e] = from_sum<T>(activate((to_sum(x[e]) - mean[c]) * factor[c] + offset[c]));
  }
}

template <typename T>
__device__ __forceinline__ void grad_sums(const T* dy, const T* y, const T* x,
                                          const typename Sum<T>::type* mean,
                                          typename Sum<T>::type* parts, Index rows, Index columns,
                                          Index strip) {
  typedef typename Sum<T>::type S;
  __shared__ S shared[2 * LANES * WARPS];
  const Index column = Index(blockIdx.x) * LANES + threadIdx.x;
  const Index begin = Index(blockIdx.y) * strip;
  const Index end = begin + strip < rows ? begin + strip : rows;
  S sums[2] = {S(0), S(0)};  // of the products, and of d
  if (column < columns) {
    const S centre = mean[column];
    for (Index row = begin + threadIdx.y; row < end; row += WARPS) {
      const Index e = row * columns + column;
      S d = to_sum(dy[e]);
      if (y != nullptr) d *= activation_grad(to_sum(y[e]));
      sums[0] += d * (to_sum(x[e]) - centre);
      sums[1] += d;
    }
  }
  block_sums(sums, shared);
  if (threadIdx.y != 0 || column >= columns) return;
  parts[(Index(blockIdx.y) * 2 + 0) * columns + column] = sums[0];
  parts[(Index(blockIdx.y) * 2 + 1) * columns + column] = sums[1];
}

template <typename T>
__device__ __forceinline__ void grad(const T* dy, const T* y, const T* x,
                                     const typename Sum<T>::type* mean,
                                     const typename Sum<T>::type* slope,
                                     const typename Sum<T>::type* bend,
                                     const typename Sum<T>::type* level, T* dx, Index size,
                                     Index columns) {
  typedef typename Sum<T>::type S;
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < size; e += threads) {
    const Index c = e % columns;
    S d = to_sum(dy[e]);
    if (y != nullptr) d *= activation_grad(to_sum(y[e]));
    dx[e] = from_sum<T>(slope[c] * (d + bend[c] * (to_sum(x[e]) - mean[c]) + level[c]));
  }
}

#define KERNELS(T, TYPE)                                                                         \
  extern "C" __global__ void __launch_bounds__(256) batch_norm_moments_##TYPE(                   \
      const T* __restrict__ x, Sum<T>::type* __restrict__ parts, long long rows,                 \
      long long columns, long long strip) {                                                      \
    moments<T>(x, parts, Index(rows), Index(columns), Index(strip));                             \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) batch_norm_normalize_##TYPE(                 \
      const T* __restrict__ x, const Sum<T>::type* __restrict__ mean,                            \
      const Sum<T>::type* __restrict__ factor, const Sum<T>::type* __restrict__ offset,          \
      T* __restrict__ y, long long size, long long columns) {                                    \
    normalize<T>(x, mean, factor, offset, y, Index(size), Index(columns));                       \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) batch_norm_grad_sums_##TYPE(                 \
      const T* __restrict__ dy, const T* __restrict__ y, const T* __restrict__ x,                \
      const Sum<T>::type* __restrict__ mean, Sum<T>::type* __restrict__ parts, long long rows,   \
      long long columns, long long strip) {                                                      \
    grad_sums<T>(dy, y, x, mean, parts, Index(rows), Index(columns), Index(strip));              \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) batch_norm_grad_##TYPE(                      \
      const T* __restrict__ dy, const T* __restrict__ y, const T* __restrict__ x,                \
      const Sum<T>::type* __restrict__ mean, const Sum<T>::type* __restrict__ slope,             \
      const Sum<T>::type* __restrict__ bend, const Sum<T>::type* __restrict__ level,             \
      T* __restrict__ dx, long long size, long long columns) {                                   \
    grad<T>(dy, y, x, mean, slope, bend, level, dx, Index(size), Index(columns));                \
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
