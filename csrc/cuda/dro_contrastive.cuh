// The elementwise half of the contrastive loss on a GPU: a tile of similarities is visited once for
// the softmax states of its rows and of its columns, and once for the weights of both. No torch:
// tests/emulator/ compiles this file with g++ and runs it on a CPU.
//
// - stats_kernel: a CTA takes a strip of columns and a chunk of rows, patch after patch. A patch
//   stays in registers between the maxima and the sums of both directions.
// - join_kernel: the states of the strips and of the chunks, in a fixed order.
// - weights_kernel: elementwise.
#pragma once

#include "../similarity_fields.h"
#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace contrastive {

constexpr int kThreads = 256;
constexpr int kGroup = 4;                          // neighbouring columns of a thread
constexpr int kStrip = kThreads;                   // columns of a CTA of stats_kernel
constexpr int kLanes = kStrip / kGroup;            // threads along a row of a patch
constexpr int kBands = kThreads / kLanes;          // threads along a column
constexpr int kThreadRows = 8;                     // rows of a thread
constexpr int kPatchRows = kBands * kThreadRows;   // of stats_kernel
constexpr int kHalves = kLanes / kWarp;            // warps along a row
constexpr int kWeightColumns = kThreads * kGroup;  // of a CTA of weights_kernel
constexpr int kWeightRows = 16;                    // the same

constexpr int kPartFields = kStateCount + 1;

struct Tile {
  int64_t row_begin, column_begin, m, n;
  int rows, columns;
  const float* similarity;  // [rows, columns], column stride 1
  int64_t stride;
  bool aligned;  // groups of columns begin on 16 bytes, in the weights on as many columns
  const int64_t* positive;  // [M], in [0, N)
  const int32_t* ids;       // [2, N] or null; pairs that share one are no negatives
  const bool* mask;         // [M, N] or null; true for negatives
  int64_t mask_stride;
  bool include_positive;
};

struct StatsParams {
  Tile tile;
  const float *row_a, *column_a;    // [M], [N]
  float *rows, *columns;            // [kStateFields, M], [kStateFields, N]
  float *row_parts, *column_parts;  // [strips, kPartFields, rows], [chunks, kPartFields, columns]
  int strips, chunks, chunk_rows;
};

struct WeightsParams {
  Tile tile;
  const float *rows, *columns;  // [3, M], [3, N]
  void* weights;                // [rows, columns], column stride 1; may be the similarities
  int64_t stride;
};

// The columns of a thread, and their ids.
template <bool kMasked>
struct Group {
  int first, count;  // in the tile; count may be <= 0
  int32_t image[kGroup], text[kGroup];

  TEMPNET_DEVICE Group(const Tile& tile, int first)
      : first(first), count(min(kGroup, tile.columns - first)) {
    if constexpr (kMasked) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const bool there = tile.ids && k < count;
        image[k] = there ? tile.ids[tile.column_begin + first + k] : -1;
        text[k] = there ? tile.ids[tile.n + tile.column_begin + first + k] : -1;
      }
    }
  }
};

// z := the similarities of row r of the tile, -inf outside. Without a branch: the loads of several
// rows are in flight together.
template <bool kAligned, bool kMasked>
TEMPNET_DEVICE void load_group(const Tile& tile, const Group<kMasked>& group, int r,
                               float (&z)[kGroup]) {
  const float* from = tile.similarity + r * tile.stride + group.first;
  if constexpr (kAligned) {
    const uint32_t nothing = Word<float>::kMinusInfinity;
    uint4 v{nothing, nothing, nothing, nothing};
    if (r < tile.rows && group.count > 0) v = load_stream(reinterpret_cast<const uint4*>(from));
    z[0] = bits_to_float(v.x), z[1] = bits_to_float(v.y);
    z[2] = bits_to_float(v.z), z[3] = bits_to_float(v.w);
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      z[k] = r < tile.rows && k < group.count ? from[k] : -INFINITY;
    }
  }
}

// The positive and the ids of a row.
struct Anchor {
  int at;  // the positive's column, counted from the CTA's first; -1 where it is in no column of it
  int32_t image, text;
};

