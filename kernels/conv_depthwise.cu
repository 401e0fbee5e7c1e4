// Depthwise convolutions over 1 to 3 axes: every channel is a convolution of its own.
//
//   forward      y[n,h,i,j,o] = act(b[o] + sum over the window of x[n,u,r,s,o/M] * w[tap,o])
//   input_grad   dx[n,u,r,s,c] = sum over outputs and the M channels o of c of dy[...,o] * w[tap,o]
//   weight_grad  dw[tap,o] = sum over n,h,i,j of dy[n,h,i,j,o] * x[n,u,r,s,o/M]
//
// where tap (o,p,q) reads slice u = h*SD + o*DD - front, row r = i*SH + p*DH - top and column
// s = j*SW + q*DW - left, and M = out_channels / in_channels.
//
// There is nothing to share between channels, so this is no matrix product: a number that was
// read meets KH * KW weights, 18 FLOPs for 3x3. At 8 bytes an element (one read, one written, in
// float32) that is 2.3 FLOPs a byte, and a GPU does 20 in that time. What counts is to read every
// number from memory once, and to ask the caches for it as seldom as possible. 7x7 is the turning
// point: 98 FLOPs and 8 bytes take about as long as each other; in 16 bits the FLOPs take longer.
//
// The idea: a window that slides in registers. A thread takes VEC channels (up to 16 bytes; a warp
// reads 128 to 512 bytes in order) and TW outputs along a row, and walks down the rows. An input
// row is loaded once, and added at once into every output row that it belongs to, whose sums wait
// in registers: LIVE = ceil(KH/SH) of them. Then the uppermost is complete, is finished with bias
// and activation, is written, and the others move up. So a strip of L rows reads (L-1)*SH + KH
// rows, not L*KH, and a row of TW outputs (TW-1)*SW + KW columns, not TW*KW; what neighbouring
// threads of a block both read is in the L1 cache. Gradients of the input scatter in the same way:
// a row of dy is added into the KH rows of dx that it reaches, and SH of these are complete. The
// weights' gradient keeps KH*KW sums for the taps, and the LIVE rows of dy.
//
// A single axis takes the place of the rows, channels last: 4 taps of a sequence are LIVE = 4 sums,
// and no number is read twice but where strips meet.
//
// A dilation is no trouble: outputs that are DW apart read inputs that are DW apart, so a thread
// takes columns of one remainder, and they are dense again; rows likewise. In gradients of the
// input that works for an axis with a stride or a dilation; with both, input_gather visits the
// taps one by one.
//
// Channels first, a warp has columns side by side, a thread TW of them and one channel. Its loads
// are LOADED columns of a row, which begin at a multiple of them, PHASE columns before the first
// that it needs; what they read beside that is what the neighbours need.
//
// Bytes, over the fewest (every image once), in float32 with the tiles for an H100, counted on the
// CPU; "threads" is what they ask for, weights included, "blocks" the same without what a thread
// of the same block had read before, which is left to the L1 cache. The rest, where tiles of two
// blocks meet, and the weights, is left to L2:
//
//                               channels last                 channels first
//                               threads       blocks          threads       blocks
//     3x3, 112, stride 2        1.04 - 1.06   1.01 - 1.02     1.06 - 1.19   1.00
//     3x3, 56                   1.11 - 1.15   1.02 - 1.04     1.21 - 1.25   1.00
//     5x5, 28                   1.21 - 1.26   1.00 - 1.06     1.42 - 1.47   1.00
//     7x7, 56                   1.70 - 1.79   1.06 - 1.18     1.92 - 2.02   1.00 - 1.01
//     4 taps of a sequence      1.00 - 1.01   1.00            1.12 - 1.25   1.00
//
// (forward, input_grad, weight_grad; tests/depthwise_bytes.py counts all of them, in 16 bits too.)
// A GPU's L1 caches give about nine times the bytes of its memory, so 2.0 does not hurt; wider
// tiles for 7x7 would, for want of registers: 7 rows of sums and 49 weights are there already.
//
// No atomics: weight_grad sums strips, and reduce.cuh puts them together in one order.
//
// Compile-time constants: PASS (FORWARD, INPUT_GRAD, INPUT_GATHER, WEIGHT_GRAD); NDIM; KD KH KW,
// SD SH SW, DD DH DW, 1 for axes that are not there; M; VEC, which divides the channels, and its
// bytes all addresses (1 if M > 1 or CHANNELS_FIRST); TW; LOADED, PHASE; STORED, the columns of a
// store (of a load of dy for WEIGHT_GRAD); LOADED and STORED are 1 unless CHANNELS_FIRST, and
// divide the rows; UNROLL; BLOCKS that an SM should hold; CHANNELS_FIRST, DTYPE_*, INDEX_64, ACT.
// All tensors are contiguous, weights (KD, KH, KW, 1, O) or (O, 1, KD, KH, KW). Blocks have
// THREADS threads, (x, y) of them for WEIGHT_GRAD, x and y powers of two.

