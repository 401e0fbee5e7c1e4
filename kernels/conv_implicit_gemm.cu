// All three passes of a convolution as one tiled matrix product, whose left matrix is never made.
//
// im2col.cu writes every window out and multiplies. Here a block computes a tile of the product
// and fetches the elements of the window matrix as it needs them, from the image itself: address
// arithmetic in the place of memory. With C = A B, the passes are
//
//                    rows of A and C        inner, added up     columns of B and C
//   forward          positions of y         taps x channels     output channels
//   input gradient   positions of x         taps x outputs      input channels
//   weight gradient  taps x channels        positions of y      output channels
//
// so two things take turns as rows and inner index: a position (example, depth, row, column) and
// a tap (depth, row, column, channel). Both count like an odometer of four digits. An element of
// A is at the sum of what its position and its tap contribute: an offset in memory, and on each
// axis a coordinate, which must lie inside the image, else the element is a zero of the padding.
// Each thread fetches few rows and walks along inner: the rows' part is worked out once for a
// tile, the other by adding a step to the odometer. The input gradient of stride s falls into
// PHASES: inputs u with the same remainder of u + before by s meet the same taps, every s-th or
// so, as a convolution of stride 1 would; each phase is a product of its own, no tap is tried in
// vain.
//
// From the loops to this, by what a multiply-add costs in memory traffic:
//   1. a thread an output (conv_atomic.cu): two loads a multiply-add; 1/4 FLOP a byte.
//   2. a tile in shared memory: BM + BN elements are fetched for BM * BN multiply-adds. 128 x 128
//      in float32: 32 FLOP a byte of L2 or memory; 64 x 64: 16; 32 x 32: 8. With 60 TFLOP/s, the
//      first asks for 1.9 TB/s, which the L2 cache gives; the last for 7.5, which nothing gives.
//      The tile of an image much larger than the cache is at its floor when every byte of x, w
//      and y has moved once.
//   3. a part of the tile in registers: shared memory gives an SM 32 floats a clock, and 128
//      lanes want two each. A thread that computes 8 x 8 loads 8 + 8 for 64 multiply-adds, a
//      quarter of a float each instead of two, and neighbours share them.
//   4. double buffering: the next tile is on its way while this one is multiplied, and one barrier
//      a tile suffices. From sm_80 on it goes straight into the other buffer (cp.async, even the
//      4 bytes of each element that is turned on its way), which frees the registers it would wait
//      in; before that, and where 16-bit numbers become floats, it waits in registers.
// Floor: the larger of FLOPs over the peak and bytes over the bandwidth. What remains of it is
// the share of instructions that are no multiply-adds (some 15% with 8 x 8), and the last wave of
// blocks that does not fill the device; the choice of tiles (gpuconv/cuda/tiles.py) weighs both.
// Where the tiles are too few for all SMs (a weight gradient: small C, endless inner), inner is
// split: each block writes its part of the sum, and split_sum.cu adds parts in their order. So
// there are no atomics here and the bits are always the same.
//
// Compile-time constants: NDIM; WEIGHT_GRAD, PHASES; BM BN BK (tile), TM TN (of a thread), MIN
// (blocks that an SM should hold); for A and B: VEC (elements a load moves, 16 bytes at most) and
// BY_X (neighbouring threads along rows or columns, else along inner) and LINEAR; CHECKED_A (0
// where no window reaches into padding); VEC_C (elements a store moves); DTYPE_*, INDEX_64, ACT. All strides are any. Blocks of BM/TM * BN/TN threads; grid
// (tiles of rows and columns and groups, splits, phases).

#include "common.cuh"
#include "mma.cuh"
#include "vector.cuh"
#include "activations.cuh"

#define THREADS (BM / TM * BN / TN)
// What waits in registers, and addresses that share little, need more of them: fewer blocks. So
// do the compiler's schedules for some architectures (tiles.py knows which).
#if __CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000 || defined(DTYPE_F16) || defined(DTYPE_BF16) || \
    (WEIGHT_GRAD && VEC_A == 1)
#define HELD (MIN * 2 / 3)
#else
#define HELD MIN
#endif