template <bool kMasked>
TEMPNET_DEVICE Anchor load_anchor(const Tile& tile, int r, int first, int columns) {
  Anchor anchor{-1, -1, -1};
  if (r >= tile.rows) return anchor;
  const int64_t y = tile.positive[tile.row_begin + r];
  const int64_t at = y - tile.column_begin - first;
  if (at >= 0 && at < min(columns, tile.columns - first)) anchor.at = int(at);
  if (kMasked && tile.ids) {
    anchor.image = tile.ids[y];
    anchor.text = tile.ids[tile.n + y];
  }
  return anchor;
}

// z := -inf where the pair does not count, of row r of the tile. Returns a bit per column that
// counts, with ids or a mask. at: the positive's column in the group, if it is in [0, kGroup).
template <bool kMasked>
TEMPNET_DEVICE uint32_t exclude(const Tile& tile, const Group<kMasked>& group, int r, int at,
                                const Anchor& anchor, float (&z)[kGroup]) {
  if constexpr (!kMasked) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k == at && !tile.include_positive) z[k] = -INFINITY;
    }
    return 0;
  } else {
    const bool* negative =
        tile.mask + (tile.row_begin + r) * tile.mask_stride + tile.column_begin + group.first;
    uint32_t counts = 0;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      bool counted = r < tile.rows && k < group.count;
      if (tile.mask && counted) counted = negative[k];
      const bool same = (group.image[k] == anchor.image) | (group.text[k] == anchor.text);
      if (tile.ids && same) counted = false;
      if (k == at) counted = tile.include_positive;
      if (!counted) z[k] = -INFINITY;
      counts |= uint32_t(counted) << k;
    }
    return counts;
  }
}

// A warp's reduction of a value per row of a thread: lane l gets that of row l / 4.
template <class Op>
TEMPNET_DEVICE float reduce_rows(float (&x)[kThreadRows], Op op) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int keep = kThreadRows / 2, mask = kWarp / 2; keep > 0; keep /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int k = 0; k < keep; ++k) {
      const float sent = upper ? x[k] : x[k + keep];
      x[k] = op(upper ? x[k + keep] : x[k], shuffle_xor(sent, mask));
    }
  }
#pragma unroll
  for (int mask = kWarp / kThreadRows / 2; mask > 0; mask /= 2) {
    x[0] = op(x[0], shuffle_xor(x[0], mask));
  }
  return x[0];
}

// Of a patch. Two of them: the next patch is written while the last one's states are read.
struct Shared {
  Anchor anchors[kPatchRows];
  float row_a[kPatchRows];
  float row_max[kHalves][kPatchRows], row_s[kHalves][kPatchRows], row_sx[kHalves][kPatchRows];
  float row_count[kHalves][kPatchRows];
  float column_max[kBands][kStrip], column_s[kBands][kStrip], column_sx[kBands][kStrip];
  float column_count[kBands][kStrip];
};
constexpr int kSharedBytes = 2 * int(sizeof(Shared));

template <int kParts, int kSize>
TEMPNET_DEVICE float largest(const float (&x)[kParts][kSize], int at) {
  float y = x[0][at];
#pragma unroll
  for (int part = 1; part < kParts; ++part) y = fmaxf(y, x[part][at]);
  return y;
}
template <int kParts, int kSize>
TEMPNET_DEVICE float total(const float (&x)[kParts][kSize], int at) {
  float y = x[0][at];
#pragma unroll
  for (int part = 1; part < kParts; ++part) y += x[part][at];
  return y;
}

template <bool kMasked>
TEMPNET_DEVICE void store_part(float* parts, int part, int size, int at,
                               const RowState<float>& state, float count) {
  float* to = parts + int64_t(part) * kPartFields * size + at;
  to[int64_t(kStateM) * size] = state.m;
  to[int64_t(kStateS) * size] = state.s;
  to[int64_t(kStateSx) * size] = state.sx;
  if (kMasked) to[int64_t(kStateCount) * size] = count;
}

