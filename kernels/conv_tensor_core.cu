// A convolution and its gradients on tensor cores, as a matrix product without its matrix.
//
// A convolution is a product of matrices, rows x depth times depth x columns:
//
//               rows                   columns            depth
//   forward     positions of y         output channels    taps x input channels
//   input_grad  positions of x         input channels     taps x output channels
//   weight_grad taps x input channels  output channels    positions of y
//
// The left matrix (im2col) has every pixel as often as there are taps. It is never stored: a
// block of threads gathers the piece it needs straight from the image into shared memory.
//
// The idea, step by step from a plain tiled product:
//
// 1. Tiles. A block computes TILE_M x TILE_N results and walks the depth TILE_K at a time. Each
//    step brings (TILE_M + TILE_N) * TILE_K values for 2 * TILE_M * TILE_N * TILE_K operations:
//    at 128 x 128 and 2 bytes that is 64 operations for each byte from the L2 cache.
// 2. Tensor cores. Each warp multiplies its WARP_M x WARP_N part by mma.sync (mma.cuh), reading
//    (WARP_M + WARP_N) * TILE_K values from shared memory: at 64 x 32, 21 multiply-adds a byte;
//    an SM of 1024 multiply-adds and 128 bytes a clock needs 8.
// 3. Swizzle. ldmatrix reads eight rows at the same depth. Stored row behind row they would lie
//    in the same banks; so the 16-byte chunks of a row are permuted by its number.
// 4. Copies that overlap. STAGES pieces are on their way at once (cp.async); the one that is
//    used was asked for STAGES - 1 steps before. One barrier a step.
// 5. Taps without divisions. Where a chunk lies - tap and channel - is counted on from step to
//    step in a mixed radix; zeros around the image are copies of nothing.
// 6. Strides without waste. A pixel of x meets only taps that fit its remainder by the stride. In
//    input_grad the pixels of one remainder (a phase) are the rows of a product of their own,
//    over their own taps: no multiplication by the zeros between gradients.
// 7. Splits. Where there are too few tiles to fill the device, the depth is divided among
//    blocks; each writes its sums in float32, and split_sum.cu adds them, always in the same
//    order: no atomics, the same bits every time.
//
// How fast: the floor of a pass is the larger of 2 * rows * columns * depth over the tensor
// cores' rate and the bytes of x, w and y over the memory's. A 3x3 layer of 56 x 56 x 64, batch 32:
// 7.4 GFLOP and 26 MB, on an H100 7.5 us and 7.7 us. Of a tile: TILE_M * TILE_N * TILE_K
// multiply-adds a step, for 128 x 128 x 32 512 clocks of a quarter of an SM of 1024 a clock.
//
// Compile-time constants: PASS (0 forward, 1 input_grad, 2 weight_grad); NDIM (2, or 3 where a
// kernel has depth; one axis is a row of two); TILE_M, TILE_N, TILE_K (values), WARP_M, WARP_N,
// STAGES; BLOCKS (of an SM at once, at least); COPY (bytes of a copy: 16, or 8 or 4 where channels are no multiple of more); DTYPE_F16
// | DTYPE_BF16 | DTYPE_F32 (as TF32); INDEX_64; ACT. Tensors are dense and channels last.

#include "common.cuh"
#include "activations.cuh"
#include "mma.cuh"

#define FORWARD 0
#define INPUT_GRAD 1
#define WEIGHT_GRAD 2

#if defined(DTYPE_F16)
typedef __half T;
#elif defined(DTYPE_BF16)
typedef __nv_bfloat16 T;
#else
typedef float T;
#endif

const bool TF32 = sizeof(T) == 4;
const int CHUNK = 16 / sizeof(T);  // values of 16 bytes
const int V = COPY / sizeof(T);    // values of a copy
const int SLICE = 32 / sizeof(T);  // depth of one mma
const int WARPS_N = TILE_N / WARP_N;
const int THREADS = 32 * (TILE_M / WARP_M) * WARPS_N;

