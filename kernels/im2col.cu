// A convolution as a matrix product that somebody else computes: the copies around cuBLAS.
//
// Every output position sees a window of the input. Written out as a row (im2col), the windows
// of all positions make a matrix X of positions x (taps * channels), and with the weights as a
// matrix W of (taps * channels) x out_channels the three passes are products:
//
//   forward          Y  = X W            im2col before it, bias and activation behind it
//   input gradient   dX = dY W^T         and col2im: every input adds up its copies in X
//   weight gradient  dW = X^T dY         im2col before it
//
// The three kernels here are what is not a product. col2im is usually told as a scatter: every
// element of X is added to its input with an atomic. Here it is a gather: the thread of an input
// element looks up the positions that saw it, tap by tap. No atomics, and always the same order
// of additions, so the same bits every time.
//
// How fast: X is the input taps times over. A 3x3 layer of 64 channels, 64 filters, float32,
// writes and reads 9 * 64 * 4 = 2.3 kB a position for 74 kFLOP: 16 FLOP a byte, where a GPU with
// 60 TFLOP/s and 3.3 TB/s needs 18 to keep its arithmetic busy. So parts of the batch are made
// small enough for X to stay in the L2 cache, if they can be. The floor of im2col itself is its
// bytes over the bandwidth; that is why a thread decodes its position once and then walks the
// taps, with neighbouring threads at neighbouring addresses (channels, or positions where
// channels come first), 16 bytes at a time where they are aligned.
//
// What conv_implicit_gemm.cu does better: X never exists in memory.
//
// Compile-time constants: CHANNELS_FIRST, VEC (channels a thread moves at once; 1 if
// CHANNELS_FIRST), INDEX_64, DTYPE_*; EPILOGUE: only the last kernel, with ACT. Image strides
// are any; matrices are dense: X is (positions, groups, taps, channels of the group), or, channels
// first, (example, channel, tap, position) with the strides of example and of (channel, tap)
// given. Any launch of blocks in one dimension will do.

#include "common.cuh"
#include "vector.cuh"
#include "activations.cuh"

// Sizes and options by axis (depth, rows, columns), and where the elements of the image lie.
struct Shape {
  int in[3], out[3], kernel[3], stride[3], dilation[3], before[3];
  int channels, groups;
  Index image[5];  // strides of example, depth, row, column, channel
};

// Unrolled, these loops gain nothing and spill registers: each tap is a load.
#define EACH_TAP(s)                                                                              \
  _Pragma("unroll 1") for (int o = 0, tap = 0; o < (s).kernel[0]; o++)                           \
    _Pragma("unroll 1") for (int p = 0; p < (s).kernel[1]; p++)                                  \
      _Pragma("unroll 1") for (int q = 0; q < (s).kernel[2]; q++, tap++)

// Which example, channel and position within [0, count) a thread's element number e is.
struct Place {
  int n, channel;
  Index position;
  __device__ __forceinline__ Place(Index e, int channels, Index count) {
    if (CHANNELS_FIRST) {
      position = e % count, e /= count;
      channel = int(e % channels), e /= channels;
    } else {
      const int packs = channels / VEC;
      channel = int(e % packs) * VEC, e /= packs;
      position = e % count, e /= count;
    }
    n = int(e);
  }
};

// A position counted along rows, slice by slice, as slice, row and column.
__device__ __forceinline__ void split(Index position, const int* size, int& i, int& j, int& l) {
  l = int(position % size[2]), position /= size[2];
  j = int(position % size[1]), i = int(position / size[1]);
}

// The element of X at a place and tap; count positions of each example are in it.
__device__ __forceinline__ Index column_at(const Shape& s, const Place& at, Index position, int tap,
                                           Index count, Index per_example, Index per_row) {
  const int taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  if (CHANNELS_FIRST)
    return at.n * per_example + (Index(at.channel) * taps + tap) * per_row + position;
  const int in_group = s.channels / s.groups, group = at.channel / in_group;
  return (Index(at.n) * count + position) * taps * s.channels +
         (Index(group) * taps + tap) * in_group + (at.channel - group * in_group);
}

// Writes the windows of the positions start ... start + count - 1 of n examples.
template <typename T>
__device__ __forceinline__ void im2col(const T* x, T* columns, const Shape& s, int n, Index start,
                                       Index count, Index per_example, Index per_row) {
  const Index work = Index(n) * count * (s.channels / VEC);
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < work; e += threads) {
    const Place at(e, s.channels, count);
    const Index place = start + at.position;
    int i, j, l;
    split(place, s.out, i, j, l);
    const T* from = x + at.n * s.image[0] + at.channel * s.image[4];
    EACH_TAP(s) {
      const int u = i * s.stride[0] + o * s.dilation[0] - s.before[0];
      const int r = j * s.stride[1] + p * s.dilation[1] - s.before[1];
      const int c = l * s.stride[2] + q * s.dilation[2] - s.before[2];
      Vector<T, VEC> values;
      for (int v = 0; v < VEC; v++) values.v[v] = from_sum<T>(typename Sum<T>::type(0));
      if (u >= 0 && u < s.in[0] && r >= 0 && r < s.in[1] && c >= 0 && c < s.in[2])
        values = load_vector<VEC>(from + u * s.image[1] + r * s.image[2] + c * s.image[3]);
      store_vector<VEC>(columns + column_at(s, at, at.position, tap, count, per_example, per_row),
                      values);
    }
  }
}

