// A convolution and its gradients on the tensor cores of compute capability 9.0 (Hopper).
//
// The products are those of conv_tensor_core.cu. There every thread gathers, waits, loads
// registers and multiplies; on an H100 such products reach some 60% of what its tensor cores do.
// The rest takes operands that go from memory to the tensor cores past the threads:
//
// 1. Copies by one thread. TMA's im2col mode (tma.cuh) brings the piece of im2col's matrix that
//    belongs to a tap and some channels - the pixels of a tile, strided, zeros around the image -
//    for one instruction; nothing is left to count but the taps. It writes the swizzle too.
// 2. Products from shared memory. wgmma (wgmma.cuh) multiplies 64 rows by TILE_N columns for one
//    instruction of a warpgroup, reading both operands where TMA has put them: registers hold the
//    sums and nothing else, so tiles are as large as 128 x 256: 85 operations a byte from L2.
// 3. Roles. One warp asks for copies, one or two warpgroups multiply; two mbarriers a stage pass it
//    back and forth: full, when its bytes have landed, and empty, when its products are done. No
//    barrier of the whole block, and the next products start while the last are under way.
// 4. Majors. Channels run along the depth in forward's image and in both of input_grad's operands,
//    across it in forward's weights and in both of weight_grad's: 16-bit operands are read either
//    way. Of TF32 only the first kind is: forward gets its weights transposed, and weight_grad
//    has no such variant. TMA rounds to TF32 on its way.
// 5. Whole sectors. A quad's results are pairs, of four tiles each; the four transpose them among
//    themselves, so that each stores 16 bytes.
//
// Phases of a stride and splits of the depth are as in conv_tensor_core.cu: a launch walks up to
// four images, one a phase, each with a map of its own.
//
// How fast: the floor is the same, 2 * rows * columns * depth over the tensor cores' rate or the
// bytes over the memory's. A 3x3 layer of 56 x 56 x 256, batch 32, to 256: 118 GFLOP and 104 MB,
// on an H100 120 us and 31 us. A step of 128 x 256 x 64 takes 1024 clocks of an SM's 2048
// multiply-adds a clock, 640 clocks of 128 bytes from shared memory, and brings 48 KiB, 1536 clocks
// at 32 bytes a clock from L2: where L2 gives no more than that, it is the bound.
//
// Compile-time constants: PASS (0 forward, 1 input_grad, 2 weight_grad); NDIM (2, or 3); TILE_M,
// TILE_N, STAGES; CONSUMERS (warpgroups that multiply); BLOCKS (of an SM at once); DTYPE_F16 |
// DTYPE_BF16 | DTYPE_F32 (as TF32); INDEX_64; ACT. Tensors are dense and channels last.

#include "common.cuh"
#include "activations.cuh"
#include "wgmma.cuh"

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

const int ROW = 128;                 // bytes of a row in shared memory
const int DEPTH = ROW / sizeof(T);   // of a step
const int SLICE = 32 / sizeof(T);    // of a product
const int PATTERN = 8 * ROW;         // bytes after which the swizzle repeats
const int BLOCK = 64 * ROW;          // bytes of 64 rows
const int M_BLOCKS = TILE_M / 64 / CONSUMERS;  // products of 64 rows a warpgroup
const int THREADS = 128 * CONSUMERS + 32;
const bool A_ACROSS = PASS == WEIGHT_GRAD;     // M-major
const bool B_ACROSS = PASS == WEIGHT_GRAD || (PASS == FORWARD && sizeof(T) == 2);
const int BYTES_A = TILE_M * ROW, BYTES_B = TILE_N * ROW, BYTES = BYTES_A + BYTES_B;

static_assert(TILE_M % (64 * CONSUMERS) == 0 && TILE_N % 64 == 0, "whole products");
static_assert(PASS != WEIGHT_GRAD || sizeof(T) == 2, "TF32 has no transposed operands");

// One axis of a walk over positions: position i reads the image at start + i * scale + t * step at
// its tap t, which is number first + t * by of the kernel; it is position i * spacing + phase of
// the result.
struct Axis {
  int count, start, scale, taps, step, first, by, spacing, phase;
};

// One product of the launch: its image, the axes D, H and W, how many positions it has, and its
// first tile of rows.
struct Walk {
  TensorMap map;
  Axis d, h, w;
  int positions, first_tile;
};

struct Walks {
  Walk walk[4];
};

// C: channels of a group along the depth; in weight_grad those of x, along the rows, and padded to
// whole blocks of 64 rows. OH, OW: of the result. `columns` of a group, `pitch_y` values a row.
#define SIZES                                                                                    \
  const int C, const int chunks, const int OD, const int OH, const int OW, const int KH,         \
      const int KW, const int pitch_y, const int columns, const int tiles_m, const int walk_count, \
      const int groups, const int splits, const long long results