#include "depthwise.cuh"

#if PASS == FORWARD
#define COLUMNS ((TW - 1) * SW + KW)  // that TW outputs read

template <typename T>
__device__ __forceinline__ void forward(const T* x, const T* w, const T* b, T* y, int turn,
                                        const Sizes z) {
  typedef typename Sum<T>::type S;
  const Index e = Index(blockIdx.x) * THREADS + threadIdx.x;
  const Place at(e, z.OD, z.O / VEC, z);
  if (at.n >= z.N) return;
  const Steps in(z.D, z.H, z.W, z.C), out(z.OD, z.OH, z.OW, z.O);
  const int rows = (z.OH - at.row_class + DH - 1) / DH;  // of the remainder
  const int last = min(at.row + z.strip, rows);
  if (last <= at.row) return;  // this remainder has fewer rows
  const int top = at.row_class * SH - z.top;
  const int left = (at.column_class + DW * at.column) * SW - z.left;
  const unsigned inside = columns_inside<COLUMNS, LOADED, PHASE>(left, z.W);
  x += at.n * in.example + at.channel / M * in.channel;
  y += at.n * out.example + at.channel * out.channel + at.slice * out.slice;
  const int column = at.column_class + DW * at.column;

  // Few weights stay in registers. Many come from the L1 cache for each row; turn is 0, which the
  // compiler does not know: else it takes all of them out of the loop, and spills them.
  const bool keep = KD == 1 && TAPS * VEC * sizeof(S) <= 64 * 4;
  Values<S> kept[keep ? TAPS : 1];
  if (keep) {
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) kept[tap] = weights_at(w, tap, at.channel, z.O);
  }
  Values<S> bias = {};
  if (b != nullptr) bias = widen(load_vector<VEC>(b + at.channel));

  Values<S> sums[LIVE_H][TW] = {};  // of the outputs of row k, k-1, ...
#pragma unroll UNROLL
  for (int k = at.row; k < last + LIVE_H - 1; k++) {
#pragma unroll
    for (int m = LIVE_H - 1; m > 0; m--) {
#pragma unroll
      for (int t = 0; t < TW; t++) sums[m][t] = sums[m - 1][t];
    }
#pragma unroll
    for (int t = 0; t < TW; t++) sums[0][t] = Values<S>{};
    w += k * turn;
#pragma unroll
    for (int u = 0; u < MIN(SH, KH); u++) {
      const int r = top + DH * (k * SH + u);
      if (r < 0 || r >= z.H || k * SH + u > (last - 1) * SH + KH - 1) continue;
#pragma unroll(KD > 1 ? 1 : KD)
      for (int o = 0; o < KD; o++) {
        const int slice = at.slice * SD + o * DD - z.front;
        if (slice < 0 || slice >= z.D) continue;
        Vector<T, VEC> row[COLUMNS];
        load_row<COLUMNS, LOADED, PHASE>(
            row, x, slice * in.slice + r * in.row + left * in.column, DW * in.column, inside);
        Values<S> value[COLUMNS];
#pragma unroll
        for (int s = 0; s < COLUMNS; s++) value[s] = widen(row[s]);
#pragma unroll
        for (int m = 0; m < LIVE_H; m++) {
          const int p = u + m * SH;
          if (p >= KH) break;
#pragma unroll
          for (int q = 0; q < KW; q++) {
            const Values<S> weight =
                keep ? kept[p * KW + q]
                     : weights_at(w, (o * KH + p) * KW + q, at.channel, z.O);
#pragma unroll
            for (int t = 0; t < TW; t++) {
#pragma unroll
              for (int c = 0; c < VEC; c++)
                sums[m][t].v[c] += value[t * SW + q].v[c] * weight.v[c];
            }
          }
        }
      }
    }
    const int ready = k - (LIVE_H - 1);
    if (ready < at.row) continue;
    Vector<T, VEC> result[TW];
#pragma unroll
    for (int t = 0; t < TW; t++) {
#pragma unroll
      for (int c = 0; c < VEC; c++)
        result[t].v[c] = from_sum<T>(activate(sums[LIVE_H - 1][t].v[c] + bias.v[c]));
    }
    store_row(result, y + (at.row_class + DH * ready) * out.row, column, out.column, z.OW);
  }
}
#endif