// The output position along an axis whose tap meets input u, or a number below 0.
__device__ __forceinline__ int meets(const Shape& s, int axis, int u, int tap) {
  int i = u + s.before[axis] - tap * s.dilation[axis];
  if (s.stride[axis] > 1) {
    const int multiple = i / s.stride[axis];
    if (multiple * s.stride[axis] != i) return -1;
    i = multiple;
  }
  return i < s.out[axis] ? i : -1;
}

// Adds up, for every input element of n examples, what the positions start ... start + count - 1
// hold of it. Where an example is divided, sums (dense, in the order of threads) carry the rest
// from part to part; with all of it in one part (first and last) they are not there.
template <typename T>
__device__ __forceinline__ void col2im(const T* columns, T* dx, typename Sum<T>::type* sums,
                                       const Shape& s, int n, Index start, Index count,
                                       Index per_example, Index per_row, int first, int last) {
  typedef typename Sum<T>::type S;
  const Index inputs = Index(s.in[0]) * s.in[1] * s.in[2];
  const Index work = Index(n) * inputs * (s.channels / VEC);
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < work; e += threads) {
    const Place at(e, s.channels, inputs);
    int u, r, c;
    split(at.position, s.in, u, r, c);
    S total[VEC];
    for (int v = 0; v < VEC; v++) total[v] = first ? S(0) : sums[e * VEC + v];
    EACH_TAP(s) {
      const int i = meets(s, 0, u, o), j = meets(s, 1, r, p), l = meets(s, 2, c, q);
      if (i < 0 || j < 0 || l < 0) continue;
      const Index position = (Index(i) * s.out[1] + j) * s.out[2] + l - start;
      if (position < 0 || position >= count) continue;
      const Vector<T, VEC> values = load_vector<VEC>(
          columns + column_at(s, at, position, tap, count, per_example, per_row));
      for (int v = 0; v < VEC; v++) total[v] += to_sum(values.v[v]);
    }
    if (!last) {
      for (int v = 0; v < VEC; v++) sums[e * VEC + v] = total[v];
      continue;
    }
    Vector<T, VEC> values;
    for (int v = 0; v < VEC; v++) values.v[v] = from_sum<T>(total[v]);
    store_vector<VEC>(dx + at.n * s.image[0] + u * s.image[1] + r * s.image[2] + c * s.image[3] +
                        at.channel * s.image[4],
                    values);
  }
}

// y = act(z + b): z dense in the order of threads, y the image, of positions start ... in each of
// n examples; y may be z.
template <typename T>
__device__ __forceinline__ void bias_activation(const T* z, const T* b, T* y, const Shape& s,
                                                int n, Index start, Index count, int in_place) {
  typedef typename Sum<T>::type S;
  const Index work = Index(n) * count * s.channels;
  const Index threads = Index(gridDim.x) * blockDim.x;
  for (Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x; e < work; e += threads) {
    S value = to_sum(z[e]);
    if (in_place) {
      const int channel = int((CHANNELS_FIRST ? e / count : e) % s.channels);
      if (b != nullptr) value += to_sum(b[channel]);
      y[e] = from_sum<T>(activate(value));
      continue;
    }
    const Place at(e, s.channels, count);
    const Index place = start + at.position;
    int i, j, l;
    split(place, s.out, i, j, l);
    if (b != nullptr) value += to_sum(b[at.channel]);
    y[at.n * s.image[0] + i * s.image[1] + j * s.image[2] + l * s.image[3] +
      at.channel * s.image[4]] = from_sum<T>(activate(value));
  }
}

#ifdef EPILOGUE
#define KERNELS(T, TYPE)                                                                         \
  extern "C" __global__ void __launch_bounds__(256, 4) conv_bias_activation_##TYPE(              \
      const T* z, const T* b, T* y, const Shape shape, int n, Index start, Index count,          \
      int in_place) {                                                                            \
    bias_activation<T>(z, b, y, shape, n, start, count, in_place);                               \
  }
#else
#define KERNELS(T, TYPE)                                                                         \
  extern "C" __global__ void __launch_bounds__(256, 4) conv_im2col_##TYPE(                       \
      const T* __restrict__ x, T* __restrict__ columns, const Shape shape, int n, Index start,   \
      Index count, Index per_example, Index per_row) {                                           \
    im2col<T>(x, columns, shape, n, start, count, per_example, per_row);                         \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 4) conv_col2im_##TYPE(                       \
      const T* __restrict__ columns, T* __restrict__ dx, Sum<T>::type* __restrict__ sums,        \
      const Shape shape, int n, Index start, Index count, Index per_example, Index per_row,      \
      int first, int last) {                                                                     \
    col2im<T>(columns, dx, sums, shape, n, start, count, per_example, per_row, first, last);     \
  }
#endif

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
