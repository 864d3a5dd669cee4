// The elementwise half of the contrastive loss on the CPU: a tile of similarities is visited once
// for the softmax states of its rows and of its columns, and once for the weights of both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../online_softmax.h"
#include "../similarity_fields.h"
#include "vectorize.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_contrastive";
// Columns of a strip: the unit of parallel work, so results do not depend on the number of threads.
constexpr int64_t kStrip = 512;
// Rows whose columns share one rescaling: 16 KiB of fp32 stay in the first-level cache between the
// passes.
constexpr int64_t kBlock = 8;

template <class T>
struct Tile {
  int64_t row_begin, column_begin, rows, columns;
  const T* similarity;  // [rows, columns], column stride 1
  int64_t stride;
  const int64_t* positive;  // [M]
  const int32_t* ids;       // [2, N] or null; pairs that share one are no negatives
  const bool* mask;         // [M, N] or null; true for negatives
  int64_t mask_stride;
  int64_t n;
  bool include_positive;

  TEMPNET_INLINE bool is_masked() const { return ids || mask; }
};

// z[j] := similarity, or -inf where the pair does not count; kept[j] := whether it counts, written
// only with ids or a mask. Returns the positive's similarity, or NaN where it is elsewhere.
template <class T>
TEMPNET_INLINE T load_row(const Tile<T>& tile, int64_t r, int64_t begin, int64_t count, T* z,
                          T* kept) {
  const T infinity = std::numeric_limits<T>::infinity();
  const T* from = tile.similarity + r * tile.stride + begin;
  const int64_t i = tile.row_begin + r, j0 = tile.column_begin + begin;
  const int64_t y = tile.positive[i];
  const int64_t p = y - j0;
  std::copy(from, from + count, z);
  if (tile.is_masked()) std::fill(kept, kept + count, T(1));
  if (tile.ids) {
    const int32_t *image = tile.ids + j0, *text = tile.ids + tile.n + j0;
    const int32_t own_image = tile.ids[y], own_text = tile.ids[tile.n + y];
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      kept[j] = (image[j] == own_image) | (text[j] == own_text) ? T(0) : T(1);
    }
  }
  if (tile.mask) {
    const bool* negative = tile.mask + i * tile.mask_stride + j0;
    for (int64_t j = 0; j < count; ++j) kept[j] = negative[j] ? kept[j] : T(0);
  }
  const bool here = p >= 0 && p < count;
  if (tile.is_masked()) {
    if (here) kept[p] = tile.include_positive ? T(1) : T(0);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) z[j] = kept[j] != 0 ? z[j] : -infinity;
  } else if (here && !tile.include_positive) {
    z[p] = -infinity;
  }
  return here ? from[p] : std::numeric_limits<T>::quiet_NaN();
}

template <class T>
struct StatsArgs {
  Tile<T> tile;
  const T *row_a, *column_a;  // [M], [N]
  T* columns;                 // [kStateFields, N]
  T* partial;                 // [strips, kStateFields, rows]
};

