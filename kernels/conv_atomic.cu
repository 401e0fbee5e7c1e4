// A 2-D convolution and its gradients, one thread for one output element.
//
// This is the page to open beside the loops (gpuconv/engines/naive.py). The loops over example
// n, row i, column j and output channel c become threads; what is inside the loops stays:
//
//   forward    z[n,i,j,c] = b[c] + sum over the window of x[n,r,s,k] * w[p,q,k,c];  y = act(z)
//   backward   d = dy[n,i,j,c] * act'(z[n,i,j,c]), and for the window of (n,i,j,c)
//                 dx[n,r,s,k] += d * w[p,q,k,c]
//                 dw[p,q,k,c] += d * x[n,r,s,k]
//                 db[c]       += d
//
// where tap (p,q) reads row r = i*SH + p*DH - top and column s = j*SW + q*DW - left. Taps that
// fall outside the input meet a zero and are skipped: no padded copy of x is ever made.
//
// Forward threads write one element each. Backward threads meet: windows overlap in dx, every
// position adds into the same dw, so each addition is atomic. Atomics arrive in any order and
// rounding depends on it, which is why this engine does not promise the same bits twice.
//
// How fast: every multiply-add of the backward is two atomics in memory, thousands of them into
// the same few weights. The engines beside this one exist to avoid exactly that.
//
// Compile-time constants: KH KW (kernel), SH SW (stride), DH DW (dilation), CHANNELS_FIRST (0:
// NHWC with HWIO weights; 1: NCHW with OIHW), DTYPE_F32 | DTYPE_F64 | DTYPE_F16, INDEX_64, ACT.
// All tensors are contiguous. Any launch of blocks in one dimension will do.

#include "common.cuh"
#include "activations.cuh"

// Sizes of x (H, W, C), of y (OH, OW, O), zeros above and left of x, channels of a group.
#define SIZES                                                                                    \
  const int N, const int H, const int W, const int C, const int OH, const int OW, const int O,   \
      const int top, const int left, const int groups

__device__ __forceinline__ Index x_at(Index n, Index r, Index s, Index k, Index H, Index W,
                                      Index C) {
  return CHANNELS_FIRST ? ((n * C + k) * H + r) * W + s : ((n * H + r) * W + s) * C + k;
}

// k counts the input channels of the group, c all output channels.
__device__ __forceinline__ Index w_at(Index p, Index q, Index k, Index c, Index in_group,
                                      Index O) {
  return CHANNELS_FIRST ? ((c * in_group + k) * KH + p) * KW + q
                        : ((p * KW + q) * in_group + k) * O + c;
}

// The output element number e, in the order of memory.
struct Output {
  int n, i, j, c;
  __device__ __forceinline__ Output(Index e, int OH, int OW, int O) {
    if (CHANNELS_FIRST) {
      j = int(e % OW), e /= OW;
      i = int(e % OH), e /= OH;
      c = int(e % O), e /= O;
    } else {
      c = int(e % O), e /= O;
      j = int(e % OW), e /= OW;
      i = int(e % OH), e /= OH;
    }
    n = int(e);
  }
};

template <typename T>
__device__ void forward(const T* x, const T* w, const T* b, T* y, SIZES) {
  typedef typename Sum<T>::type S;
  const int in_group = C / groups, out_group = O / groups;
  const Index elements = Index(N) * OH * OW * O;
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < elements; e += threads) {
    const Output o(e, OH, OW, O);
    const int first = o.c / out_group * in_group;  // the group's first input channel
    S z = S(0);
    for (int p = 0; p < KH; p++) {
      const int r = o.i * SH + p * DH - top;
      if (r < 0 || r >= H) continue;
      for (int q = 0; q < KW; q++) {
        const int s = o.j * SW + q * DW - left;
        if (s < 0 || s >= W) continue;
        for (int k = 0; k < in_group; k++)
          z += to_sum(x[x_at(o.n, r, s, first + k, H, W, C)]) *
               to_sum(w[w_at(p, q, k, o.c, in_group, O)]);
      }
    }
    if (b != nullptr) z += to_sum(b[o.c]);
    y[e] = from_sum<T>(activate(z));
  }
}

// dx, dw and db hold zeros before; a null pointer is a gradient that nobody asked for. y is null
// where there is no activation.
template <typename T>
__device__ void backward(const T* dy, const T* y, const T* x, const T* w,
                         typename Sum<T>::type* dx, typename Sum<T>::type* dw,
                         typename Sum<T>::type* db, SIZES) {
  typedef typename Sum<T>::type S;
  const int in_group = C / groups, out_group = O / groups;
  const Index elements = Index(N) * OH * OW * O;
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < elements; e += threads) {
    const Output o(e, OH, OW, O);
    const int first = o.c / out_group * in_group;
    S d = to_sum(dy[e]);
    if (y != nullptr) d *= activation_grad(to_sum(y[e]));
    if (db != nullptr) atomicAdd(&db[o.c], d);
    if (dx == nullptr && dw == nullptr) continue;
    for (int p = 0; p < KH; p++) {
      const int r = o.i * SH + p * DH - top;
      if (r < 0 || r >= H) continue;
      for (int q = 0; q < KW; q++) {
        const int s = o.j * SW + q * DW - left;
        if (s < 0 || s >= W) continue;
        // The atomics take the time: unrolled, this loop gains nothing and spills registers.
#pragma unroll 1
        for (int k = 0; k < in_group; k++) {
          const Index at_x = x_at(o.n, r, s, first + k, H, W, C);
          const Index at_w = w_at(p, q, k, o.c, in_group, O);
          if (dx != nullptr) atomicAdd(&dx[at_x], d * to_sum(w[at_w]));
          if (dw != nullptr) atomicAdd(&dw[at_w], d * to_sum(x[at_x]));
        }
      }
    }
  }
}

#define INSTANTIATE(T, NAME)                                                                     \
  extern "C" __global__ void __launch_bounds__(256) conv2d_forward_atomic_##NAME(                \
      const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ b,                 \
      T* __restrict__ y, SIZES) {                                                                \
    forward<T>(x, w, b, y, N, H, W, C, OH, OW, O, top, left, groups);                            \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) conv2d_backward_atomic_##NAME(               \
      const T* __restrict__ dy, const T* __restrict__ y, const T* __restrict__ x,                \
      const T* __restrict__ w, Sum<T>::type* dx, Sum<T>::type* dw, Sum<T>::type* db, SIZES) {    \
    backward<T>(dy, y, x, w, dx, dw, db, N, H, W, C, OH, OW, O, top, left, groups);              \
  }

#ifdef DTYPE_F32
INSTANTIATE(float, f32)
#endif
#ifdef DTYPE_F64
INSTANTIATE(double, f64)
#endif
#ifdef DTYPE_F16
INSTANTIATE(__half, f16)
#endif
