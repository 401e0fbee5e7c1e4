// What the passes of conv_depthwise.cu share: how the work is cut, rows loaded and stored.
//
// Columns first, first + DW, ... of a row are neighbours here, whatever the dilation. Where
// channels are last, a column is a vector of VEC channels. Channels first it is one number, and a
// load has LOADED of them side by side: those that a thread needs are picked out of its loads.
#pragma once

#include "common.cuh"
#include "activations.cuh"
#include "vector.cuh"
#include "reduce.cuh"

#define FORWARD 0
#define INPUT_GRAD 1
#define INPUT_GATHER 2
#define WEIGHT_GRAD 3

#define THREADS 128
#define TAPS (KH * KW)
// Outputs whose windows hold one input, along rows and columns.
#define LIVE_H ((KH + SH - 1) / SH)
#define LIVE_W ((KW + SW - 1) / SW)
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

// Sizes of x (D, H, W, C) and y (OD, OH, OW, O), zeros before x, and how the work is cut: strips
// of so many rows (of one remainder by DH), tiles of TW columns (of one remainder by DW), runs of
// so many vectors of channels.
struct Sizes {
  int N, D, H, W, C, OD, OH, OW, O, front, top, left;
  int strip, strips, tiles, lanes;
};
#define SIZES                                                                                    \
  int N, int D, int H, int W, int C, int OD, int OH, int OW, int O, int front, int top,          \
      int left, int strip, int strips, int tiles, int lanes
// The same, with axes that are not there as constants.
#define ROW_AXIS (NDIM > 1 || !CHANNELS_FIRST)
#define COLUMN_AXIS (NDIM > 1 || CHANNELS_FIRST)
#define SIZES_OF_NDIM                                                                            \
  Sizes {                                                                                        \
    N, NDIM > 2 ? D : 1, ROW_AXIS ? H : 1, COLUMN_AXIS ? W : 1, C, NDIM > 2 ? OD : 1,            \
        ROW_AXIS ? OH : 1, COLUMN_AXIS ? OW : 1, O, NDIM > 2 ? front : 0, top, left, strip,      \
        ROW_AXIS ? strips : 1, COLUMN_AXIS ? tiles : 1, CHANNELS_FIRST ? 1 : lanes               \
  }

// Steps in memory from element to element of an image.
struct Steps {
  Index column, row, slice, channel, example;
  __device__ __forceinline__ Steps(Index D, Index H, Index W, Index C) {
    column = CHANNELS_FIRST ? 1 : C;
    row = W * column;
    slice = H * row;
    channel = CHANNELS_FIRST ? D * slice : 1;
    example = C * D * H * W;
  }
};

// The part of the work with number e. Neighbours take a run of lanes vectors of channels, then the
// tiles of a row, then the next rows: what they read is side by side, or the same.
struct Place {
  int n, slice, channel;
  int row_class, row, column_class, column;  // remainder by DH and DW; first of strip and tile
  __device__ __forceinline__ Place(Index e, int slices, int vectors, const Sizes& z) {
    const int lane = int(e % z.lanes);
    e /= z.lanes;
    const int across = int(e % (z.tiles * DW));
    e /= z.tiles * DW;
    const int down = int(e % (z.strips * DH));
    e /= z.strips * DH;
    slice = int(e % slices), e /= slices;
    const int runs = vectors / z.lanes;
    channel = (int(e % runs) * z.lanes + lane) * VEC;
    n = int(e / runs);
    row_class = down % DH, row = down / DH * z.strip;
    column_class = across % DW, column = across / DW * TW;
  }
};

template <typename S> struct Values {
  S v[VEC];
};

template <typename T>
__device__ __forceinline__ Values<typename Sum<T>::type> widen(const Vector<T, VEC>& from) {
  Values<typename Sum<T>::type> to;
#pragma unroll
  for (int c = 0; c < VEC; c++) to.v[c] = to_sum(from.v[c]);
  return to;
}

// The weights of a tap for the channels from o on.
template <typename T>
__device__ __forceinline__ Values<typename Sum<T>::type> weights_at(const T* w, int tap, Index o,
                                                                    Index O) {
  return widen(load_vector<VEC>(w + (CHANNELS_FIRST ? o * (KD * TAPS) + tap : tap * O + o)));
}

// Bits of the loads for N columns first, first + DW, ... that lie within 0 ... width - 1. A load
// has P columns, channels first; it begins at a multiple of P, FIRST columns before the first.
template <int N, int P, int FIRST>
__device__ __forceinline__ unsigned columns_inside(int first, int width) {
  unsigned inside = 0;
#pragma unroll
  for (int s = 0; s * P < FIRST + N; s++) {
    const int at = first - FIRST + s * P * DW;
    if (at >= 0 && at < width) inside |= 1u << s;
  }
  return inside;
}

// Loads N columns of a row from at on, step apart; those outside are zeros.
template <int N, int P, int FIRST, typename T>
__device__ __forceinline__ void load_row(Vector<T, VEC> (&to)[N], const T* from, Index at,
                                         Index step, unsigned inside) {
  const T zero = from_sum<T>(typename Sum<T>::type(0));
  Vector<T, P * VEC> loaded[(FIRST + N + P - 1) / P];
#pragma unroll
  for (int s = 0; s * P < FIRST + N; s++) {
    if (inside >> s & 1) {
      loaded[s] = load_vector<P * VEC>(from + at + (s * P - FIRST) * step);
    } else {
#pragma unroll
      for (int c = 0; c < P * VEC; c++) loaded[s].v[c] = zero;
    }
  }
#pragma unroll
  for (int s = 0; s < N; s++) {
#pragma unroll
    for (int c = 0; c < VEC; c++)
      to[s].v[c] = loaded[(FIRST + s) / P].v[(FIRST + s) % P * VEC + c];
  }
}

// Stores those of N columns that lie within 0 ... width - 1; column is the first one's.
template <int N, typename T>
__device__ __forceinline__ void store_row(const Vector<T, VEC> (&from)[N], T* row, int column,
                                          Index step, int width) {
#pragma unroll
  for (int t = 0; t < N; t += STORED) {
    if (column + DW * t < 0 || column + DW * t >= width) continue;
    Vector<T, STORED * VEC> result;
#pragma unroll
    for (int c = 0; c < STORED * VEC; c++) result.v[c] = from[t + c / VEC].v[c % VEC];
    store_vector(row + (column + DW * t) * step, result);
  }
}