// Digits, the fastest first: of a position column, row, depth, example; of a tap channel, column,
// row, depth. Coordinates: column, row, depth.
struct Product {
  int rows[4], inner[4];               // how many there are of each digit
  int step_a[4], step_b[4];            // the odometer's step of the threads that fetch A, B
  int move_rows[3], move_inner[3];     // what a digit adds to a coordinate
  int base[3], size[3];                // coordinates of all zeros; of the image
  int columns, groups, column_tiles;   // columns of a group
  int phases[3], taps[3], tap_step[3], dilation[3], before[3], stride[3], extent[3];
  Index a_rows[4], a_inner[4], a_base, a_group, a_axis[3];  // offsets in A
  Index b_inner[4], b_column, b_group, b_axis[3];           // in B
  Index c_rows[4], c_column, c_group, c_axis[3];            // in C
  Index part;                          // of inner, for each split
  Index part_size;                     // elements of C, where it is written in parts
};

// Which digits there are, in NDIM axes.
template <bool POSITION> __device__ __forceinline__ constexpr bool has(int digit) {
  return POSITION ? digit == 3 || digit < NDIM : digit <= NDIM;
}
// The digit that moves a coordinate.
template <bool POSITION> __device__ __forceinline__ constexpr int digit_of(int axis) {
  return POSITION ? axis : axis + 1;
}

template <bool POSITION> struct Odometer {
  int digit[4];

  __device__ __forceinline__ void set(Index count, const int* radix) {
#pragma unroll
    for (int d = 0; d < 3; d++) {
      digit[d] = 0;
      if (!has<POSITION>(d)) continue;
      if (!POSITION && d == NDIM) {  // the last there is
        digit[d] = int(count), count = 0;
        continue;
      }
      digit[d] = int(count % radix[d]), count /= radix[d];
    }
    digit[3] = int(count);
  }
  __device__ __forceinline__ void add(const int* step, const int* radix) {
    int carry = 0;
#pragma unroll
    for (int d = 0; d < 4; d++) {
      if (!has<POSITION>(d)) continue;
      digit[d] += step[d] + carry;
      carry = 0;
      if (d < 3 && digit[d] >= radix[d]) digit[d] -= radix[d], carry = 1;
    }
  }
  __device__ __forceinline__ Index offset(const Index* strides) const {
    Index sum = 0;
#pragma unroll
    for (int d = 0; d < 4; d++)
      if (has<POSITION>(d)) sum += digit[d] * strides[d];
    return sum;
  }
};

