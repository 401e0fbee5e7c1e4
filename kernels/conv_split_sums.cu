// The sums of products whose depth was divided among blocks: z = sum over splits of partial, and
// y = act(z + bias), or total += z.
//
// One thread a result; it adds the splits in their order, so that the bits are the same every
// time. It reads 4 * splits bytes and writes one value for each result, at the memory's rate.
//
// Compile-time constants: DTYPE_F16 | DTYPE_BF16 | DTYPE_F32, ACT. Any launch of blocks in one
// dimension will do.

#define INDEX_64
#include "common.cuh"
#include "activations.cuh"

#if defined(DTYPE_F16)
typedef __half T;
#elif defined(DTYPE_BF16)
typedef __nv_bfloat16 T;
#else
typedef float T;
#endif

// total, if it is not null, is added to in the place of writing y. bias, if it is not null, has a
// value for each of the `columns` that a row has.
extern "C" __global__ void __launch_bounds__(256)
    KERNEL(const float* __restrict__ partial, const T* __restrict__ bias, T* __restrict__ y,
           float* __restrict__ total, const Index results, const int splits, const int columns) {
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < results; e += threads) {
    float z = 0;
    for (int split = 0; split < splits; split++) z += partial[split * results + e];
    if (total != nullptr) {
      total[e] += z;
      continue;
    }
    if (bias != nullptr) z += to_sum(bias[e % columns]);
    y[e] = from_sum<T>(activate(z));
  }
}