// Results on their way out: rows of the tile, 16 bytes apart beyond their length, so that the eight
// rows that a warp writes lie in different banks. Float pairs fill sectors of memory as they are.
const int STAGE_ROW = TILE_N + CHUNK;
const bool STAGED =
    sizeof(T) == 2 && TILE_M * STAGE_ROW <= STAGES * (TILE_M + TILE_N) * TILE_K;

static_assert(TILE_M % WARP_M == 0 && TILE_N % WARP_N == 0, "warps share a tile evenly");
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && TILE_K % SLICE == 0, "of whole mma");
static_assert(COPY % sizeof(T) == 0 && COPY <= 16, "a copy is of whole values");

// A piece of a matrix in shared memory. LENGTHWISE: a row of it runs along the depth (as gathered
// from channels in forward); else a row is one position of the depth and runs along M or N.
template <int ROWS, int WIDTH, bool LENGTHWISE> struct Piece {
  static const int CHUNKS = WIDTH / CHUNK;
  static const int SIZE = ROWS * WIDTH;
  static const int PER_ROW = WIDTH / V;            // copies
  static const int ROWS_AT_ONCE = THREADS / PER_ROW;
  static const int ROUNDS = ROWS / ROWS_AT_ONCE;   // of all threads
  static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 64 bytes or of whole 128");
  static_assert(THREADS % PER_ROW == 0 && ROWS % ROWS_AT_ONCE == 0, "a thread, one column");

  // Where a value lies. Eight rows at one chunk, and for TF32 read by value four rows at two
  // chunks, are in different banks.
  static __device__ __forceinline__ int at(int row, int column) {
    const int by = TF32 && !LENGTHWISE ? (row & 3) << 1 : CHUNKS == 4 ? row >> 1 & 3 : row & 7;
    return row * WIDTH + ((column / CHUNK ^ by) * CHUNK | column % CHUNK);
  }
};

#if PASS == WEIGHT_GRAD
typedef Piece<TILE_K, TILE_M, false> PieceA;
#else
typedef Piece<TILE_M, TILE_K, true> PieceA;
#endif
#if PASS == INPUT_GRAD
typedef Piece<TILE_N, TILE_K, true> PieceB;
#else
typedef Piece<TILE_K, TILE_N, false> PieceB;
#endif

// ------------------------------------------------------------------------------------ fragments

