// Sums over many rows in two stages and in one order, so with the same bits every time.
//
// First every block adds up a strip of the rows, its threads meet in shared memory, and it writes
// one row of sums: block_sums. Then one thread a column adds up the few strips: strip_sums. Atomics
// would spare the second launch, and the order with it.
#pragma once

// Adds up value[] over the threads of a block that share threadIdx.x; those of threadIdx.y 0 get
// the sums. blockDim.y is a power of two; shared holds N values a thread, and is free again
// behind the next barrier.
template <int N, typename S>
__device__ __forceinline__ void block_sums(S (&value)[N], S* shared) {
  const int threads = blockDim.x * blockDim.y;
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < N; k++) shared[k * threads + at] = value[k];
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < half) {
#pragma unroll
      for (int k = 0; k < N; k++)
        shared[k * threads + at] += shared[k * threads + at + half * blockDim.x];
    }
  }
  if (threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < N; k++) value[k] = shared[k * threads + at];
  }
}

// Blocks (32, 8), a block for 32 columns: its warps take every eighth strip.
template <typename T, typename S>
__device__ __forceinline__ void strip_sums(const S* parts, T* out, int strips, Index columns) {
  __shared__ S shared[256];
  const Index column = Index(blockIdx.x) * 32 + threadIdx.x;
  S total[1] = {S(0)};
  if (column < columns) {
    for (int strip = threadIdx.y; strip < strips; strip += 8)
      total[0] += parts[strip * columns + column];
  }
  block_sums(total, shared);
  if (threadIdx.y == 0 && column < columns) out[column] = from_sum<T>(total[0]);
}