// Brings tiles of a matrix into shared memory, X rows (or columns) by BK of inner, a row of
// shared memory for each inner index. CHECKED: the elements are those of windows, which may reach
// into the padding. LINEAR: neighbours along inner have the same distance everywhere.
template <typename T, int X, int VEC, bool BY_X, bool CHECKED, bool LINEAR> struct Fetch {
  typedef typename Sum<T>::type S;
  static const bool ROWS_ARE_POSITIONS = !WEIGHT_GRAD, INNER_ARE_POSITIONS = WEIGHT_GRAD;
  static const int FAST = (BY_X ? X : BK) / VEC, SLOW = BY_X ? BK : X;
  static const int LANES = THREADS / FAST;
  static const int ITEMS = LANES < SLOW ? SLOW / LANES : 1;
  static const int ROWS = BY_X ? 1 : ITEMS;
  static_assert(THREADS % FAST == 0 && (LANES >= SLOW || SLOW % LANES == 0),
                "threads share a tile evenly");

  Vector<T, VEC> items[ITEMS];
  Index offset[ROWS];
  int coordinate[CHECKED ? ROWS : 1][NDIM];
  unsigned live;  // a bit for each row
  Odometer<INNER_ARE_POSITIONS> at;
  Index k;  // of the first item

  __device__ __forceinline__ int slow() const { return threadIdx.x / FAST; }
  __device__ __forceinline__ int fast() const { return threadIdx.x % FAST * VEC; }
  // Of item i: its row or column within the tile.
  __device__ __forceinline__ int x(int i) const { return BY_X ? fast() : slow() + i * LANES; }

  __device__ __forceinline__ void start(Index first_inner, const int* inner) {
    k = first_inner + (BY_X ? slow() : fast());
    if (!LINEAR) at.set(k, inner);
    live = 0;
  }

  // Whether this thread has a share in the tile.
  __device__ __forceinline__ bool busy() const { return LANES <= SLOW || slow() < SLOW; }

  // Fetches the next tile, into registers or, ASYNC, on its way into shared memory.
  template <bool ASYNC, int WIDTH>
  __device__ __forceinline__ void next(const T* from, Index end, const Product& p,
                                       const int* inner, const int* step, const Index* strides,
                                       S (*tile)[WIDTH]) {
    Index along = 0;
    int moved[NDIM];
    bool inside = true;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      if (BY_X || i == 0) {
        along = LINEAR ? k * strides[0] : at.offset(strides);
        inside = k < end && busy();
        if (CHECKED) {
#pragma unroll
          for (int axis = 0; axis < NDIM; axis++)
            moved[axis] = at.digit[digit_of<INNER_ARE_POSITIONS>(axis)] * p.move_inner[axis];
        }
        if (!LINEAR) at.add(step, inner);
        k += BY_X && LANES < BK ? LANES : BK;
      }
      const int row = BY_X ? 0 : i;
      bool valid = inside && (live >> row & 1);
      if (CHECKED) {
#pragma unroll
        for (int axis = 0; axis < NDIM; axis++)
          valid = valid && unsigned(coordinate[row][axis] + moved[axis]) < unsigned(p.size[axis]);
      }
      const T* element = from + offset[row] + along;
      if constexpr (ASYNC) {
        if (!busy()) continue;
        if constexpr (BY_X) {
          copy_async<sizeof(T) * VEC>(&tile[slow() + i * LANES][fast()], element, valid);
        } else {
#pragma unroll
          for (int v = 0; v < VEC; v++)
            copy_async<sizeof(T)>(&tile[fast() + v][x(i)], element + v, valid);
        }
      } else {
#pragma unroll
        for (int v = 0; v < VEC; v++) items[i].v[v] = from_sum<T>(S(0));
        if (valid) items[i] = load_vector<VEC>(element);
      }
    }
  }

  template <int WIDTH> __device__ __forceinline__ void put(S (*tile)[WIDTH]) const {
    if (!busy()) return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      Vector<S, VEC> values;
#pragma unroll
      for (int v = 0; v < VEC; v++) values.v[v] = to_sum(items[i].v[v]);
      if (BY_X) {
        store_vector<VEC>(&tile[slow() + i * LANES][fast()], values);
      } else {
#pragma unroll
        for (int v = 0; v < VEC; v++) tile[fast() + v][x(i)] = values.v[v];
      }
    }
  }
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One phase of a strided input gradient: which rows and taps there are, and where they begin.
struct Phase {
  int rows[4], inner[4], step_a[4], step_b[4], base[3];
  Index a, b, c;  // added to the offsets

  template <int STEP_A, int STEP_B>
  __device__ __forceinline__ void set(const Product& p, int number) {
    a = b = c = 0;
    rows[1] = rows[2] = inner[2] = inner[3] = 1;
    rows[3] = p.rows[3], inner[0] = p.inner[0];
#pragma unroll
    for (int axis = 0; axis < NDIM; axis++) {
      const int first = number % p.phases[axis];  // the phase's first tap
      number /= p.phases[axis];
      const int seen = first * p.dilation[axis] - p.before[axis], s = p.stride[axis];
      const int u = (seen % s + s) % s;  // and its first input
      const int i = (u - seen) / s;      // and the output where they meet
      rows[axis] = u < p.extent[axis] ? ceil_div(p.extent[axis] - u, s) : 0;
      inner[axis + 1] = ceil_div(p.taps[axis] - first, p.tap_step[axis]);
      base[axis] = i;
      a += i * p.a_axis[axis], b += first * p.b_axis[axis], c += u * p.c_axis[axis];
    }
    Odometer<false> odometer;
    odometer.set(STEP_A, inner);
#pragma unroll
    for (int d = 0; d < 4; d++) step_a[d] = odometer.digit[d];
    odometer.set(STEP_B, inner);
#pragma unroll
    for (int d = 0; d < 4; d++) step_b[d] = odometer.digit[d];
  }
};