// Registers of 16 rows of A from row m, at depth k.
__device__ __forceinline__ void fragment_a(unsigned* a, const T* s, int m, int k, int lane) {
#if PASS != WEIGHT_GRAD
  ldmatrix<4>(a, s + PieceA::at(m + lane % 16, k + lane / 16 * CHUNK));
#else
  if (!TF32) {
    ldmatrix<4, true>(a, s + PieceA::at(k + lane % 8 + lane / 16 * 8, m + lane / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = __float_as_uint(to_sum(s[PieceA::at(k + lane % 4 + i / 2 * 4, m + lane / 4 + i % 2 * 8)]));
  }
#endif
}

// Registers of 16 columns of B, two fragments of 8, from column n at depth k.
__device__ __forceinline__ void fragments_b(unsigned* b, const T* s, int n, int k, int lane) {
#if PASS == INPUT_GRAD
  ldmatrix<4>(b, s + PieceB::at(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * CHUNK));
#else
  if (!TF32) {
    ldmatrix<4, true>(b, s + PieceB::at(k + lane % 16, n + lane / 16 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      b[i] = __float_as_uint(to_sum(s[PieceB::at(k + lane % 4 + i % 2 * 4, n + lane / 4 + i / 2 * 8)]));
  }
#endif
}

template <int COUNT> __device__ __forceinline__ void round_fragment(unsigned* r) {
#ifdef DTYPE_F32
#pragma unroll
  for (int i = 0; i < COUNT; i++) r[i] = to_tf32(__uint_as_float(r[i]));
#endif
}

__device__ __forceinline__ void multiply(float* d, const unsigned* a, const unsigned* b) {
#if defined(DTYPE_F16)
  mma_m16n8k16_f16(d, a, b);
#elif defined(DTYPE_BF16)
  mma_m16n8k16_bf16(d, a, b);
#else
  mma_m16n8k8_tf32(d, a, b);
#endif
}

// ------------------------------------------------------------------------------------- geometry

// One axis as the rows of the product see it: row number i reads, at its tap t, the image at
// i * scale + t * step + offset; that tap is number first + t * by of the kernel, and the row is
// position i * spacing + phase of the result.
struct Axis {
  int count, scale, step, offset, taps, first, by, spacing, phase;

  // Of forward and weight_grad.
  __device__ __forceinline__ Axis(int out, int kernel, int stride, int dilation, int before)
      : count(out), scale(stride), step(dilation), offset(-before), taps(kernel), first(0), by(1),
        spacing(1), phase(0) {}

  // Of input_grad: the pixels with remainder `phase` by the stride, from gradient (phase + before
  // - tap * dilation) / stride on, for the taps where that is whole.
  __device__ __forceinline__ Axis(int in, int kernel, int stride, int dilation, int before,
                                  int phase)
      : count((in - phase + stride - 1) / stride), scale(1), taps(0), first(0), by(1),
        spacing(stride), phase(phase) {
    while (by * dilation % stride != 0) by++;
    while (first < by && (phase + before - first * dilation) % stride != 0) first++;
    if (first < by) taps = (kernel - first + by - 1) / by;  // 0 where the kernel is shorter
    offset = (phase + before - first * dilation) / stride;
    step = -(by * dilation / stride);
  }
};

// A number in mixed radix: c below C, q below Q, p below P, and o. Of a place in the depth of forward:
// channel and tap across columns, rows and slices; of a position: column, row, slice and example.
struct Digits {
  int c, q, p, o;
  __device__ __forceinline__ Digits() {}
  __device__ __forceinline__ Digits(Index value, int C, int Q, int P) {
    c = int(value % C), value /= C;
    q = int(value % Q), value /= Q;
    p = int(value % P), o = int(value / P);
  }
  __device__ __forceinline__ void add(const Digits& d, int C, int Q, int P) {
    c += d.c, q += d.q, p += d.p, o += d.o;
    if (c >= C) c -= C, q++;
    if (q >= Q) q -= Q, p++;
    if (p >= P) p -= P, o++;
  }
};

struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// The image that is gathered: N x D x H x W pixels, `pitch` values a pixel, C of them a group.
// The positions of y, in input_grad those of x: OD x OH x OW. The other operand: `pitch_b` values a
// row, group_b of them a group. The result: `pitch_y` values a row, `columns` of them a group; in
// weight_grad `rows_y` rows a tap (C may be more: channels that fill a copy up).
#define SIZES                                                                                    \
  const int N, const int D, const int H, const int W, const int C, const int pitch,              \
      const int OD, const int OH, const int OW, const int pitch_b, const int group_b,            \
      const int rows_y, const int pitch_y, const int columns, const int KD, const int KH,        \
      const int KW, const int SD, const int SH, const int SW, const int DD, const int DH,        \
      const int DW, const int front, const int top, const int left, const int groups,            \
      const int splits

__device__ __forceinline__ bool within(int i, int size) { return unsigned(i) < unsigned(size); }

// ---------------------------------------------------------------------------------- the product

// a: the image, x (input_grad: dy). b: w (weight_grad: dy). partial: null, or where each split's
// sums go, one split's results behind another's. bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    KERNEL(const T* __restrict__ a, const T* __restrict__ b, const T* __restrict__ bias,
           T* __restrict__ y, float* __restrict__ partial, SIZES) {
  extern __shared__ __align__(128) unsigned char memory[];
  T* const shared_a = reinterpret_cast<T*>(memory);
  T* const shared_b = shared_a + STAGES * PieceA::SIZE;
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp_m = thread / 32 / WARPS_N * WARP_M, warp_n = thread / 32 % WARPS_N * WARP_N;

  // Which tile: columns first, so that blocks which run together share rows of the image.
#if PASS == WEIGHT_GRAD
  const int rows_most = KD * KH * KW * C;
#elif PASS == INPUT_GRAD
  const int rows_most =
      N * ((OD + SD - 1) / SD) * ((OH + SH - 1) / SH) * ((OW + SW - 1) / SW);  // of a phase
#else
  const int rows_most = N * OD * OH * OW;
#endif
  const int tiles_m = (rows_most + TILE_M - 1) / TILE_M, tiles_n = (columns + TILE_N - 1) / TILE_N;
  int id = blockIdx.x;
  const int n0 = id % tiles_n * TILE_N;
  id /= tiles_n;
  const int m0 = id % tiles_m * TILE_M;
  id /= tiles_m;
  const int split = id % splits;
  id /= splits;
  const int group = id % groups;
#if PASS == INPUT_GRAD
  const int phase = id / groups;
  const Axis ad = NDIM > 2 ? Axis(OD, KD, SD, DD, front, phase / SW / SH) : Axis(1, 1, 1, 1, 0, 0);
  const Axis ah(OH, KH, SH, DH, top, phase / SW % SH), aw(OW, KW, SW, DW, left, phase % SW);
#else
  const Axis ad = NDIM > 2 ? Axis(OD, KD, SD, DD, front) : Axis(1, 1, 1, 1, 0);
  const Axis ah(OH, KH, SH, DH, top), aw(OW, KW, SW, DW, left);
#endif
  const int positions = N * ad.count * ah.count * aw.count;
#if PASS == WEIGHT_GRAD
  const int rows = rows_most, depth = positions;
#else
  const int rows = positions, depth = ad.taps * ah.taps * aw.taps * C;
#endif
  if (m0 >= rows) return;  // of a phase with fewer pixels
  const int steps = (depth + TILE_K - 1) / TILE_K, each = (steps + splits - 1) / splits;
  const int begin = min(steps, split * each), end = min(steps, begin + each);

  a += group * C;
  b += group * group_b;

  // What this thread copies: in each round one row's place of A's piece and one of B's. Its
  // column is the same in all.
  const int row_a = thread / PieceA::PER_ROW, column_a = thread % PieceA::PER_ROW * V;
  const int row_b = thread / PieceB::PER_ROW, column_b = thread % PieceB::PER_ROW * V;
#if PASS == WEIGHT_GRAD
  // A column is a tap and a channel; rows are positions, counted on.
  const Digits tap(m0 + column_a, C, KW, KH);
  const int tap_d = tap.o * ad.step + ad.offset, tap_h = tap.p * ah.step + ah.offset;
  const int tap_w = tap.q * aw.step + aw.offset;
  const bool wanted = m0 + column_a < rows;
  Digits at[PieceA::ROUNDS];
#pragma unroll
  for (int i = 0; i < PieceA::ROUNDS; i++)
    at[i] = Digits(Index(begin) * TILE_K + row_a + i * PieceA::ROWS_AT_ONCE, aw.count, ah.count,
                   ad.count);
  const Digits step(TILE_K, aw.count, ah.count, ad.count);
#else
  // Rows are positions; a column is a tap and a channel, counted on.
  Index base[PieceA::ROUNDS];
  int first_d[PieceA::ROUNDS], first_h[PieceA::ROUNDS], first_w[PieceA::ROUNDS];
#pragma unroll
  for (int i = 0; i < PieceA::ROUNDS; i++) {
    const int m = m0 + row_a + i * PieceA::ROWS_AT_ONCE;
    const Digits p(m, aw.count, ah.count, ad.count);
    first_d[i] = p.p * ad.scale + ad.offset;
    first_h[i] = m < rows ? p.q * ah.scale + ah.offset : -(1 << 30);  // no tap is in the image
    first_w[i] = p.c * aw.scale + aw.offset;
    base[i] = m < rows ? (((Index(p.o) * D + first_d[i]) * H + first_h[i]) * W +
                          first_w[i]) * pitch
                       : 0;
  }
  const int taps_w = max(1, aw.taps), taps_h = max(1, ah.taps);  // none: the depth is 0
  Digits tap(Index(begin) * TILE_K + column_a, C, taps_w, taps_h);
  const Digits step(TILE_K, C, taps_w, taps_h);
#endif

  // Asks for step k's pieces.
  auto start = [&](int k, int stage) {
    T* const piece_a = shared_a + stage * PieceA::SIZE;
    T* const piece_b = shared_b + stage * PieceB::SIZE;
#if PASS == WEIGHT_GRAD
#pragma unroll
    for (int i = 0; i < PieceA::ROUNDS; i++) {
      const int u = at[i].p * ad.scale + tap_d, r = at[i].q * ah.scale + tap_h;
      const int s = at[i].c * aw.scale + tap_w;
      const bool valid = wanted && at[i].o < N && within(r, H) && within(s, W) &&
                         (NDIM == 2 || within(u, D));
      const Index from = ((Index(at[i].o) * D + u) * H + r) * W + s;
      copy_async<COPY>(piece_a + PieceA::at(row_a + i * PieceA::ROWS_AT_ONCE, column_a),
                       a + (valid ? from * pitch + tap.c : 0), valid);
      at[i].add(step, aw.count, ah.count, ad.count);
    }
#else
    const bool is_tap = tap.o < ad.taps;
    const int tap_d = tap.o * ad.step, tap_h = tap.p * ah.step, tap_w = tap.q * aw.step;
    const Index offset = ((Index(tap_d) * H + tap_h) * W + tap_w) * pitch + tap.c;
#pragma unroll
    for (int i = 0; i < PieceA::ROUNDS; i++) {
      const bool valid = is_tap && within(first_h[i] + tap_h, H) && within(first_w[i] + tap_w, W) &&
                         (NDIM == 2 || within(first_d[i] + tap_d, D));
      copy_async<COPY>(piece_a + PieceA::at(row_a + i * PieceA::ROWS_AT_ONCE, column_a),
                       a + (valid ? base[i] + offset : 0), valid);
    }
#endif
#if PASS == INPUT_GRAD
    const int number = ((ad.first + tap.o * ad.by) * KH + ah.first + tap.p * ah.by) * KW +
                       aw.first + tap.q * aw.by;
#pragma unroll
    for (int i = 0; i < PieceB::ROUNDS; i++) {
      const int row = row_b + i * PieceB::ROWS_AT_ONCE, n = n0 + row;
      const bool valid = is_tap && n < columns;
      copy_async<COPY>(piece_b + PieceB::at(row, column_b),
                       b + (valid ? (Index(number) * columns + n) * pitch_b + tap.c : 0), valid);
    }
#else
#pragma unroll
    for (int i = 0; i < PieceB::ROUNDS; i++) {
      const int row = row_b + i * PieceB::ROWS_AT_ONCE, at_depth = k * TILE_K + row;
      const bool valid = at_depth < depth && n0 + column_b < group_b;
      copy_async<COPY>(piece_b + PieceB::at(row, column_b),
                       b + (valid ? Index(at_depth) * pitch_b + n0 + column_b : 0), valid);
    }
#endif
#if PASS != WEIGHT_GRAD
    tap.add(step, C, taps_w, taps_h);
#endif
  };

  float sums[WARP_M / 16][WARP_N / 8][4] = {};
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i < end) start(begin + i, i);
    copy_async_commit();
  }
  int stage = 0;
  for (int k = begin; k < end; k++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // all have copied this piece, and used the one before
    if (k + STAGES - 1 < end) start(k + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    copy_async_commit();
    const T* const piece_a = shared_a + stage * PieceA::SIZE;
    const T* const piece_b = shared_b + stage * PieceB::SIZE;
#pragma unroll
    for (int slice = 0; slice < TILE_K; slice += SLICE) {
      unsigned fa[WARP_M / 16][4], fb[WARP_N / 8][2];
#pragma unroll
      for (int i = 0; i < WARP_M / 16; i++) {
        fragment_a(fa[i], piece_a, warp_m + 16 * i, slice, lane);
        round_fragment<4>(fa[i]);
      }
#pragma unroll
      for (int j = 0; j < WARP_N / 8; j += 2) {
        fragments_b(fb[j], piece_b, warp_n + 8 * j, slice, lane);
        round_fragment<4>(fb[j]);
      }
#pragma unroll
      for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; j++) multiply(sums[i][j], fa[i], fb[j]);
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // Where a row's results start, in rows of the result; -1: not a row of it.
  auto row_of = [&](int m) -> Index {
    if (m >= rows) return -1;
#if PASS == WEIGHT_GRAD
    return m % C < rows_y ? Index(m / C) * rows_y + m % C : -1;
#elif PASS == INPUT_GRAD
    const Digits p(m, aw.count, ah.count, ad.count);
    return ((Index(p.o) * OD + p.p * ad.spacing + ad.phase) * OH +
            p.q * ah.spacing + ah.phase) * OW + p.c * aw.spacing + aw.phase;
#else
    return m;
#endif
  };
#if PASS == WEIGHT_GRAD
  const Index results = Index(KD) * KH * KW * rows_y * pitch_y;
#else
  const Index results = Index(N) * OD * OH * OW * pitch_y;
#endif
  if (partial != nullptr) partial += static_cast<long long>(split) * results;
  const bool pairs = columns % 2 == 0 && pitch_y % 2 == 0;
  // Halves go through shared memory where rows allow 16 bytes a store.
  const bool staged = STAGED && partial == nullptr && columns % 8 == 0 && pitch_y % 8 == 0;
  T* const stage_y = reinterpret_cast<T*>(memory);
  if (staged) __syncthreads();  // all have used the last pieces
  const int column = warp_n + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int in_tile = warp_m + 16 * i + 8 * half + lane / 4;
      const Index row = staged ? 0 : row_of(m0 + in_tile);
      if (row < 0) continue;
#pragma unroll
      for (int j = 0; j < WARP_N / 8; j++) {
        const int n = n0 + column + 8 * j;
        if (n >= columns) continue;
        float z0 = sums[i][j][2 * half], z1 = sums[i][j][2 * half + 1];
        const bool both = n + 1 < columns;
        const Index to = row * pitch_y + group * columns + n;
        if (partial != nullptr) {
          if (pairs) *reinterpret_cast<float2*>(partial + to) = make_float2(z0, z1);
          else partial[to] = z0;
          if (!pairs && both) partial[to + 1] = z1;
          continue;
        }
#if PASS == FORWARD
        if (bias != nullptr) {
          z0 += to_sum(bias[group * columns + n]);
          if (both) z1 += to_sum(bias[group * columns + n + 1]);
        }
        z0 = activate(z0), z1 = activate(z1);
#endif
        const Pair pair = {from_sum<T>(z0), from_sum<T>(z1)};
        if (staged) {
          *reinterpret_cast<Pair*>(stage_y + in_tile * STAGE_ROW + column + 8 * j) = pair;
        } else if (pairs) {
          *reinterpret_cast<Pair*>(y + to) = pair;
        } else {
          y[to] = pair.first;
          if (both) y[to + 1] = pair.second;
        }
      }
    }
  if (!staged) return;
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < TILE_M * (TILE_N / CHUNK); i += THREADS) {
    const int in_tile = i / (TILE_N / CHUNK), n = i % (TILE_N / CHUNK) * CHUNK;
    const Index row = row_of(m0 + in_tile);
    if (row < 0 || n0 + n >= columns) continue;
    *reinterpret_cast<uint4*>(y + row * pitch_y + group * columns + n0 + n) =
        *reinterpret_cast<const uint4*>(stage_y + in_tile * STAGE_ROW + n);
  }
}