#if PASS == INPUT_GRAD
#define COLUMNS (TW + LIVE_W - 1)  // of dy that TW * SW columns of dx read
#define ROWS MAX(KH, SH)           // of dx that a row of dy reaches, or completes

// Rows of dx go with those of dy in groups of SH: group k, row p of it (p may go beyond, into
// the next groups) is row row_class * SH - top + DH * (k * SH + p), and dy's row
// row_class + DH * k has tap p there. first_row and first_column are the groups that hold the
// image's first cells.
template <typename T>
__device__ __forceinline__ void input_grad(const T* dy, const T* w, T* dx, int turn,
                                           int first_row, int last_row, int first_column,
                                           const Sizes z) {
  typedef typename Sum<T>::type S;
  const Index e = Index(blockIdx.x) * THREADS + threadIdx.x;
  const Place at(e, z.D, z.C / VEC, z);
  if (at.n >= z.N) return;
  const Steps in(z.D, z.H, z.W, z.C), out(z.OD, z.OH, z.OW, z.O);
  const int begin = first_row + at.row, end = min(begin + z.strip, last_row + 1);
  const int top = at.row_class * SH - z.top;
  const int group = first_column + at.column;
  const int left = at.column_class * SW - z.left + DW * group * SW;        // of dx
  const int source = at.column_class + DW * (group - (LIVE_W - 1));        // of dy
  const unsigned inside = columns_inside<COLUMNS, LOADED, PHASE>(source, z.OW);
  dx += at.n * in.example + at.channel * in.channel + at.slice * in.slice;
  dy += at.n * out.example + at.channel * M * out.channel;

  const bool keep = KD == 1 && M == 1 && TAPS * VEC * sizeof(S) <= 64 * 4;
  Values<S> kept[keep ? TAPS : 1];
  if (keep) {
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) kept[tap] = weights_at(w, tap, at.channel, z.O);
  }

  Values<S> sums[ROWS][TW * SW] = {};  // of the rows from group k on
