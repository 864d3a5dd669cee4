// The token loss on a GPU: the kernels. No torch: tests/emulator/ compiles this file with g++
// and runs it on a CPU.
//
// - row_kernel: a CTA, or on sm_90 a cluster of CTAs, per row. The row stays in registers, packed,
//   between its sums and its gradient; or it is read twice, the second time from the L2 cache.
// - split_kernel, join_kernel: few rows, each spread over many CTAs, without clusters.
// - row_kernel with kCapped: a row of softcapped logits, always read twice by one CTA.
// - split_kernel, stats_kernel: the state of the rows, for other processes to merge.
#pragma once

#include "row_reduce.cuh"

namespace tempnet {
namespace device {

struct Params {
  int64_t n;
  int v;
  const void* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  void* grad;  // null where no gradient is wanted; may be the logits
  int64_t grad_stride;
  const void* target;
  int64_t target_stride;
  bool wide_target;  // int64, not int32
  const float* tau;
  int64_t tau_stride;
  const float* scale;
  int64_t scale_stride;
  float* loss;      // [n]
  float* rows;      // [kRowFields, n]
  int64_t* argmax;  // [n] or null
  float* stats;     // [kPartFields, n], for stats_kernel
  int64_t ignore_index;
  int64_t begin, vocab_size;  // the logits are the columns [begin, begin + v) of vocab_size
  LossOptions<float> options;
  bool unscaled;   // store c p - q without the row's scale
  int slice;       // columns per CTA of a cluster, or of a split row
  int slices;      // per row
  Partial* parts;  // [n, slices], for split_kernel
  Extras* extras;  // the same
  float softcap;   // 0 for none: kernels with kCapped
};

constexpr int kSplitThreads = 256;
constexpr int kElementwiseThreads = 512;

struct RowInputs {
  int i;
  int y;  // the target's column, or -1 where another process has it
  float tau, scale, a;
  bool ignored, live;
};

TEMPNET_DEVICE RowInputs load_row(const Params& params, int i) {
  RowInputs row;
  row.i = i;
  const int64_t y = params.wide_target
                        ? static_cast<const int64_t*>(params.target)[i * params.target_stride]
                        : static_cast<const int32_t*>(params.target)[i * params.target_stride];
  row.tau = params.tau[i * params.tau_stride];
  row.scale = params.scale[i * params.scale_stride];
  row.ignored = y == params.ignore_index;
  const bool inside = y >= 0 && y < params.vocab_size;
  const int64_t column = inside ? y - params.begin : -1;
  row.y = column >= 0 && column < params.v ? int(column) : -1;
  row.live = !row.ignored && inside && row.tau > 0 && row.tau < INFINITY;
  row.a = Constants<float>::kLog2e / row.tau;
  return row;
}

template <class Z>
TEMPNET_DEVICE const Z* logits_row(const Params& params, int64_t i) {
  return static_cast<const Z*>(params.logits) + i * params.logits_stride;
}
template <class Z>
TEMPNET_DEVICE Z* grad_row(const Params& params, int64_t i) {
  return static_cast<Z*>(params.grad) + i * params.grad_stride;
}

// What makes the row's logits exponents.
template <bool kCapped>
TEMPNET_DEVICE auto exponent_of(const Params& params, const RowInputs& row) {
  return scale_of<kCapped>(params.softcap, row.a);
}

TEMPNET_DEVICE float times(float scale, float x) { return scale == 0 ? 0.0f : scale * x; }

// A row that is not read: ignored, or with a bad target or temperature.
template <class Z>
TEMPNET_DEVICE void dead_row(const Params& params, const RowInputs& row, bool first, int begin,
                             int end) {
  const float value = row.ignored ? 0.0f : NAN, scaled = row.scale == 0 ? 0.0f : value;
  if (first && threadIdx.x == 0) {
    params.loss[row.i] = scaled;
    params.rows[kLoss * params.n + row.i] = value;
    params.rows[kGradTau * params.n + row.i] = scaled;
    for (int field = kM; field < kRowFields; ++field) params.rows[field * params.n + row.i] = NAN;
    if (params.argmax) params.argmax[row.i] = -1;
  }
  if (params.grad && begin < end) fill(grad_row<Z>(params, row.i), begin, end, scaled);
}

// One thread's work.
template <class Scale>
TEMPNET_DEVICE void store_row(const Params& params, const RowInputs& row, const Scale& scale,
                              const Partial& p, const Extras* extras) {
  const RowState<float> state{row_maximum(p.zmax, scale), p.s, p.sx};
  const float mean_u = extras ? extras->su / float(params.v) : 0.0f;
  const RowResult<float> r = finish(state, logit(p.zmax, scale).value, logit(p.z_y, scale).value,
                                    mean_u, row.tau, params.options);
  const int64_t n = params.n, i = row.i;
  params.loss[i] = times(row.scale, r.loss);
  params.rows[kLoss * n + i] = r.loss;
  params.rows[kGradTau * n + i] = times(row.scale, r.grad_tau);
  params.rows[kM * n + i] = state.m;
  params.rows[kLog2S * n + i] = r.log2_s;
  params.rows[kEntropy * n + i] = r.entropy;
  params.rows[kLogProb * n + i] = r.log_prob;
  if (params.argmax) {
    const bool finite = r.log2_s - r.log2_s == 0;
    params.argmax[i] = finite ? extras->argmax : -1;
  }
}

template <class Scale>
TEMPNET_DEVICE Gradient<Scale> gradient(const Params& params, const RowInputs& row,
                                        const Scale& scale, const Partial& p, float stored) {
  const float m = row_maximum(p.zmax, scale);
  const float z_loss = params.options.z_loss, ln2 = Constants<float>::kLn2;
  const float c = z_loss == 0 ? 1.0f : probability_factor(z_loss, ln2 * (m + log2f(p.s)), row.tau);
  return gradient_of_row(scale, m, 1 / p.s, p.z_y, row.y, c, stored, params.options.label_smoothing,
                         1 / float(params.v));
}

template <class Z, class Scale>
TEMPNET_DEVICE void write_span(const Span<Z, true>& span, Z* row, const Gradient<Scale>& g) {
  constexpr int kHeld = is_capped<Scale> ? kBatch / 4 : kBatch;  // tanh takes registers
  transform_span<kHeld>(
      span, row, [&](int column, uint32_t (&words)[kWords]) { to_gradient<Z>(g, column, words); });
}

// More threads leave 64 registers each, which the row and the rarer statistics do not fit in.
constexpr int row_threads(Mode mode, bool capped = false) {
  return capped ? 256 : mode == kAll ? 512 : 1024;
}

// How row_kernel reads a row: a thread holds its vectors in registers between the reduction and
// the gradient, or reads them twice.
enum Read { kAligned, kEdged, kTwice };

// A cluster of CTAs per row, a slice of it each.
template <class Z, Mode kMode, Read kRead, bool kCapped>
TEMPNET_KERNEL(row_threads(kMode, kCapped), 1)
row_kernel(TEMPNET_PARAM Params params) {
  constexpr bool kHasExtras = has_extras<kMode>;
  const int rank = int(cluster_rank());
  const RowInputs row = load_row(params, blockIdx.x / cluster_size());
  const int begin = min(params.v, rank * params.slice);
  const int end = min(params.v, begin + params.slice);
  if (!row.live) {
    dead_row<Z>(params, row, rank == 0, begin, end);
    return;
  }
  begin_merge<kHasExtras>();
  const auto scale = exponent_of<kCapped>(params, row);
  const Z* logits = logits_row<Z>(params, row.i);
  const Span<Z, kRead != kAligned> span(logits, begin, end);
  uint32_t words[kVectors][kWords];
  Partial p;
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  if constexpr (kRead == kTwice) {
    p = reduce_span<Z, kMode>(span, scale, extras);
  } else {
    const auto column = [&](int k) { return span.column(k * int(blockDim.x) + int(threadIdx.x)); };
#pragma unroll
    for (int k = 0; k < kVectors; ++k) span.template load<false>(column(k), words[k]);
    p = reduce_vectors<Z, kMode>(words, scale, span, column, extras);
  }
  if (span.holds(row.y)) p.z_y = to_float(logits[row.y]);
  merge_warps<kHasExtras>(p, extras, scale);
  if (rank == 0 && threadIdx.x == 0) store_row(params, row, scale, p, extras);
  if (kMode == kForward || !params.grad || begin >= end) return;
  Z* grad = grad_row<Z>(params, row.i);
  if (row.scale == 0) {
    fill(grad, begin, end, 0.0f);
    return;
  }
  const auto g = gradient(params, row, scale, p, params.unscaled ? 1.0f : row.scale);
  if constexpr (kRead == kTwice) {
    write_span(span, grad, g);
  } else {
    const bool aligned = span.aligned_in(grad);
    // Counted up again: eight columns kept from above would be eight registers.
    int at = span.column(threadIdx.x);
    forget(at);
#pragma unroll
    for (int k = 0; k < kVectors; ++k, at += int(blockDim.x) * kColumns<Z>) {
      if (at < end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) forget(words[k][w]);
        to_gradient<Z>(g, at, words[k]);
        span.store(grad, aligned, at, words[k]);
      }
    }
  }
}

// The part of slice blockIdx.y of row blockIdx.x.
template <class Z, Mode kMode, bool kCapped>
TEMPNET_KERNEL(kSplitThreads, 2)
split_kernel(TEMPNET_PARAM Params params) {
  constexpr bool kHasExtras = has_extras<kMode>;
  const RowInputs row = load_row(params, blockIdx.x);
  if (!row.live) return;
  const Z* logits = logits_row<Z>(params, row.i);
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  const Span<Z, true> span(logits, begin, end);
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  const auto scale = exponent_of<kCapped>(params, row);
  Partial p = reduce_span<Z, kMode>(span, scale, extras);
  if (span.holds(row.y)) p.z_y = to_float(logits[row.y]);
  merge_warps<kHasExtras>(p, extras, scale);
  if (threadIdx.x == 0) {
    const int64_t at = int64_t(row.i) * params.slices + blockIdx.y;
    params.parts[at] = p;
    if (kHasExtras) params.extras[at] = *extras;
  }
}

// The union of the row's parts, in every lane.
template <class Scale>
TEMPNET_DEVICE void merge_slices(const Params& params, const RowInputs& row, const Scale& scale,
                                 Partial& p, Extras* extras) {
  for (int j = threadIdx.x % kWarp; j < params.slices; j += kWarp) {
    const int64_t at = int64_t(row.i) * params.slices + j;
    Extras q_extras;
    if (extras) q_extras = params.extras[at];
    merge_into(p, extras, params.parts[at], extras ? &q_extras : nullptr, scale);
  }
  warp_merge(p, extras, scale);
}

// The row's result from its parts, and the gradient of slice blockIdx.y.
template <class Z, bool kHasExtras>
TEMPNET_KERNEL(kSplitThreads, 2)
join_kernel(TEMPNET_PARAM Params params) {
  const RowInputs row = load_row(params, blockIdx.x);
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  if (!row.live) {
    dead_row<Z>(params, row, blockIdx.y == 0, begin, end);
    return;
  }
  Partial p;
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  merge_slices(params, row, row.a, p, extras);
  if (blockIdx.y == 0 && threadIdx.x == 0) store_row(params, row, row.a, p, extras);
  if (!params.grad) return;
  Z* grad = grad_row<Z>(params, row.i);
  if (row.scale == 0) {
    fill(grad, begin, end, 0.0f);
    return;
  }
  write_span(Span<Z, true>(logits_row<Z>(params, row.i), begin, end), grad,
             gradient(params, row, row.a, p, params.unscaled ? 1.0f : row.scale));
}

// The state of a row from its parts, by a warp.
template <bool kHasExtras, bool kCapped>
TEMPNET_KERNEL(kSplitThreads, 2)
stats_kernel(TEMPNET_PARAM Params params) {
  const int64_t n = params.n, i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (i >= n) return;
  const bool first = threadIdx.x % kWarp == 0;
  const RowInputs row = load_row(params, int(i));
  if (!row.live) {
    if (!first) return;
    for (int field = 0; field < kPartFields; ++field) params.stats[field * n + i] = NAN;
    if (params.argmax) params.argmax[i] = -1;
    return;
  }
  Partial p;
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  const auto scale = exponent_of<kCapped>(params, row);
  merge_slices(params, row, scale, p, extras);
  if (!first) return;
  const RowState<float> state{row_maximum(p.zmax, scale), p.s, p.sx};
  const float delta = rounding_of_maximum(logit(p.zmax, scale).value, state.m, row.tau);
  const float mean_u = kHasExtras ? extras->su / float(params.v) : 0.0f;
  store_part(params.stats + i, n, state, p.zmax, delta, p.z_y, mean_u);
  if (params.argmax) params.argmax[i] = params.begin + extras->argmax;
}

// The gradient of slice blockIdx.y from the state that the forward left in rows.
template <class Z, bool kCapped>
TEMPNET_KERNEL(kElementwiseThreads, 1)
backward_kernel(TEMPNET_PARAM Params params) {
  const RowInputs row = load_row(params, blockIdx.x);
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  Z* grad = grad_row<Z>(params, row.i);
  if (!row.live || row.scale == 0) {
    fill(grad, begin, end, row.ignored || row.scale == 0 ? 0.0f : NAN);
    return;
  }
  const Z* logits = logits_row<Z>(params, row.i);
  const float m = params.rows[kM * params.n + row.i];
  const float log2_s = params.rows[kLog2S * params.n + row.i];
  const float lse = Constants<float>::kLn2 * (m + log2_s);
  const float c = probability_factor(params.options.z_loss, lse, row.tau);
  const Span<Z, true> span(logits, begin, end);
  // In place: the thread that overwrites the target's logit has read it; no other one uses it.
  const float z_y = span.holds(row.y) ? to_float(logits[row.y]) : -INFINITY;
  write_span(
      span, grad,
      gradient_of_row(exponent_of<kCapped>(params, row), m, exp2f(-log2_s), z_y, row.y, c,
                      row.scale, params.options.label_smoothing, 1 / float(params.vocab_size)));
}

// CTAs take rows in turn, and look at the scales of a warp's width of them at a time: where every
// scale is 1, which is usual, there is nothing else to do.
template <class Z>
TEMPNET_KERNEL(kElementwiseThreads, 1)
scale_kernel(TEMPNET_PARAM Params params) {
  const auto scale_of = [&](int64_t i) {
    return i < params.n ? params.scale[i * params.scale_stride] : 1.0f;
  };
  const int64_t step = gridDim.x;
  for (int64_t first = blockIdx.x; first < params.n; first += kWarp * step) {
    const bool other = scale_of(first + threadIdx.x % kWarp * step) != 1;
    if (warp_max(other) == 0) continue;
    for (int k = 0; k < kWarp; ++k) {
      const int64_t i = first + k * step;
      const float scale = scale_of(i);
      if (scale == 1) continue;
      Z* grad = grad_row<Z>(params, i);
      if (scale == 0) {  // also where the gradient is NaN
        fill(grad, 0, params.v, 0.0f);
        continue;
      }
      transform_span(Span<Z, true>(grad, 0, params.v), grad, [&](int, uint32_t (&words)[kWords]) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          words[w] = Word<Z>::pack(Word<Z>::get(words[w], 0) * scale,
                                   Word<Z>::get(words[w], Word<Z>::kCount - 1) * scale);
        }
      });
    }
  }
}

}  // namespace device
}  // namespace tempnet