__device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], unsigned long long a,
                                         unsigned long long b) {
#if defined(DTYPE_F16)
  wgmma_f16<A_ACROSS, B_ACROSS>(d, a, b);
#elif defined(DTYPE_BF16)
  wgmma_bf16<A_ACROSS, B_ACROSS>(d, a, b);
#else
  wgmma_tf32(d, a, b);
#endif
}

// Two results in the 32 bits that a quad exchanges.
__device__ __forceinline__ unsigned packed(float first, float second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  union Bits {
    unsigned word;
    Pair pair;
    __device__ Bits() {}
  } bits;
  bits.pair.first = from_sum<T>(first), bits.pair.second = from_sum<T>(second);
  return bits.word;
}

// Of lanes a and b, `by` apart: a keeps x and gets b's x in the place of y, b gets a's y in the
// place of x.
__device__ __forceinline__ void exchange(unsigned& x, unsigned& y, bool upper, int by) {
  const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? x : y, by);
  if (upper) x = got;
  else y = got;
}

// bias and partial may be null. partial: where each split's sums go, one split's results behind
// another's.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    KERNEL(const __grid_constant__ Walks walks, const __grid_constant__ TensorMap map_b,
           const T* __restrict__ bias, T* __restrict__ y, float* __restrict__ partial, SIZES) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Mbarrier* const full = reinterpret_cast<Mbarrier*>(memory + STAGES * BYTES);
  Mbarrier* const empty = full + STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Which tile: columns first, so that blocks which run together share pixels.
  const int tiles_n = (columns + TILE_N - 1) / TILE_N;
  int id = blockIdx.x;
  const int n0 = id % tiles_n * TILE_N;
  id /= tiles_n;
  const int tile_m = id % tiles_m;
  id /= tiles_m;
  const int split = id % splits, group = id / splits;
  int number = 0;
  while (number + 1 < walk_count && tile_m >= walks.walk[number + 1].first_tile) number++;
  const Walk& walk = walks.walk[number];
  const int m0 = (tile_m - walk.first_tile) * TILE_M;

  const int taps = walk.d.taps * walk.h.taps * walk.w.taps;
#if PASS == WEIGHT_GRAD
  const int rows = taps * chunks * 64, steps = (walk.positions + DEPTH - 1) / DEPTH;
#else
  const int rows = walk.positions, steps = taps * chunks;
