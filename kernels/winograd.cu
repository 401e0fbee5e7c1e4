// Winograd's minimal filtering F(m x m, 3 x 3): fewer multiplications for 3x3 kernels of stride 1.
//
// The definition spends 9 multiply-adds on an output and a pair of channels. Nine products of an
// output and its neighbours share work, though: the m x m outputs of a tile depend on n x n
// inputs, n = m + 2, and are known from the n*n products of one transformed tile with the
// transformed filter (Winograd 1980; Lavin and Gray 2016):
//
//   forward       Y = A' [ sum over channels of (G g G') * (B' d B) ] A      + bias, activation
//   input grad    the same, of dy and the filter turned round and transposed
//   weight grad   dg = G' [ sum over tiles of (A dy A') * (B' d B) ] G
//
// where * multiplies element by element. Written factor by factor, each sum is a product of
// matrices: n*n of them, which cuBLAS multiplies in one batched call. What is left is here: the
// transforms on either side of it.
//
//   filters       w  -> U[factor][in][out]          once a call: weights may change in place
//   input         x  -> V[factor][tile][in]         tiles of n x n, m apart: they overlap
//   gradient      dy -> V[factor][tile][out]        tiles of m x m, side by side
//   output        V U -> y, with bias and activation
//   filter_grad   V' V -> dw
//
// Each thread transforms one tile of one channel in registers: a column at a time on the way in,
// a row at a time on the way out, so that n*n values and two lines are alive. The entries of A, B
// and G are compile-time constants, made from exact rationals by gpuconv/engines/toom_cook.py:
// the loops unroll, zeros vanish, and what remains are additions and a few multiplications.
//
// How fast, for a tile and float32: the product takes 2*n*n*C*O FLOP where the definition has
// 18*m*m*C*O, which for m = 4 is 4 times fewer, for m = 6 5.06 times. The transforms move
// (m*m + n*n)*4 bytes for each of C + O channels and the product n*n*4 more: for m = 4, 352
// bytes. So the floor is
//   max(72*C*O / FLOP rate, 144*(C + O) / bandwidth) + 208*(C + O) / bandwidth
// a tile. At 60 TFLOP/s and 3.3 TB/s the products weigh as much as all the bytes at C = O = 180,
// and from some 45 channels on the whole is under the definition's floor, 288*C*O / FLOP rate: so
// these layers are bound by bytes, and a larger tile gains twice.
//
// Rounding: sums of some large terms cancel, which costs about ten times the definition's error
// (float16 and bfloat16 are transformed and multiplied in float32). A NaN or an infinity, of
// the data or from an overflow, would spread over its tile; a thread that finds one in its sums
// computes its outputs anew by the definition, so that they go where that sends them. No launch
// depends on data that the host would have to read.
//
// Coalescing: `run` says how work is dealt to neighbouring threads. run == 1: they hold
// neighbouring channels (NHWC); run == all tiles: neighbouring tiles (NCHW); between, run tiles of
// each channel, for where one side is read channel by channel and the other written tile by tile.
//
// Compile-time constants: TILE (m), TABLE_A, TABLE_BT, TABLE_G, DTYPE_*, INDEX_64, and with
// WITH_OUTPUT, which compiles the output's transform instead of the others, ACT. Arrays are given
// with their strides, in elements: any view will do. Factors are dense:
// [factor][group][segment][tile or channel][channel or tile].

#include "common.cuh"
#include "activations.cuh"

constexpr int TAPS = 3;
constexpr int WINDOW = TILE + TAPS - 1;
// Registers of a tile; 16-bit values are loaded in some more.
#ifdef DTYPE_F32
constexpr int TILE_REGISTERS = WINDOW * WINDOW;
#else
constexpr int TILE_REGISTERS = WINDOW * WINDOW * 2;
#endif
// Blocks that an SM is to hold at least: a thread may then have 64, 80, 128 or 255 registers. Each
// thread has dozens of loads under way, so few warps keep the memory busy.
constexpr int RESIDENT =
    TILE_REGISTERS <= 32 ? 4 : TILE_REGISTERS <= 36 ? 3 : TILE_REGISTERS <= 72 ? 2 : 1;
#define BOUNDS __launch_bounds__(256, RESIDENT)