__device__ __forceinline__ Index product_of(const int* v) { return Index(v[0]) * v[1] * v[2] * v[3]; }

template <typename T>
__device__ __forceinline__ void implicit_gemm(const T* a, const T* b, const T* bias, T* c,
                                              typename Sum<T>::type* parts, const Product& p) {
  typedef typename Sum<T>::type S;
  typedef Fetch<T, BM, VEC_A, BY_X_A, CHECKED_A, LINEAR_A> FetchA;
  typedef Fetch<T, BN, VEC_B, BY_X_B, false, LINEAR_B> FetchB;
  const int STEP_A = BY_X_A && FetchA::LANES < BK ? FetchA::LANES : BK;
  const int STEP_B = BY_X_B && FetchB::LANES < BK ? FetchB::LANES : BK;
  // Copies go past the registers where the GPU can do that and nothing is to be converted.
  const bool ASYNC = __CUDA_ARCH__ >= 800 && sizeof(T) == sizeof(S);
  const int F = 16 / sizeof(S);             // elements of 16 bytes
  const int WIDTH_A = BM + F, WIDTH_B = BN + F;  // rows of tiles begin in other banks
  __shared__ __align__(16) S tile_a[2][BK][WIDTH_A];
  __shared__ __align__(16) S tile_b[2][BK][WIDTH_B];
  __shared__ Index place[BM];  // of the tile's rows in C

  const int *rows = p.rows, *inner = p.inner, *step_a = p.step_a, *step_b = p.step_b;
  const int* base = p.base;
  Index a_base = p.a_base, b_base = 0, c_base = 0;
#if PHASES
  __shared__ Phase phase;
  if (threadIdx.x == 0) phase.set<STEP_A, STEP_B>(p, blockIdx.z);
  __syncthreads();
  rows = phase.rows, inner = phase.inner, step_a = phase.step_a, step_b = phase.step_b;
  base = phase.base;
  a_base += phase.a, b_base += phase.b, c_base += phase.c;
#endif
  // Neighbouring blocks have the rows in common.
  const unsigned column_tile = blockIdx.x % p.column_tiles, rest = blockIdx.x / p.column_tiles;
  const int group = rest % p.groups;
  const Index first_row = Index(rest / p.groups) * BM, row_count = product_of(rows);
  const int first_column = column_tile * BN;
  if (first_row >= row_count) return;  // this phase has fewer than others
  a_base += group * p.a_group, b_base += group * p.b_group, c_base += group * p.c_group;
  const Index begin = Index(blockIdx.y) * p.part, all = product_of(inner);
  const Index end = begin + p.part < all ? begin + p.part : all;

  for (int m = threadIdx.x; m < BM; m += THREADS) {
    Odometer<!WEIGHT_GRAD> row;
    row.set(first_row + m, rows);
    place[m] = row.offset(p.c_rows);
  }
  FetchA fetch_a;
  FetchB fetch_b;
  fetch_a.start(begin, inner);
  fetch_b.start(begin, inner);
#pragma unroll
  for (int i = 0; i < FetchA::ROWS; i++) {
    Odometer<!WEIGHT_GRAD> row;
    row.set(first_row + fetch_a.x(i), rows);
    fetch_a.offset[i] = a_base + row.offset(p.a_rows);
    if (CHECKED_A) {
#pragma unroll
      for (int axis = 0; axis < NDIM; axis++)
        fetch_a.coordinate[i][axis] =
            base[axis] + row.digit[digit_of<!WEIGHT_GRAD>(axis)] * p.move_rows[axis];
    }
    fetch_a.live |= unsigned(first_row + fetch_a.x(i) < row_count) << i;
  }
#pragma unroll
  for (int i = 0; i < FetchB::ROWS; i++) {
    const int column = first_column + fetch_b.x(i);
    fetch_b.offset[i] = b_base + column * p.b_column;
    fetch_b.live |= unsigned(column < p.columns) << i;
  }

  // A warp computes 4 x 8 threads' parts; a thread's rows and columns come in runs of F.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int WARPS_DOWN = BM / TM / 4;
  const int down = (warp % WARPS_DOWN * 4 + lane / 8) * F;
  const int across = (warp / WARPS_DOWN * 8 + lane % 8) * F;
  const int RUN_DOWN = BM / TM * F, RUN_ACROSS = BN / TN * F;
  S sum[TM][TN];
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) sum[i][j] = S(0);

  const auto next = [&](int to) {
    fetch_a.template next<ASYNC>(a, end, p, inner, step_a, p.a_inner, tile_a[to]);
    fetch_b.template next<ASYNC>(b, end, p, inner, step_b, p.b_inner, tile_b[to]);
    if (ASYNC) copy_async_commit();
  };
  next(0);
  int now = 0;
  for (Index k = begin; k < end; k += BK, now ^= 1) {
    if (ASYNC) {
      copy_async_wait<0>();
    } else {
      fetch_a.put(tile_a[now]);
      fetch_b.put(tile_b[now]);
    }
    // All of this tile is there, and nobody reads the other any more.
    __syncthreads();
    if (k + BK < end) next(now ^ 1);
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      Vector<S, F> left[TM / F], right[TN / F];
#pragma unroll
      for (int i = 0; i < TM / F; i++)
        left[i] = load_vector<F>(&tile_a[now][kk][down + i * RUN_DOWN]);
#pragma unroll
      for (int j = 0; j < TN / F; j++)
        right[j] = load_vector<F>(&tile_b[now][kk][across + j * RUN_ACROSS]);
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) sum[i][j] += left[i / F].v[i % F] * right[j / F].v[j % F];
    }
  }

  const bool split = parts != nullptr;
  if (split) parts += static_cast<long long>(blockIdx.y) * p.part_size;