#endif
  const int each = (steps + splits - 1) / splits;
  const int begin = min(steps, split * each), end = min(steps, begin + each);

  if (threadIdx.x == 0) {
    if (shared_address(memory) % PATTERN != 0) __trap();
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4 * CONSUMERS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp == 4 * CONSUMERS) {
    // ------------------------------------------------------------------------------- the copies
    if (lane != 0 || begin >= end) return;
    tensor_map_prefetch(&walk.map);
    tensor_map_prefetch(&map_b);

    // Pixels from a position on, channels from c on, of tap number t.
    auto copy_pixels = [&](void* to, Mbarrier* barrier, int c, int position, int t) {
      const int q = position % walk.w.count, p = position / walk.w.count % walk.h.count;
      const int rest = position / walk.w.count / walk.h.count;
      const int w = walk.w.start + q * walk.w.scale, h = walk.h.start + p * walk.h.scale;
      const int tap_w = t % walk.w.taps * walk.w.step;
      const int tap_h = t / walk.w.taps % walk.h.taps * walk.h.step;
#if NDIM == 3
      const int d = walk.d.start + rest % walk.d.count * walk.d.scale;
      tensor_copy_im2col(to, &walk.map, barrier, c, w, h, d, rest / walk.d.count, tap_w, tap_h,
                         t / walk.w.taps / walk.h.taps * walk.d.step);
#else
      tensor_copy_im2col(to, &walk.map, barrier, c, w, h, rest, tap_w, tap_h);
#endif
    };

    int stage = 0, parity = 1;  // the first wait for each stage is for nothing
    for (int k = begin; k < end; k++) {
      unsigned char* const a = memory + stage * BYTES;
      unsigned char* const b = a + BYTES_A;
      Mbarrier* const barrier = full + stage;
      mbarrier_wait(empty + stage, parity);
      mbarrier_expect(barrier, BYTES);
#if PASS == WEIGHT_GRAD
      for (int i = 0; i < TILE_M / 64; i++) {
        // Blocks of rows beyond the last are zeros from behind the last channel.
        const int block = m0 / 64 + i, t = block / chunks;
        const int c = t < taps ? group * C + block % chunks * 64 : groups * C;
        copy_pixels(a + i * BLOCK, barrier, c, k * DEPTH, min(t, taps - 1));
      }
      for (int i = 0; i < TILE_N / 64; i++)
        tensor_copy(b + i * BLOCK, &map_b, barrier, group * columns + n0 + 64 * i, k * DEPTH);
#else
      const int t = k / chunks, c = k % chunks * DEPTH;
      const int tap_w = walk.w.first + t % walk.w.taps * walk.w.by;
      const int tap_h = walk.h.first + t / walk.w.taps % walk.h.taps * walk.h.by;
      const int tap_d = walk.d.first + t / walk.w.taps / walk.h.taps * walk.d.by;
      const int tap = (tap_d * KH + tap_h) * KW + tap_w;
      copy_pixels(a, barrier, group * C + c, m0, t);
#if PASS == INPUT_GRAD
      tensor_copy(b, &map_b, barrier, group * C + c, n0, tap);
#else
      if (B_ACROSS) {
        for (int i = 0; i < TILE_N / 64; i++)
          tensor_copy(b + i * BLOCK, &map_b, barrier, group * columns + n0 + 64 * i, c, tap);
      } else {
        tensor_copy(b, &map_b, barrier, c, group * columns + n0, tap);
      }
#endif
#endif
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      parity ^= stage == 0;
    }
    return;
  }

  // ------------------------------------------------------------------------------- the products
  float sums[M_BLOCKS][TILE_N / 2] = {};
  const int first_row = warp / 4 * M_BLOCKS * 64;
  int stage = 0, parity = 0, last = 0;
  for (int k = begin; k < end; k++) {
    mbarrier_wait(full + stage, parity);
    const unsigned a = shared_address(memory + stage * BYTES) + first_row * ROW;
    const unsigned b = shared_address(memory + stage * BYTES + BYTES_A);
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) wgmma_hold(sums[i]);
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < DEPTH / SLICE; slice++)
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) {
        // Across: SLICE rows on; along: SLICE values.
        const unsigned from_a = a + i * BLOCK + slice * (A_ACROSS ? SLICE * ROW : 32);
        const unsigned from_b = b + slice * (B_ACROSS ? SLICE * ROW : 32);
        multiply(sums[i], matrix_descriptor(from_a, BLOCK, PATTERN),
                 matrix_descriptor(from_b, BLOCK, PATTERN));
      }
    wgmma_commit();
    // The products of the step before are done: its stage is free.
    wgmma_wait<1>();
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) wgmma_hold(sums[i]);
    if (k > begin && lane == 0) mbarrier_arrive(empty + last);
    last = stage;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < M_BLOCKS; i++) wgmma_hold(sums[i]);

  // -------------------------------------------------------------------------------- the results
  // Where a row's results start, in rows of the result; -1: not a row of it.
  auto row_of = [&](int m) -> Index {
    if (m >= rows) return -1;
#if PASS == WEIGHT_GRAD
    const int c = m % (chunks * 64);
    return c < C ? Index(m / (chunks * 64)) * C + c : -1;
#elif PASS == INPUT_GRAD
    const int q = m % walk.w.count, p = m / walk.w.count % walk.h.count;
    const int rest = m / walk.w.count / walk.h.count;
    const int d = rest % walk.d.count, n = rest / walk.d.count;
    return ((Index(n) * OD + d * walk.d.spacing + walk.d.phase) * OH +
            p * walk.h.spacing + walk.h.phase) * OW + q * walk.w.spacing + walk.w.phase;
#else
    return m;
#endif
  };
  if (partial != nullptr) partial += split * results;
  const int quad = lane % 4;
#pragma unroll
  for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Index row = row_of(m0 + first_row + 64 * i + 16 * (warp % 4) + 8 * half + lane / 4);
      const Index to = row * pitch_y + group * columns;
#pragma unroll
      for (int j = 0; j < TILE_N / 8; j += 4) {
#ifndef DTYPE_F32
        unsigned words[4];
#endif
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
          const int n = n0 + 8 * (j + tile) + 2 * quad;
          const bool valid = row >= 0 && n < columns;
          float z0 = sums[i][4 * (j + tile) + 2 * half], z1 = sums[i][4 * (j + tile) + 2 * half + 1];
          if (partial != nullptr) {
            if (valid) *reinterpret_cast<float2*>(partial + to + n) = make_float2(z0, z1);
            continue;
          }
#if PASS == FORWARD
          if (bias != nullptr && valid) {
            z0 += to_sum(bias[group * columns + n]);
            z1 += to_sum(bias[group * columns + n + 1]);
          }
          z0 = activate(z0), z1 = activate(z1);
#endif
#ifdef DTYPE_F32
          if (valid) *reinterpret_cast<float2*>(y + to + n) = make_float2(z0, z1);
#else
          words[tile] = packed(z0, z1);
#endif
        }
#ifndef DTYPE_F32
        if (partial != nullptr) continue;
        // Lane `quad` of four gets tile number j + quad, all eight columns of it.
        exchange(words[0], words[1], quad & 1, 1), exchange(words[2], words[3], quad & 1, 1);
        exchange(words[0], words[2], quad & 2, 2), exchange(words[1], words[3], quad & 2, 2);
        const int n = n0 + 8 * (j + quad);
        if (row >= 0 && n < columns)
          *reinterpret_cast<uint4*>(y + to + n) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
      }
    }
}