// The matrices, and (AT, GT) their transposes; B is given transposed.
__constant__ constexpr double ENTRIES_A[WINDOW][TILE] = TABLE_A;
__constant__ constexpr double ENTRIES_BT[WINDOW][WINDOW] = TABLE_BT;
__constant__ constexpr double ENTRIES_G[WINDOW][TAPS] = TABLE_G;
#define MATRIX(NAME, ENTRY)                                                                      \
  struct NAME {                                                                                  \
    __device__ static constexpr double at(int i, int j) { return ENTRY; }                        \
  };
MATRIX(A, ENTRIES_A[i][j])
MATRIX(AT, ENTRIES_A[j][i])
MATRIX(BT, ENTRIES_BT[i][j])
MATRIX(G, ENTRIES_G[i][j])
MATRIX(GT, ENTRIES_G[j][i])

// out = Matrix in
template <typename Matrix, int ROWS, int COLUMNS, typename S>
__device__ __forceinline__ void multiply(const S (&in)[COLUMNS], S (&out)[ROWS]) {
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    S sum = S(0);
    bool begun = false;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const S m = S(Matrix::at(i, j));
      if (m == S(0)) continue;
      sum = begun ? sum + m * in[j] : m * in[j];
      begun = true;
    }
    out[i] = sum;
  }
}

// Two axes of work in one number: `run` of a next to each other, then all of b, then the next run.
struct Place {
  Index a, b;
  __device__ __forceinline__ Place(Index e, Index run, Index count_of_b) {
    const Index low = e % run;
    e /= run;
    b = e % count_of_b;
    a = e / count_of_b * run + low;
  }
};

// A tile by its number, over all images.
struct Tile {
  Index n;
  int row, column;  // of its first output
  __device__ __forceinline__ Tile(Index number, int tile_rows, int tile_columns) {
    column = int(number % tile_columns) * TILE;
    number /= tile_columns;
    row = int(number % tile_rows) * TILE;
    n = number / tile_rows;
  }
};

// An image batch, or an array of weights: steps along its axes, in elements.
struct Steps {
  Index n, row, column, channel;
};
struct FilterSteps {
  Index row, column, in, out, group;
};

// One factor of everything: where the value of a tile and a channel lies.
struct Factors {
  Index groups, per_group, segments, per_segment;  // channels of a group, tiles of a segment
  bool by_channel;                                 // channels are the outer of the two axes
  __device__ __forceinline__ Index size() const {
    return groups * per_group * segments * per_segment;
  }
  __device__ __forceinline__ Index at(Index tile, Index channel) const {
    const Index g = channel / per_group, c = channel % per_group;
    const Index s = tile / per_segment, t = tile % per_segment;
    return (g * segments + s) * per_segment * per_group +
           (by_channel ? c * per_segment + t : t * per_group + c);
  }
};

#ifndef WITH_OUTPUT

// U = G w G'. Threads are dealt over `in` (a) and all `out` (b).
template <typename T>
__device__ __forceinline__ void filters(const T* w, typename Sum<T>::type* u, Index inputs,
                                        Index outputs, Index groups, FilterSteps step,
                                        bool out_outer, Index run) {
  typedef typename Sum<T>::type S;
  const Index out_group = outputs / groups, size = inputs * outputs;
  const Place at(Index(blockIdx.x) * blockDim.x + threadIdx.x, run, outputs);
  if (at.a >= inputs) return;
  const Index g = at.b / out_group, o = at.b % out_group;
  const T* from = w + g * step.group + at.a * step.in + o * step.out;
  S half[WINDOW][TAPS];
#pragma unroll
  for (int q = 0; q < TAPS; q++) {
    S line[TAPS], out[WINDOW];
#pragma unroll
    for (int p = 0; p < TAPS; p++) line[p] = to_sum(from[p * step.row + q * step.column]);
    multiply<G>(line, out);
#pragma unroll
    for (int i = 0; i < WINDOW; i++) half[i][q] = out[i];
  }
  S* to = u + g * inputs * out_group +
          (out_outer ? o * inputs + at.a : at.a * out_group + o);
#pragma unroll
  for (int i = 0; i < WINDOW; i++) {
    S out[WINDOW];
    multiply<G>(half[i], out);
#pragma unroll
    for (int j = 0; j < WINDOW; j++) to[(i * WINDOW + j) * size] = out[j];
  }
}

