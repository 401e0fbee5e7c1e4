// A convolution over 1 to 3 axes and its gradients, one thread for one output element.
//
// This is the page to open beside the loops (gpuconv/engines/naive.py). The loops over example
// n, position (h,i,j) and output channel c become threads; what is inside the loops stays:
//
//   forward    z[n,h,i,j,c] = b[c] + sum over the window of x[n,u,r,s,k] * w[o,p,q,k,c];
//              y = act(z)
//   backward   d = dy[n,h,i,j,c] * act'(z[n,h,i,j,c]), and for the window of (n,h,i,j,c)
//                 dx[n,u,r,s,k] += d * w[o,p,q,k,c]
//                 dw[o,p,q,k,c] += d * x[n,u,r,s,k]
//                 db[c]         += d
//
// where tap (o,p,q) reads slice u = h*SD + o*DD - front, row r = i*SH + p*DH - top and column
// s = j*SW + q*DW - left. In two dimensions there is one slice and one tap across slices, in one
// dimension one row as well: their loops run once and the compiler drops them. Taps that fall
// outside the input meet a zero and are skipped: no padded copy of x is ever made.
//
// Forward threads write one element each. Backward threads meet: windows overlap in dx, every
// position adds into the same dw, so each addition is atomic. Atomics arrive in any order and
// rounding depends on it, which is why this engine does not promise the same bits twice.
//
// How fast: every multiply-add of the backward is two atomics in memory, thousands of them into
// the same few weights. The engines beside this one exist to avoid exactly that.
//
// Compile-time constants: NDIM (1, 2 or 3 axes); KD KH KW (kernel), SD SH SW (stride), DD DH DW
// (dilation), 1 for axes that are not there; CHANNELS_FIRST (0: NHWC with HWIO weights; 1: NCHW
// with OIHW), DTYPE_F32 | DTYPE_F64 | DTYPE_F16 | DTYPE_BF16, INDEX_64, ACT. All tensors are
// contiguous. Any launch of blocks in one dimension will do.

#include "common.cuh"
#include "activations.cuh"

// Sizes of x (D, H, W, C), of y (OD, OH, OW, O), zeros before x on each axis, channel groups.
#define SIZES                                                                                    \
  const int N, const int D, const int H, const int W, const int C, const int OD, const int OH,   \
      const int OW, const int O, const int front, const int top, const int left, const int groups
// The same as arguments, with axes that are not there as constants.
#define SIZES_OF_NDIM                                                                            \
  N, NDIM > 2 ? D : 1, NDIM > 1 ? H : 1, W, C, NDIM > 2 ? OD : 1, NDIM > 1 ? OH : 1, OW, O,      \
      NDIM > 2 ? front : 0, NDIM > 1 ? top : 0, left, groups

__device__ __forceinline__ Index x_at(Index n, Index u, Index r, Index s, Index k, Index D,
                                      Index H, Index W, Index C) {
  return CHANNELS_FIRST ? (((n * C + k) * D + u) * H + r) * W + s
                        : (((n * D + u) * H + r) * W + s) * C + k;
}

// k counts the input channels of the group, c all output channels.
__device__ __forceinline__ Index w_at(Index o, Index p, Index q, Index k, Index c,
                                      Index in_group, Index O) {
  return CHANNELS_FIRST ? (((c * in_group + k) * KD + o) * KH + p) * KW + q
                        : (((o * KH + p) * KW + q) * in_group + k) * O + c;
}

// The output element number e, in the order of memory.
struct Output {
  int n, h, i, j, c;
  __device__ __forceinline__ Output(Index e, int OD, int OH, int OW, int O) {
    if (!CHANNELS_FIRST) c = int(e % O), e /= O;
    j = int(e % OW), e /= OW;
    i = int(e % OH), e /= OH;
    h = int(e % OD), e /= OD;
    if (CHANNELS_FIRST) c = int(e % O), e /= O;
    n = int(e);
  }
};