// Strip blockIdx.x of chunk blockIdx.y.
template <bool kMasked, bool kAligned>
TEMPNET_KERNEL(kThreads, 2)
stats_kernel(TEMPNET_PARAM StatsParams params) {
  const Tile& tile = params.tile;
  Shared* const buffers = reinterpret_cast<Shared*>(shared_memory());
  const int strip = blockIdx.x * kStrip, lane = threadIdx.x % kWarp;
  const int along = threadIdx.x % kLanes, band = threadIdx.x / kLanes, half = along / kWarp;
  const Group<kMasked> group(tile, strip + along * kGroup);
  const float* column_a = params.column_a + tile.column_begin;
  float a[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) a[k] = k < group.count ? column_a[group.first + k] : 1.0f;
  // The state of column strip + threadIdx.x.
  const int own = strip + int(threadIdx.x);
  const float own_a = own < tile.columns ? column_a[own] : 1.0f;
  RowState<float> state;
  float count = 0;

  const int begin = blockIdx.y * params.chunk_rows;
  const int end = min(tile.rows, begin + params.chunk_rows);
  // What the rows of the patch from `first` on are, by the threads that own one.
  const auto load_rows = [&](Shared& shared, int first) {
    const int r = first + threadIdx.x;
    if (threadIdx.x >= kPatchRows) return;
    shared.anchors[threadIdx.x] = load_anchor<kMasked>(tile, r, strip, kStrip);
    shared.row_a[threadIdx.x] = r < tile.rows ? params.row_a[tile.row_begin + r] : 1.0f;
  };
  load_rows(buffers[0], begin);
  __syncthreads();
  for (int first = begin, parity = 0; first < end; first += kPatchRows, parity ^= 1) {
    Shared& shared = buffers[parity];
    const int top = first + band * kThreadRows;
    float z[kThreadRows][kGroup];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) load_group<kAligned>(tile, group, top + r, z[r]);
    float row[kThreadRows], counted[kThreadRows];
    float column[kGroup] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    float column_counted[kGroup] = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const Anchor anchor = shared.anchors[band * kThreadRows + r];
      const int at = anchor.at - along * kGroup;
      if (at >= 0 && at < kGroup) {
        float* s_positive = params.rows + kStatePositive * tile.m + tile.row_begin + top + r;
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          if (k == at) *s_positive = z[r][k];
        }
      }
      const uint32_t counts = exclude(tile, group, top + r, at, anchor, z[r]);
      // The maxima drop NaN, which reaches s below.
      row[r] = fmaxf(fmaxf(z[r][0], z[r][1]), fmaxf(z[r][2], z[r][3]));
      counted[r] = 0;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        column[k] = fmaxf(column[k], z[r][k]);
        if (kMasked) {
          counted[r] += float(counts >> k & 1);
          column_counted[k] += float(counts >> k & 1);
        }
      }
    }
    const auto max = [](float x, float y) { return fmaxf(x, y); };
    const auto add = [](float x, float y) { return x + y; };
    const int row_of_lane = band * kThreadRows + lane * kThreadRows / kWarp;
    const bool first_of_row = lane % (kWarp / kThreadRows) == 0;
    const auto store_rows = [&](float (&to)[kHalves][kPatchRows], float value) {
      if (first_of_row) to[half][row_of_lane] = value;
    };
    const auto store_columns = [&](float (&to)[kBands][kStrip], const float (&x)[kGroup]) {
      *reinterpret_cast<float4*>(&to[band][along * kGroup]) = float4{x[0], x[1], x[2], x[3]};
    };
    store_rows(shared.row_max, reduce_rows(row, max));
    store_columns(shared.column_max, column);
    if (kMasked) {
      store_rows(shared.row_count, reduce_rows(counted, add));
      store_columns(shared.column_count, column_counted);
    }
    __syncthreads();

    load_rows(buffers[parity ^ 1], first + kPatchRows);
    float m[kGroup], s[kGroup] = {0, 0, 0, 0}, sx[kGroup] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      m[k] = row_maximum(largest(shared.column_max, along * kGroup + k), a[k]);
    }
    float row_s[kThreadRows], row_sx[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const float ra = shared.row_a[band * kThreadRows + r];
      const float rm = row_maximum(largest(shared.row_max, band * kThreadRows + r), ra);
      row_s[r] = row_sx[r] = 0;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const float u = centred(z[r][k], ra, rm), e = exp2_approx(u);
        row_s[r] += e;
        row_sx[r] = fmaf(e, fmaxf(u, Constants<float>::kFloor), row_sx[r]);
        const float v = centred(z[r][k], a[k], m[k]), w = exp2_approx(v);
        s[k] += w;
        sx[k] = fmaf(w, fmaxf(v, Constants<float>::kFloor), sx[k]);
      }
    }
    store_rows(shared.row_s, reduce_rows(row_s, add));
    store_rows(shared.row_sx, reduce_rows(row_sx, add));
    store_columns(shared.column_s, s);
    store_columns(shared.column_sx, sx);
    __syncthreads();

    const int t = threadIdx.x;
    RowState<float> patch;
    patch.m = row_maximum(largest(shared.column_max, t), own_a);
    patch.s = total(shared.column_s, t);
    patch.sx = total(shared.column_sx, t);
    state = merge(state, patch);
    if (kMasked) count += total(shared.column_count, t);
    if (t < kPatchRows && first + t < end) {
      RowState<float> part;
      part.m = row_maximum(largest(shared.row_max, t), shared.row_a[t]);
      part.s = total(shared.row_s, t);
      part.sx = total(shared.row_sx, t);
      store_part<kMasked>(params.row_parts, blockIdx.x, tile.rows, first + t, part,
                          kMasked ? total(shared.row_count, t) : 0.0f);
    }
  }
  if (own < tile.columns) {
    store_part<kMasked>(params.column_parts, blockIdx.y, tile.columns, own, state, count);
  }
}