// V = Matrix d Matrix' for tiles of EXTENT x EXTENT cells; outside the image, and behind the
// last tile, are zeros.
template <typename Matrix, int EXTENT, typename T>
__device__ __forceinline__ void factors(const T* x, typename Sum<T>::type* v, int H, int W,
                                        int tile_rows, int tile_columns, int top, int left,
                                        Index first, Index count, Steps step, Factors place,
                                        Index run) {
  typedef typename Sum<T>::type S;
  const Index channels = place.groups * place.per_group, size = place.size();
  const Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const Place at(e, run, channels);
  const bool inside = at.a < count;
  const Tile tile(first + at.a, tile_rows, tile_columns);
  const int row = tile.row - top, column = tile.column - left;
  const T* from = x + tile.n * step.n + at.b * step.channel;
  S half[WINDOW][EXTENT];
#pragma unroll
  for (int j = 0; j < EXTENT; j++) {
    S line[EXTENT], out[WINDOW];
    const bool in_columns = inside && column + j >= 0 && column + j < W;
#pragma unroll
    for (int i = 0; i < EXTENT; i++)
      line[i] = in_columns && row + i >= 0 && row + i < H
                    ? to_sum(from[(row + i) * step.row + (column + j) * step.column])
                    : S(0);
    multiply<Matrix>(line, out);
#pragma unroll
    for (int i = 0; i < WINDOW; i++) half[i][j] = out[i];
  }
  S* to = v + place.at(at.a, at.b);
#pragma unroll
  for (int i = 0; i < WINDOW; i++) {
    S out[WINDOW];
    multiply<Matrix>(half[i], out);
#pragma unroll
    for (int j = 0; j < WINDOW; j++) to[(i * WINDOW + j) * size] = out[j];
  }
}

// The gradient of one tap by the definition, over the whole batch. Once NaN, it stays so.
template <typename T>
__device__ __forceinline__ typename Sum<T>::type tap_grad(const T* x, const T* dz, int batch, int H,
                                                       int W, int OH, int OW, int row, int column,
                                                       Steps x_step, Steps dz_step) {
  typedef typename Sum<T>::type S;
  S sum = S(0);
#pragma unroll 1
  for (int n = 0; n < batch; n++)
#pragma unroll 1
    for (int i = 0; i < OH; i++) {
      if (row + i < 0 || row + i >= H) continue;
#pragma unroll 1
      for (int j = 0; j < OW; j++) {
        if (column + j < 0 || column + j >= W) continue;
        sum += to_sum(dz[n * dz_step.n + i * dz_step.row + j * dz_step.column]) *
               to_sum(x[n * x_step.n + (row + i) * x_step.row + (column + j) * x_step.column]);
      }
      if (sum != sum) return sum;
    }
  return sum;
}

// dw = G' (sums over segments) G, added to `total` unless `begin`; with `end`, finished into dw.
template <typename T>
__device__ __forceinline__ void filter_grad(
    const typename Sum<T>::type* products, typename Sum<T>::type* total, const T* x, const T* dz,
    T* dw, int batch, int H, int W, int OH, int OW, int top, int left, Index inputs, Index outputs,
    Index groups, Index segments, Steps x_step, Steps dz_step, FilterSteps step, bool begin,
    bool end) {
  typedef typename Sum<T>::type S;
  const Index out_group = outputs / groups, work = inputs * outputs;
  const Index part = inputs * out_group, size = work * segments;
  const Index e = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= work) return;
  const Index c = e / outputs, g = e % outputs / out_group, o = e % out_group;
  const S* from = products + g * segments * part + c * out_group + o;
  S half[TAPS][WINDOW];
#pragma unroll
  for (int j = 0; j < WINDOW; j++) {
    S line[WINDOW], out[TAPS];
#pragma unroll
    for (int i = 0; i < WINDOW; i++) line[i] = from[(i * WINDOW + j) * size];
#pragma unroll 1
    for (Index s = 1; s < segments; s++) {
#pragma unroll
      for (int i = 0; i < WINDOW; i++) line[i] += from[(i * WINDOW + j) * size + s * part];
    }
    multiply<GT>(line, out);
#pragma unroll
    for (int p = 0; p < TAPS; p++) half[p][j] = out[p];
  }
  T* to = dw + g * step.group + c * step.in + o * step.out;
  bool spoilt = false;