template <typename T>
__device__ __forceinline__ void forward(const T* x, const T* w, const T* b, T* y, SIZES) {
  typedef typename Sum<T>::type S;
  const int in_group = C / groups, out_group = O / groups;
  const Index elements = Index(N) * OD * OH * OW * O;
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < elements; e += threads) {
    const Output at(e, OD, OH, OW, O);
    const int first = at.c / out_group * in_group;  // the group's first input channel
    S z = S(0);
    for (int o = 0; o < KD; o++) {
      const int u = at.h * SD + o * DD - front;
      if (u < 0 || u >= D) continue;
      for (int p = 0; p < KH; p++) {
        const int r = at.i * SH + p * DH - top;
        if (r < 0 || r >= H) continue;
        for (int q = 0; q < KW; q++) {
          const int s = at.j * SW + q * DW - left;
          if (s < 0 || s >= W) continue;
          for (int k = 0; k < in_group; k++)
            z += to_sum(x[x_at(at.n, u, r, s, first + k, D, H, W, C)]) *
                 to_sum(w[w_at(o, p, q, k, at.c, in_group, O)]);
        }
      }
    }
    if (b != nullptr) z += to_sum(b[at.c]);
    y[e] = from_sum<T>(activate(z));
  }
}

// dx, dw and db hold zeros before; a null pointer is a gradient that nobody asked for. y is null
// where there is no activation.
template <typename T>
__device__ __forceinline__ void backward(const T* dy, const T* y, const T* x, const T* w,
                                         typename Sum<T>::type* dx, typename Sum<T>::type* dw,
                                         typename Sum<T>::type* db, SIZES) {
  typedef typename Sum<T>::type S;
  const int in_group = C / groups, out_group = O / groups;
  const Index elements = Index(N) * OD * OH * OW * O;
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < elements; e += threads) {
    const Output at(e, OD, OH, OW, O);
    const int first = at.c / out_group * in_group;
    S d = to_sum(dy[e]);
    if (y != nullptr) d *= activation_grad(to_sum(y[e]));
    if (db != nullptr) atomicAdd(&db[at.c], d);
    if (dx == nullptr && dw == nullptr) continue;
    for (int o = 0; o < KD; o++) {
      const int u = at.h * SD + o * DD - front;
      if (u < 0 || u >= D) continue;
      for (int p = 0; p < KH; p++) {
        const int r = at.i * SH + p * DH - top;
        if (r < 0 || r >= H) continue;
        for (int q = 0; q < KW; q++) {
          const int s = at.j * SW + q * DW - left;
          if (s < 0 || s >= W) continue;
          // The atomics take the time: unrolled, this loop gains nothing and spills registers.
#pragma unroll 1
          for (int k = 0; k < in_group; k++) {
            const Index at_x = x_at(at.n, u, r, s, first + k, D, H, W, C);
            const Index at_w = w_at(o, p, q, k, at.c, in_group, O);
            if (dx != nullptr) atomicAdd(&dx[at_x], d * to_sum(w[at_w]));
            if (dw != nullptr) atomicAdd(&dw[at_w], d * to_sum(x[at_x]));
          }
        }
      }
    }
  }
}

#define KERNELS(T, FORWARD, BACKWARD)                                                            \
  extern "C" __global__ void __launch_bounds__(256) FORWARD(                                     \
      const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ b,                 \
      T* __restrict__ y, SIZES) {                                                                \
    forward<T>(x, w, b, y, SIZES_OF_NDIM);                                                       \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) BACKWARD(                                    \
      const T* __restrict__ dy, const T* __restrict__ y, const T* __restrict__ x,                \
      const T* __restrict__ w, Sum<T>::type* dx, Sum<T>::type* dw, Sum<T>::type* db, SIZES) {    \
    backward<T>(dy, y, x, w, dx, dw, db, SIZES_OF_NDIM);                                         \
  }

// Names that speak in a profiler: conv2d_forward_atomic_f32.
#define NAMED(ND, T, TYPE)                                                                       \
  KERNELS(T, conv##ND##d_forward_atomic_##TYPE, conv##ND##d_backward_atomic_##TYPE)
#define INSTANTIATE(ND, T, TYPE) NAMED(ND, T, TYPE)

#ifdef DTYPE_F32
INSTANTIATE(NDIM, float, f32)
#endif
#ifdef DTYPE_F64
INSTANTIATE(NDIM, double, f64)
#endif
#ifdef DTYPE_F16
INSTANTIATE(NDIM, __half, f16)
#endif
#ifdef DTYPE_BF16
INSTANTIATE(NDIM, __nv_bfloat16, bf16)
#endif