// Adds the states of a row's or column's parts to what earlier tiles left in `out`.
template <bool kMasked>
TEMPNET_DEVICE void join(const float* parts, int count, int size, int at, float* out,
                         int64_t out_size) {
  const auto part = [&](int p, StateField field) {
    return parts[(int64_t(p) * kPartFields + field) * size + at];
  };
  // The largest first: then every part is moved once, and no part waits for another.
  float m = out[kStateM * out_size];
#pragma unroll 8
  for (int p = 0; p < count; ++p) m = fmaxf(m, part(p, kStateM));
  const auto add = [&](RowState<float>& to, const RowState<float>& from) {
    const float d = from.m - m, f = exp2_approx(d);
    to.s = fmaf(f, from.s, to.s);
    to.sx = fmaf(f, from.sx + weighted_exponent(from.s, d), to.sx);
  };
  RowState<float> sum;
  add(sum,
      RowState<float>{out[kStateM * out_size], out[kStateS * out_size], out[kStateSx * out_size]});
  float counted = kMasked ? out[kStateCount * out_size] : 0.0f;
#pragma unroll 8
  for (int p = 0; p < count; ++p) {
    add(sum, RowState<float>{part(p, kStateM), part(p, kStateS), part(p, kStateSx)});
    if (kMasked) counted += part(p, kStateCount);
  }
  out[kStateM * out_size] = m;
  out[kStateS * out_size] = sum.s;
  out[kStateSx * out_size] = sum.sx;
  if (kMasked) out[kStateCount * out_size] = counted;
}

// A thread per row, and then per column.
template <bool kMasked>
TEMPNET_KERNEL(kThreads, 1)
join_kernel(TEMPNET_PARAM StatsParams params) {
  const Tile& tile = params.tile;
  int at = blockIdx.x * kThreads + threadIdx.x;
  if (at < tile.rows) {
    join<kMasked>(params.row_parts, params.strips, tile.rows, at, params.rows + tile.row_begin + at,
                  tile.m);
    return;
  }
  at -= tile.rows;
  if (at < tile.columns) {
    join<kMasked>(params.column_parts, params.chunks, tile.columns, at,
                  params.columns + tile.column_begin + at, tile.n);
  }
}

template <bool kAligned, class Z>
TEMPNET_DEVICE void store_group(Z* to, int count, const float (&w)[kGroup]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k < count) to[k] = from_bits<Z>(Word<Z>::pack(w[k], w[k]));
    }
  } else if constexpr (Word<Z>::kCount == 1) {
    *reinterpret_cast<float4*>(to) = float4{w[0], w[1], w[2], w[3]};
  } else {
    *reinterpret_cast<uint2*>(to) = uint2{Word<Z>::pack(w[0], w[1]), Word<Z>::pack(w[2], w[3])};
  }
}