#pragma unroll
  for (int p = 0; p < TAPS; p++) {
    S out[TAPS];
    multiply<GT>(half[p], out);
#pragma unroll
    for (int q = 0; q < TAPS; q++) {
      if (!begin) out[q] += total[(p * TAPS + q) * work + e];
      if (!end) total[(p * TAPS + q) * work + e] = out[q];
      if (end) to[p * step.row + q * step.column] = from_sum<T>(out[q]);
      spoilt |= !(out[q] - out[q] == S(0));
    }
  }
  if (!end || !spoilt) return;
  const T* x_from = x + (g * inputs + c) * x_step.channel;
  const T* dz_from = dz + (g * out_group + o) * dz_step.channel;
#pragma unroll 1
  for (int p = 0; p < TAPS; p++)
#pragma unroll 1
    for (int q = 0; q < TAPS; q++)
      to[p * step.row + q * step.column] = from_sum<T>(tap_grad<T>(
          x_from, dz_from, batch, H, W, OH, OW, p - top, q - left, x_step, dz_step));
}

#else  // WITH_OUTPUT

// One output by the definition.
template <typename T>
__device__ __forceinline__ typename Sum<T>::type definition(const T* x, const T* w, int H, int W,
                                                         int row, int column, Index inputs,
                                                         Steps step, FilterSteps w_step) {
  typedef typename Sum<T>::type S;
  S sum = S(0);
#pragma unroll 1
  for (int p = 0; p < TAPS; p++) {
    if (row + p < 0 || row + p >= H) continue;
#pragma unroll 1
    for (int q = 0; q < TAPS; q++) {
      if (column + q < 0 || column + q >= W) continue;
      const T* cell = x + (row + p) * step.row + (column + q) * step.column;
      const T* tap = w + p * w_step.row + q * w_step.column;
#pragma unroll 1
      for (Index k = 0; k < inputs; k++)
        sum += to_sum(cell[k * step.channel]) * to_sum(tap[k * w_step.in]);
    }
  }
  return sum;
}

// y = act(A' products A + bias) for the tiles' outputs that are in the image.
template <typename T>
__device__ __forceinline__ void outputs(const typename Sum<T>::type* products, const T* bias, T* y,
                                        const T* x, const T* w, int H, int W, int OH, int OW,
                                        int top, int left, Index first, Index count, Index inputs,
                                        Steps step, Steps x_step, FilterSteps w_step,
                                        Factors place) {
  typedef typename Sum<T>::type S;
  const int tile_rows = (OH + TILE - 1) / TILE, tile_columns = (OW + TILE - 1) / TILE;
  const Index channels = place.groups * place.per_group, size = place.size();
  const Index run = place.by_channel ? place.per_segment : 1;
  const Place at(Index(blockIdx.x) * blockDim.x + threadIdx.x, run, channels);
  if (at.a >= count) return;
  const Tile tile(first + at.a, tile_rows, tile_columns);
  const S* from = products + place.at(at.a, at.b);
  const S b = bias == nullptr ? S(0) : to_sum(bias[at.b]);
  S half[TILE][WINDOW];
#pragma unroll
  for (int j = 0; j < WINDOW; j++) {
    S line[WINDOW], out[TILE];
#pragma unroll
    for (int i = 0; i < WINDOW; i++) line[i] = from[(i * WINDOW + j) * size];
    multiply<AT>(line, out);
#pragma unroll
    for (int i = 0; i < TILE; i++) half[i][j] = out[i];
  }
  T* to = y + tile.n * step.n + at.b * step.channel;
  bool spoilt = false;
#pragma unroll
  for (int i = 0; i < TILE; i++) {
    S out[TILE];
    multiply<AT>(half[i], out);
#pragma unroll
    for (int j = 0; j < TILE; j++) {
      spoilt |= !(out[j] - out[j] == S(0));
      if (tile.row + i < OH && tile.column + j < OW)
        to[(tile.row + i) * step.row + (tile.column + j) * step.column] =
            from_sum<T>(activate(out[j] + b));
    }
  }
  if (!spoilt) return;
  const Index g = at.b / place.per_group;
  const T* x_from = x + tile.n * x_step.n + g * inputs * x_step.channel;
  const T* w_from = w + g * w_step.group + at.b % place.per_group * w_step.out;
#pragma unroll 1
  for (int i = 0; i < TILE && tile.row + i < OH; i++)
#pragma unroll 1
    for (int j = 0; j < TILE && tile.column + j < OW; j++) {
      const int row = tile.row + i, column = tile.column + j;
      to[row * step.row + column * step.column] = from_sum<T>(activate(
          definition<T>(x_from, w_from, H, W, row - top, column - left, inputs, x_step, w_step) +
          b));
    }
}