#pragma unroll UNROLL
  for (int k = begin - (LIVE_H - 1); k < end; k++) {
    w += k * turn;
    const int i = at.row_class + DH * k;
    if (i >= 0 && i < z.OH) {
#pragma unroll(KD > 1 ? 1 : KD)
      for (int o = 0; o < KD; o++) {
        const int before = at.slice + z.front - o * DD;
        if (before < 0 || before % SD != 0 || before / SD >= z.OD) continue;
#pragma unroll(M > 1 ? 1 : M)
        for (int m = 0; m < M; m++) {
          Vector<T, VEC> row[COLUMNS];
          load_row<COLUMNS, LOADED, PHASE>(
              row, dy,
              m * out.channel + before / SD * out.slice + i * out.row + source * out.column,
              DW * out.column, inside);
          Values<S> value[COLUMNS];
#pragma unroll
          for (int s = 0; s < COLUMNS; s++) value[s] = widen(row[s]);
#pragma unroll
          for (int p = 0; p < KH; p++) {
#pragma unroll
            for (int q = 0; q < KW; q++) {
              const Values<S> weight =
                  keep ? kept[p * KW + q]
                       : weights_at(w, (o * KH + p) * KW + q, at.channel * M + m, z.O);
#pragma unroll
              for (int t = 0; t < TW; t++) {
#pragma unroll
                for (int c = 0; c < VEC; c++)
                  sums[p][t * SW + q % SW].v[c] +=
                      value[t + LIVE_W - 1 - q / SW].v[c] * weight.v[c];
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < SH; p++) {
      const int r = top + DH * (k * SH + p);
      if (k < begin || r < 0 || r >= z.H) continue;
      Vector<T, VEC> result[TW * SW];
#pragma unroll
      for (int t = 0; t < TW * SW; t++) {
#pragma unroll
        for (int c = 0; c < VEC; c++) result[t].v[c] = from_sum<T>(sums[p][t].v[c]);
      }
      store_row(result, dx + r * in.row, left, in.column, z.W);
    }
#pragma unroll
    for (int p = 0; p < ROWS; p++) {
#pragma unroll
      for (int t = 0; t < TW * SW; t++)
        sums[p][t] = p + SH < ROWS ? sums[p + SH < ROWS ? p + SH : 0][t] : Values<S>{};
    }
  }
}
#endif

#if PASS == INPUT_GATHER
// For axes with both a stride and a dilation: a thread asks for every tap whether an output has it.
template <typename T>
__device__ __forceinline__ void input_gather(const T* dy, const T* w, T* dx, const Sizes z) {
  typedef typename Sum<T>::type S;
  Index e = Index(blockIdx.x) * THREADS + threadIdx.x;
  const Steps in(z.D, z.H, z.W, z.C), out(z.OD, z.OH, z.OW, z.O);
  int channel = 0;
  if (!CHANNELS_FIRST) channel = int(e % (z.C / VEC)) * VEC, e /= z.C / VEC;
  const int s = int(e % z.W);
  e /= z.W;
  const int r = int(e % z.H);
  e /= z.H;
  const int slice = int(e % z.D);
  e /= z.D;
  if (CHANNELS_FIRST) channel = int(e % z.C), e /= z.C;
  const int n = int(e);
  if (n >= z.N) return;
  Values<S> sums = {};
  for (int o = 0; o < KD; o++) {
    const int h = slice + z.front - o * DD;
    if (h < 0 || h % SD != 0 || h / SD >= z.OD) continue;
    for (int p = 0; p < KH; p++) {
      const int i = r + z.top - p * DH;
      if (i < 0 || i % SH != 0 || i / SH >= z.OH) continue;
      for (int q = 0; q < KW; q++) {
        const int j = s + z.left - q * DW;
        if (j < 0 || j % SW != 0 || j / SW >= z.OW) continue;
        const Index from = n * out.example + h / SD * out.slice + i / SH * out.row +
                           j / SW * out.column;
        for (int m = 0; m < M; m++) {
          const int c_out = channel * M + m;
          const Values<S> weight = weights_at(w, (o * KH + p) * KW + q, c_out, z.O);
          const Values<S> value = widen(load_vector<VEC>(dy + from + c_out * out.channel));
#pragma unroll
          for (int c = 0; c < VEC; c++) sums.v[c] += value.v[c] * weight.v[c];
        }
      }
    }
  }
  Vector<T, VEC> result;
#pragma unroll
  for (int c = 0; c < VEC; c++) result.v[c] = from_sum<T>(sums.v[c]);
  store_vector(dx + n * in.example + channel * in.channel + slice * in.slice + r * in.row +
                   s * in.column,
               result);
}
#endif

#if PASS == WEIGHT_GRAD
#define COLUMNS ((TW - 1) * SW + KW)

// The threads (x, y) of a block: x for channels, y for places, each of which is a strip of rows
// and a tile of columns of one slice of one example; the block has those from begin to end.
template <typename T>
__device__ __forceinline__ void weight_grad(const T* dy, const T* x, typename Sum<T>::type* parts,
                                            T* dw, Index share, const Sizes z) {
  typedef typename Sum<T>::type S;
  __shared__ S shared[THREADS * VEC];
  const Index channel = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * VEC;
  const int depth_tap = blockIdx.z;
  const Steps in(z.D, z.H, z.W, z.C), out(z.OD, z.OH, z.OW, z.O);
  const Index places = Index(z.N) * z.OD * (z.strips * DH) * (z.tiles * DW);
  const Index begin = Index(blockIdx.y) * share;
  const Index end = begin + share < places ? begin + share : places;
  Values<S> sums[TAPS] = {};
#pragma unroll 1
  for (Index e = begin + threadIdx.y; e < end && channel < z.O; e += blockDim.y) {
    Index rest = e;
    const int across = int(rest % (z.tiles * DW));
    rest /= z.tiles * DW;
    const int down = int(rest % (z.strips * DH));
    rest /= z.strips * DH;
    const int h = int(rest % z.OD), n = int(rest / z.OD);
    const int slice = h * SD + depth_tap * DD - z.front;
    if (slice < 0 || slice >= z.D) continue;
    const int row_class = down % DH, first = down / DH * z.strip;
    const int last = min(first + z.strip, (z.OH - row_class + DH - 1) / DH);
    if (last <= first) continue;
    const int column = across % DW + DW * (across / DW * TW);
    const int top = row_class * SH - z.top, left = column * SW - z.left;
    const unsigned inside = columns_inside<COLUMNS, LOADED, PHASE>(left, z.W);
    const unsigned there = columns_inside<TW, STORED, 0>(column, z.OW);
    const T* source = x + n * in.example + channel / M * in.channel + slice * in.slice;
    const T* above = dy + n * out.example + channel * out.channel + h * out.slice;

    Vector<T, VEC> grad[LIVE_H][TW];  // of the outputs of row k, k-1, ...
#pragma unroll UNROLL
    for (int k = first; k < last + LIVE_H - 1; k++) {
#pragma unroll
      for (int m = LIVE_H - 1; m > 0; m--) {
#pragma unroll
        for (int t = 0; t < TW; t++) grad[m][t] = grad[m - 1][t];
      }
      if (k < last)
        load_row<TW, STORED, 0>(grad[0], above,
                                (row_class + DH * k) * out.row + column * out.column,
                                DW * out.column, there);
#pragma unroll
      for (int u = 0; u < MIN(SH, KH); u++) {
        const int r = top + DH * (k * SH + u);
        if (r < 0 || r >= z.H || k * SH + u > (last - 1) * SH + KH - 1) continue;
        Vector<T, VEC> row[COLUMNS];
        load_row<COLUMNS, LOADED, PHASE>(row, source, r * in.row + left * in.column,
                                         DW * in.column, inside);
        Values<S> value[COLUMNS];
#pragma unroll
        for (int s = 0; s < COLUMNS; s++) value[s] = widen(row[s]);
#pragma unroll
        for (int m = 0; m < LIVE_H; m++) {
          const int p = u + m * SH;
          // Outputs that are not there are left out, not taken as zeros: x may be infinite.
          if (p >= KH || k - m < first || k - m >= last) continue;
#pragma unroll
          for (int t = 0; t < TW; t++) {
            if (!(there >> t / STORED & 1)) continue;
            const Values<S> d = widen(grad[m][t]);
#pragma unroll
            for (int q = 0; q < KW; q++) {
#pragma unroll
              for (int c = 0; c < VEC; c++)
                sums[p * KW + q].v[c] += d.v[c] * value[t * SW + q].v[c];
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) {
    __syncthreads();
    block_sums(sums[tap].v, shared);
    if (threadIdx.y != 0 || channel >= z.O) continue;
    const Index all = Index(KD * TAPS) * z.O;
    const Index at = CHANNELS_FIRST ? channel * (KD * TAPS) + depth_tap * TAPS + tap
                                    : (depth_tap * TAPS + tap) * Index(z.O) + channel;
#pragma unroll
    for (int c = 0; c < VEC; c++) {
      if (parts == nullptr) dw[at + c] = from_sum<T>(sums[tap].v[c]);
      else parts[blockIdx.y * all + at + c] = sums[tap].v[c];
    }
  }
}
#endif

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if PASS == FORWARD
#define KERNELS(T, ND, TYPE)                                                                     \
  KERNEL conv##ND##d_depthwise_forward_##TYPE(const T* __restrict__ x, const T* __restrict__ w,  \
                                              const T* __restrict__ b, T* __restrict__ y,        \
                                              int turn, SIZES) {                                 \
    forward(x, w, b, y, turn, SIZES_OF_NDIM);                                                    \
  }
#elif PASS == INPUT_GRAD
#define KERNELS(T, ND, TYPE)                                                                     \
  KERNEL conv##ND##d_depthwise_input_grad_##TYPE(                                                \
      const T* __restrict__ dy, const T* __restrict__ w, T* __restrict__ dx, int turn,           \
      int first_row, int last_row, int first_column, SIZES) {                                    \
    input_grad(dy, w, dx, turn, first_row, last_row, first_column, SIZES_OF_NDIM);               \
  }
#elif PASS == INPUT_GATHER
#define KERNELS(T, ND, TYPE)                                                                     \
  KERNEL conv##ND##d_depthwise_input_gather_##TYPE(                                              \
      const T* __restrict__ dy, const T* __restrict__ w, T* __restrict__ dx, SIZES) {            \
    input_gather(dy, w, dx, SIZES_OF_NDIM);                                                      \
  }
#else
#define KERNELS(T, ND, TYPE)                                                                     \
  KERNEL conv##ND##d_depthwise_weight_grad_##TYPE(                                               \
      const T* __restrict__ dy, const T* __restrict__ x, Sum<T>::type* __restrict__ parts,       \
      T* __restrict__ dw, long long share, SIZES) {                                              \
    weight_grad(dy, x, parts, dw, Index(share), SIZES_OF_NDIM);                                  \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) conv##ND##d_depthwise_weight_sums_##TYPE(    \
      const Sum<T>::type* __restrict__ parts, T* __restrict__ dw, int strips,                    \
      long long columns) {                                                                       \
    strip_sums<T>(parts, dw, strips, Index(columns));                                            \
  }
#endif

// Names that speak in a profiler: conv2d_depthwise_forward_f32.
#define INSTANTIATE(T, ND, TYPE) KERNELS(T, ND, TYPE)
#ifdef DTYPE_F32
INSTANTIATE(float, NDIM, f32)
#endif
#ifdef DTYPE_F64
INSTANTIATE(double, NDIM, f64)
#endif
#ifdef DTYPE_F16
INSTANTIATE(__half, NDIM, f16)
#endif
#ifdef DTYPE_BF16
INSTANTIATE(__nv_bfloat16, NDIM, bf16)
#endif