#pragma unroll
  for (int i = 0; i < TM; i++) {
    const int m = down + i / F * RUN_DOWN + i % F;
    if (first_row + m >= row_count) continue;
    const Index row = c_base + place[m];
#pragma unroll
    for (int run = 0; run < TN / F; run++) {
      const int column = first_column + across + run * RUN_ACROSS;
      if (split) {
        Vector<S, F> part;
#pragma unroll
        for (int v = 0; v < F; v++) part.v[v] = sum[i][run * F + v];
        if (VEC_C == F) {
          if (column < p.columns) store_vector<F>(parts + row + column, part);
        } else {
#pragma unroll
          for (int v = 0; v < F; v++)
            if (column + v < p.columns) parts[row + (column + v) * p.c_column] = part.v[v];
        }
        continue;
      }
      Vector<T, F> values;
#pragma unroll
      for (int v = 0; v < F; v++) {
        S z = sum[i][run * F + v];
        if (bias != nullptr && column + v < p.columns)
          z += to_sum(bias[group * p.columns + column + v]);
        values.v[v] = from_sum<T>(activate(z));
      }
      if (VEC_C == F) {
        if (column < p.columns) store_vector<F>(c + row + column, values);
      } else {
#pragma unroll
        for (int v = 0; v < F; v++)
          if (column + v < p.columns) c[row + (column + v) * p.c_column] = values.v[v];
      }
    }
  }
}

#define KERNEL(T, NAME)                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, HELD)                                     \
      NAME(const T* __restrict__ a, const T* __restrict__ b, const T* __restrict__ bias,         \
           T* __restrict__ c, Sum<T>::type* __restrict__ parts, const Product product) {         \
    implicit_gemm<T>(a, b, bias, c, parts, product);                                             \
  }
// conv2d_forward_gemm_128x64_f32
#define NAMED(ND, PASS, M, N, T, TYPE) KERNEL(T, conv##ND##d_##PASS##_gemm_##M##x##N##_##TYPE)
#define INSTANTIATE(ND, PASS, M, N, T, TYPE) NAMED(ND, PASS, M, N, T, TYPE)

#ifdef DTYPE_F32
INSTANTIATE(NDIM, PASS, BM, BN, float, f32)
#endif
#ifdef DTYPE_F64
INSTANTIATE(NDIM, PASS, BM, BN, double, f64)
#endif
#ifdef DTYPE_F16
INSTANTIATE(NDIM, PASS, BM, BN, __half, f16)
#endif
#ifdef DTYPE_BF16
INSTANTIATE(NDIM, PASS, BM, BN, __nv_bfloat16, bf16)
#endif