#endif

// Arguments that several kernels have, and what they make of them.
#define IMAGE(NAME)                                                                              \
  const long long NAME##_n, const long long NAME##_row, const long long NAME##_column,           \
      const long long NAME##_channel
#define STEPS(NAME)                                                                              \
  Steps { Index(NAME##_n), Index(NAME##_row), Index(NAME##_column), Index(NAME##_channel) }
#define WEIGHTS                                                                                  \
  const long long w_row, const long long w_column, const long long w_in, const long long w_out,  \
      const long long w_group
#define FILTER_STEPS                                                                             \
  FilterSteps { Index(w_row), Index(w_column), Index(w_in), Index(w_out), Index(w_group) }
#define PLACES                                                                                   \
  const int groups, const int per_group, const int segments, const int per_segment,              \
      const int by_channel
#define FACTORS                                                                                  \
  Factors { groups, per_group, segments, per_segment, by_channel != 0 }

#define TRANSFORM(NAME, MATRIX, EXTENT, T, TYPE)                                                 \
  extern "C" __global__ void BOUNDS conv2d_winograd_##NAME##_##TYPE(             \
      const T* __restrict__ x, Sum<T>::type* __restrict__ v, const int H, const int W,           \
      const int tile_rows, const int tile_columns, const int top, const int left,                \
      const long long first, const int count, IMAGE(x), PLACES, const int run) {                 \
    factors<MATRIX, EXTENT, T>(x, v, H, W, tile_rows, tile_columns, top, left, Index(first),     \
                               count, STEPS(x), FACTORS, run);                                   \
  }

#ifndef WITH_OUTPUT
#define KERNELS(T, TYPE)                                                                         \
  extern "C" __global__ void BOUNDS conv2d_winograd_filters_##TYPE(              \
      const T* __restrict__ w, Sum<T>::type* __restrict__ u, const int inputs,                   \
      const int outputs, const int groups, WEIGHTS, const int out_outer, const int run) {        \
    filters<T>(w, u, inputs, outputs, groups, FILTER_STEPS, out_outer != 0, run);                \
  }                                                                                              \
  TRANSFORM(input, BT, WINDOW, T, TYPE)                                                          \
  TRANSFORM(gradient, A, TILE, T, TYPE)                                                          \
  extern "C" __global__ void BOUNDS conv2d_winograd_filter_grad_##TYPE(          \
      const Sum<T>::type* __restrict__ products, Sum<T>::type* __restrict__ total,               \
      const T* __restrict__ x, const T* __restrict__ dz, T* __restrict__ dw, const int batch,    \
      const int H, const int W, const int OH, const int OW, const int top, const int left,       \
      const int inputs, const int outputs, const int groups, const int segments, IMAGE(x),       \
      IMAGE(dz), WEIGHTS, const int begin_end) {                                                 \
    filter_grad<T>(products, total, x, dz, dw, batch, H, W, OH, OW, top, left, inputs, outputs,  \
                   groups, segments, STEPS(x), STEPS(dz), FILTER_STEPS, (begin_end & 1) != 0,    \
                   (begin_end & 2) != 0);                                                        \
  }
#else
#define KERNELS(T, TYPE)                                                                         \
  extern "C" __global__ void BOUNDS conv2d_winograd_output_##TYPE(               \
      const Sum<T>::type* __restrict__ products, const T* __restrict__ bias, T* __restrict__ y,  \
      const T* __restrict__ x, const T* __restrict__ w, const int H, const int W, const int OH,  \
      const int OW, const int top, const int left, const long long first, const int count,       \
      const int inputs, IMAGE(y), IMAGE(x), WEIGHTS, const int groups, const int per_group,      \
      const int tiles, const int by_channel) {                                                   \
    outputs<T>(products, bias, y, x, w, H, W, OH, OW, top, left, Index(first), count, inputs,    \
               STEPS(y), STEPS(x), FILTER_STEPS,                                                 \
               Factors{groups, per_group, 1, tiles, by_channel != 0});                           \
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