template <class T>
struct StatsStrips {
  template <bool kFma>
  static TEMPNET_INLINE void run(const StatsArgs<T>& args, int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) one<kFma>(args, strip);
  }

  template <bool kFma>
  static TEMPNET_INLINE void one(const StatsArgs<T>& args, int64_t strip) {
    const Tile<T>& tile = args.tile;
    const int64_t begin = strip * kStrip, count = std::min(kStrip, tile.columns - begin);
    const int64_t j0 = tile.column_begin + begin;
    T* partial = args.partial + strip * kStateFields * tile.rows;
    const T* a = args.column_a + j0;
    T *cm = args.columns + kStateM * tile.n + j0, *cs = args.columns + kStateS * tile.n + j0;
    T *cx = args.columns + kStateSx * tile.n + j0, *cc = args.columns + kStateCount * tile.n + j0;
    T z[kBlock * kStrip], kept[kStrip], top[kStrip];

    for (int64_t r0 = 0; r0 < tile.rows; r0 += kBlock) {
      const int64_t block = std::min(kBlock, tile.rows - r0);
      T row_m[kBlock];
      std::fill(top, top + count, -std::numeric_limits<T>::infinity());
      for (int64_t b = 0; b < block; ++b) {
        T* zb = z + b * kStrip;
        const int64_t r = r0 + b;
        partial[kStatePositive * tile.rows + r] = load_row(tile, r, begin, count, zb, kept);
        T in_row = 0;
        if (tile.is_masked()) {
#pragma omp simd reduction(+ : in_row)
          for (int64_t j = 0; j < count; ++j) {
            in_row += kept[j];
            cc[j] += kept[j];
          }
        }
        partial[kStateCount * tile.rows + r] = in_row;
        T zmax = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : zmax)
        for (int64_t j = 0; j < count; ++j) {  // the maxima drop NaN, which reaches s below
          zmax = zb[j] > zmax ? zb[j] : zmax;
          top[j] = zb[j] > top[j] ? zb[j] : top[j];
        }
        row_m[b] = std::max(zmax * args.row_a[tile.row_begin + r], Constants<T>::kEmpty);
      }
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const T m = cm[j], candidate = top[j] * a[j];
        const T moved = candidate > m ? candidate : m;
        const T d = clamp_exponent(m - moved), f = exp2_clamped(d);
        cm[j] = moved;
        cx[j] = f * (cx[j] + d * cs[j]);
        cs[j] = f * cs[j];
      }
      for (int64_t b = 0; b < block; ++b) {
        const T* zb = z + b * kStrip;
        const T ra = args.row_a[tile.row_begin + r0 + b], rm = row_m[b];
        T s = 0, sx = 0;
#pragma omp simd reduction(+ : s, sx)
        for (int64_t j = 0; j < count; ++j) {
          const T u = clamp_exponent(centred<kFma>(zb[j], ra, rm));
          const T e = exp2_clamped(u);
          s += e;
          sx += e * u;
          const T v = clamp_exponent(centred<kFma>(zb[j], a[j], cm[j]));
          const T w = exp2_clamped(v);
          cs[j] += w;
          cx[j] += w * v;
        }
        partial[kStateM * tile.rows + r0 + b] = rm;
        partial[kStateS * tile.rows + r0 + b] = s;
        partial[kStateSx * tile.rows + r0 + b] = sx;
      }
    }
  }
};

template <class T>
struct WeightsArgs {
  Tile<T> tile;
  const T *row_parameters, *column_parameters;  // [3, M], [3, N]
  int64_t m;
  T* weights;  // [rows, columns]; may be the similarities
  int64_t stride;
};

template <class T>
struct WeightsRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const WeightsArgs<T>& args, int64_t begin, int64_t end) {
    const Tile<T>& tile = args.tile;
    T z[kStrip], kept[kStrip];
    for (int64_t r = begin; r < end; ++r) {
      const T* row = args.row_parameters + tile.row_begin + r;
      const T ra = row[kWeightA * args.m], rm = row[kWeightM * args.m], rq = row[kWeightQ * args.m];
      for (int64_t c = 0; c < tile.columns; c += kStrip) {
        const int64_t count = std::min(kStrip, tile.columns - c);
        const T* column = args.column_parameters + tile.column_begin + c;
        const T *a = column + kWeightA * tile.n, *m = column + kWeightM * tile.n;
        const T* q = column + kWeightQ * tile.n;
        T* w = args.weights + r * args.stride + c;
        load_row(tile, r, c, count, z, kept);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const T by_row = exp2_clamped(clamp_exponent(centred<kFma>(z[j], ra, rm)));
          const T by_column = exp2_clamped(clamp_exponent(centred<kFma>(z[j], a[j], m[j])));
          w[j] = rq * by_row + q[j] * by_column;
        }
      }
    }
  }
};

