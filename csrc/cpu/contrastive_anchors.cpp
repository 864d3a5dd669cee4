// What stands before and behind the tiles of the contrastive loss on the CPU: the states that they
// begin with, what the anchors make of them, and the positives' share of the gradients.
#include "../contrastive_anchors.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../tensors.h"
#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_contrastive";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_states(
    Tensor tau_image, Tensor tau_text, Tensor positive, Tensor text, Tensor candidates,
    int64_t begin, bool include_positive, bool every_pair) {
  const int64_t m = tau_image.size(0), n = text.size(0), all = candidates.size(0);
  Tensor row_a = allocate(tau_image, {m}), column_a = allocate(tau_image, {n});
  Tensor rows = allocate(tau_image, {kStateFields, m});
  Tensor columns = allocate(tau_image, {kStateFields, all});
  Tensor place = allocate(tau_image, {m}, ScalarType::Long);
  Tensor pair = allocate(tau_image, {all}, ScalarType::Int);
  for_accumulator(kName, "tau_image", tau_image, [&](auto zero) {
    using T = decltype(zero);
    const StartParams<T> params{m,
                                n,
                                all,
                                begin,
                                data<T>(tau_image),
                                data<T>(tau_text),
                                tau_image.stride(0),
                                tau_text.stride(0),
                                data<int64_t>(positive),
                                include_positive,
                                every_pair,
                                mutable_data<T>(row_a),
                                mutable_data<T>(column_a),
                                mutable_data<T>(rows),
                                mutable_data<T>(columns),
                                mutable_data<int64_t>(place),
                                mutable_data<int32_t>(pair)};
    for (int64_t t = 0; t < std::max(m, all); ++t) params.fill(t);
    for (int64_t i = 0; params.given && i < m; ++i) params.pair_column(i);
  });
  return {row_a, column_a, rows, columns, place, pair};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_anchors(
    Tensor rows, Tensor columns, Tensor row_a, Tensor column_a, Tensor tau_image, Tensor tau_text,
    Tensor positive, Tensor pair, Tensor log_s_image, Tensor log_s_text, int64_t begin,
    double gamma, double rho) {
  const int64_t m = row_a.size(0), n = column_a.size(0);
  Tensor stats = allocate(rows, {kAnchorFields, m});
  Tensor term = allocate(rows, {m}), total = allocate(rows, {m});
  Tensor row_parameters = allocate(rows, {kWeightFields, m});
  Tensor column_parameters = allocate(rows, {kWeightFields, n});
  for_accumulator(kName, "rows", rows, [&](auto zero) {
    using T = decltype(zero);
    const AnchorParams<T> params{m,
                                 n,
                                 begin,
                                 data<T>(rows),
                                 data<T>(columns),
                                 data<T>(row_a),
                                 data<T>(column_a),
                                 data<T>(tau_image),
                                 data<T>(tau_text),
                                 tau_image.stride(0),
                                 tau_text.stride(0),
                                 data<int64_t>(positive),
                                 data<int32_t>(pair),
                                 data<T>(log_s_image),
                                 data<T>(log_s_text),
                                 AnchorOptions(gamma, rho),
                                 mutable_data<T>(stats),
                                 mutable_data<T>(term),
                                 mutable_data<T>(total),
                                 mutable_data<T>(row_parameters),
                                 mutable_data<T>(column_parameters)};
    constexpr int64_t kGrain = 256;
    torch::stable::parallel_for(0, std::max(m, n), kGrain, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) params.one(t);
    });
  });
  return {stats, term, total, row_parameters, column_parameters};
}

// One side's gradient: of every row of it, (sum / unit - total of its pair * the pair's features) *
// scale, the difference before it is rounded.
template <class F, class Z, class T>
struct GradientArgs {
  int64_t d;
  Z* grad;                  // [rows, d]; may be the sums
  const T* sum;             // [rows, d]
  const F* others;          // features of the other side
  const int32_t* pair;      // [rows] the anchor, or -1; null: row i is anchor i
  const int64_t* positive;  // [anchors] the other side's row of an anchor; null: row i of anchor i
  const T* total;           // [anchors]
  T unit, scale;
};

template <class F, class Z, class T>
struct GradientRows {
  template <bool>
  static TEMPNET_INLINE void run(const GradientArgs<F, Z, T>& args, int64_t begin, int64_t end) {
    const T inverse = 1 / args.unit, scale = args.scale;  // of a power of two
    for (int64_t r = begin; r < end; ++r) {
      const T* sum = args.sum + r * args.d;
      Z* grad = args.grad + r * args.d;
      const int64_t i = args.pair ? args.pair[r] : r;
      if (i < 0) {
#pragma omp simd
        for (int64_t k = 0; k < args.d; ++k) grad[k] = store<Z>(sum[k] * inverse * scale);
        continue;
      }
      const T total = args.total[i];
      const F* other = args.others + (args.positive ? args.positive[i] : i) * args.d;
#pragma omp simd
      for (int64_t k = 0; k < args.d; ++k) {
        grad[k] = store<Z>((sum[k] * inverse - total * load(other[k])) * scale);
      }
    }
  }
};

template <class F, class Z, class T>
void one_side(const Tensor& grad, const Tensor& sum, const Tensor& others, const int32_t* pair,
              const int64_t* positive, const Tensor& total, const Tensor& unit,
              const Tensor& scale) {
  if (!grad.numel()) return;
  const GradientArgs<F, Z, T> args{grad.size(1),   mutable_data<Z>(grad),
                                   data<T>(sum),   data<F>(others),
                                   pair,           positive,
                                   data<T>(total), unit.numel() ? *data<T>(unit) : T(1),
                                   *data<T>(scale)};
  run_parallel<GradientRows<F, Z, T>>(args, grad.size(0), args.d);
}

void pair_gradients_(Tensor grad_image, Tensor grad_text, Tensor image_sum, Tensor text_sum,
                     Tensor image, Tensor text, Tensor total, Tensor positive, Tensor pair,
                     Tensor unit, Tensor scale) {
  image = dense(image), text = dense(text);
  for_dtype(kName, "image", image, [&](auto types) {
    using F = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    one_side<F, F, T>(grad_image, image_sum, text, nullptr, data<int64_t>(positive), total, unit,
                      scale);
    const auto texts = [&](auto zero) {
      one_side<F, decltype(zero), T>(grad_text, text_sum, image, data<int32_t>(pair), nullptr,
                                     total, unit, scale);
    };
    // Not rounded before it is summed over the ranks.
    grad_text.scalar_type() == image.scalar_type() ? texts(F{}) : texts(T{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("anchor_states.native", TORCH_BOX(&anchor_states));
  library.impl("contrastive_anchors.native", TORCH_BOX(&contrastive_anchors));
  library.impl("pair_gradients_.native", TORCH_BOX(&pair_gradients_));
}

}  // namespace tempnet