// Rows blockIdx.y * kWeightRows on of columns blockIdx.x * kWeightColumns on.
template <class Z, bool kMasked, bool kAligned>
TEMPNET_KERNEL(kThreads, 2)
weights_kernel(TEMPNET_PARAM WeightsParams params) {
  const Tile& tile = params.tile;
  const int strip = blockIdx.x * kWeightColumns, along = threadIdx.x * kGroup;
  const Group<kMasked> group(tile, strip + along);
  if (group.count <= 0) return;
  const float* columns = params.columns + tile.column_begin + group.first;
  float a[kGroup], m[kGroup], q[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const bool there = k < group.count;
    a[k] = there ? columns[kWeightA * tile.n + k] : 1.0f;
    m[k] = there ? columns[kWeightM * tile.n + k] : 0.0f;
    q[k] = there ? columns[kWeightQ * tile.n + k] : 0.0f;
  }
  constexpr int kBatch = 4;  // rows whose loads are in flight together
  const int begin = blockIdx.y * kWeightRows, end = min(tile.rows, begin + kWeightRows);
  for (int first = begin; first < end; first += kBatch) {
    float z[kBatch][kGroup], row_a[kBatch], row_m[kBatch], row_q[kBatch];
    Anchor anchors[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int r = first + b;
      load_group<kAligned>(tile, group, r, z[b]);
      anchors[b] = load_anchor<kMasked>(tile, r, strip, kWeightColumns);
      const float* row = params.rows + tile.row_begin + min(r, tile.rows - 1);
      row_a[b] = row[kWeightA * tile.m], row_m[b] = row[kWeightM * tile.m],
      row_q[b] = row[kWeightQ * tile.m];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int r = first + b;
      if (r >= end) break;
      exclude(tile, group, r, anchors[b].at - along, anchors[b], z[b]);
      float w[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const float by_row = exp2_approx(centred(z[b][k], row_a[b], row_m[b]));
        w[k] = fmaf(row_q[b], by_row, q[k] * exp2_approx(centred(z[b][k], a[k], m[k])));
      }
      Z* to = static_cast<Z*>(params.weights) + r * params.stride + group.first;
      store_group<kAligned>(to, group.count, w);
    }
  }
}

inline bool is_masked(const Tile& tile) { return tile.ids || tile.mask; }

// Strips and chunks of a tile. Chunks as high as still leave every multiprocessor several CTAs.
inline void plan_stats(StatsParams& params, int multiprocessors) {
  constexpr int kMostRows = 256, kCtasPerMultiprocessor = 8;
  const Tile& tile = params.tile;
  params.strips = divide_up(tile.columns, kStrip);
  const int chunks = divide_up(kCtasPerMultiprocessor * multiprocessors, params.strips);
  const int rows = divide_up(divide_up(tile.rows, chunks), kPatchRows) * kPatchRows;
  params.chunk_rows = min(kMostRows, rows);
  params.chunks = divide_up(tile.rows, params.chunk_rows);
}

// Floats that row_parts and column_parts take together.
inline int64_t part_floats(const StatsParams& params) {
  return kPartFields *
         (int64_t(params.strips) * params.tile.rows + int64_t(params.chunks) * params.tile.columns);
}

inline void launch_stats(StatsParams params, float* parts, Stream stream) {
  const Tile& tile = params.tile;
  params.row_parts = parts;
  params.column_parts = parts + kPartFields * int64_t(params.strips) * tile.rows;
  const bool masked = is_masked(tile);
  const auto kernel = tile.aligned ? masked ? stats_kernel<true, true> : stats_kernel<false, true>
                      : masked     ? stats_kernel<true, false>
                                   : stats_kernel<false, false>;
  launch(kernel, dim3(params.strips, params.chunks), kThreads, 1, kSharedBytes, stream, params);
  launch(masked ? join_kernel<true> : join_kernel<false>,
         dim3(divide_up(tile.rows + tile.columns, kThreads)), kThreads, 1, 0, stream, params);
}

template <class Z>
void launch_weights(const WeightsParams& params, Stream stream) {
  const Tile& tile = params.tile;
  const bool masked = is_masked(tile);
  const auto kernel = tile.aligned
                          ? masked ? weights_kernel<Z, true, true> : weights_kernel<Z, false, true>
                      : masked ? weights_kernel<Z, true, false>
                               : weights_kernel<Z, false, false>;
  launch(kernel, dim3(divide_up(tile.columns, kWeightColumns), divide_up(tile.rows, kWeightRows)),
         kThreads, 1, 0, stream, params);
}

// Whether groups of columns can be read and written as one word each.
template <class Z>
bool aligned_groups(const Tile& tile, const Z* weights, int64_t stride) {
  const auto on = [](const void* p, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
  };
  return tile.columns % kGroup == 0 && tile.stride % kGroup == 0 && stride % kGroup == 0 &&
         on(tile.similarity, kGroup * sizeof(float)) && on(weights, kGroup * sizeof(Z));
}

}  // namespace contrastive
}  // namespace device
}  // namespace tempnet