template <class T>
Tile<T> tile_of(const Tensor& similarity, int64_t row_begin, int64_t column_begin,
                const Tensor& positive, const Tensor& ids, const Tensor& mask, int64_t n,
                bool include_positive) {
  Tile<T> tile{};
  tile.row_begin = row_begin;
  tile.column_begin = column_begin;
  tile.rows = similarity.size(0);
  tile.columns = similarity.size(1);
  tile.similarity = static_cast<const T*>(similarity.const_data_ptr());
  tile.stride = similarity.stride(0);
  tile.positive = static_cast<const int64_t*>(positive.const_data_ptr());
  tile.ids = ids.numel() ? static_cast<const int32_t*>(ids.const_data_ptr()) : nullptr;
  tile.mask = mask.numel() ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr;
  tile.mask_stride = mask.stride(0);
  tile.n = n;
  tile.include_positive = include_positive;
  return tile;
}

template <class T>
void run_stats(const Tile<T>& tile, const Tensor& rows, const Tensor& columns, const Tensor& row_a,
               const Tensor& column_a) {
  const int64_t strips = (tile.columns + kStrip - 1) / kStrip;
  std::vector<T> partial(strips * kStateFields * tile.rows);
  StatsArgs<T> args{tile, static_cast<const T*>(row_a.const_data_ptr()),
                    static_cast<const T*>(column_a.const_data_ptr()),
                    static_cast<T*>(columns.mutable_data_ptr()), partial.data()};
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    run_rows<StatsStrips<T>>(args, begin, end);
  });
  // In the order of the strips, whatever thread visited them.
  const int64_t m = rows.size(1);
  T* out = static_cast<T*>(rows.mutable_data_ptr()) + tile.row_begin;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const T* p = partial.data() + strip * kStateFields * tile.rows;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto field = [&](StateField f) { return p[f * tile.rows + r]; };
      const RowState<T> merged =
          merge(RowState<T>{out[kStateM * m + r], out[kStateS * m + r], out[kStateSx * m + r]},
                RowState<T>{field(kStateM), field(kStateS), field(kStateSx)});
      out[kStateM * m + r] = merged.m;
      out[kStateS * m + r] = merged.s;
      out[kStateSx * m + r] = merged.sx;
      out[kStateCount * m + r] += field(kStateCount);
      const int64_t p_column = tile.positive[tile.row_begin + r] - tile.column_begin;
      if (p_column / kStrip == strip && p_column >= 0 && p_column < tile.columns) {
        out[kStatePositive * m + r] = field(kStatePositive);
      }
    }
  }
}

template <class T>
void run_weights(const Tile<T>& tile, const Tensor& weights, const Tensor& row_parameters,
                 const Tensor& column_parameters) {
  WeightsArgs<T> args{tile,
                      static_cast<const T*>(row_parameters.const_data_ptr()),
                      static_cast<const T*>(column_parameters.const_data_ptr()),
                      row_parameters.size(1),
                      static_cast<T*>(weights.mutable_data_ptr()),
                      weights.stride(0)};
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, tile.columns));
  torch::stable::parallel_for(0, tile.rows, grain, [&](int64_t begin, int64_t end) {
    run_rows<WeightsRows<T>>(args, begin, end);
  });
}

template <class F>
void for_dtype(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      throw_bad_argument(kName, "similarity", "float32 or float64");
  }
}

void similarity_stats_(Tensor rows, Tensor columns, Tensor similarity, int64_t row_begin,
                       int64_t column_begin, Tensor row_a, Tensor column_a, Tensor positive,
                       Tensor ids, Tensor mask, bool include_positive) {
  for_dtype(similarity, [&](auto zero) {
    run_stats(tile_of<decltype(zero)>(similarity, row_begin, column_begin, positive, ids, mask,
                                      columns.size(1), include_positive),
              rows, columns, row_a, column_a);
  });
}

void similarity_weights_(Tensor weights, Tensor similarity, int64_t row_begin, int64_t column_begin,
                         Tensor row_parameters, Tensor column_parameters, Tensor positive,
                         Tensor ids, Tensor mask, bool include_positive) {
  for_dtype(similarity, [&](auto zero) {
    run_weights(tile_of<decltype(zero)>(similarity, row_begin, column_begin, positive, ids, mask,
                                        column_parameters.size(1), include_positive),
                weights, row_parameters, column_parameters);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("similarity_stats_.native", TORCH_BOX(&similarity_stats_));
  library.impl("similarity_weights_.native", TORCH_BOX(&similarity_weights_));
}

}  // namespace tempnet
