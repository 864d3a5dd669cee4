// What stands before and behind the tiles of the contrastive loss on a GPU: the operators under the
// CUDA key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../tensors.h"
#include "contrastive_anchors.cuh"
#include "on_device.h"

namespace tempnet {
namespace {

using namespace device;
using namespace device::anchors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_contrastive";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_states(
    Tensor tau_image, Tensor tau_text, Tensor positive, Tensor text, Tensor candidates,
    int64_t begin, bool include_positive, bool every_pair) {
  const OnDevice on(kName, tau_image);
  check_float32(kName, "tau_image", tau_image);
  const int64_t m = tau_image.size(0), n = text.size(0), all = candidates.size(0);
  Tensor row_a = allocate(tau_image, {m}), column_a = allocate(tau_image, {n});
  Tensor rows = allocate(tau_image, {kStateFields, m});
  Tensor columns = allocate(tau_image, {kStateFields, all});
  Tensor place = allocate(tau_image, {m}, ScalarType::Long);
  Tensor pair = allocate(tau_image, {all}, ScalarType::Int);
  const StartParams<float> params{m,
                                  n,
                                  all,
                                  begin,
                                  data<float>(tau_image),
                                  data<float>(tau_text),
                                  tau_image.stride(0),
                                  tau_text.stride(0),
                                  data<int64_t>(positive),
                                  include_positive,
                                  every_pair,
                                  mutable_data<float>(row_a),
                                  mutable_data<float>(column_a),
                                  mutable_data<float>(rows),
                                  mutable_data<float>(columns),
                                  mutable_data<int64_t>(place),
                                  mutable_data<int32_t>(pair)};
  launch_start(params, on.stream);
  return {row_a, column_a, rows, columns, place, pair};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_anchors(
    Tensor rows, Tensor columns, Tensor row_a, Tensor column_a, Tensor tau_image, Tensor tau_text,
    Tensor positive, Tensor pair, Tensor log_s_image, Tensor log_s_text, int64_t begin,
    double gamma, double rho) {
  const OnDevice on(kName, rows);
  check_float32(kName, "rows", rows);
  const int64_t m = row_a.size(0), n = column_a.size(0);
  Tensor stats = allocate(rows, {kAnchorFields, m});
  Tensor term = allocate(rows, {m}), total = allocate(rows, {m});
  Tensor row_parameters = allocate(rows, {kWeightFields, m});
  Tensor column_parameters = allocate(rows, {kWeightFields, n});
  const AnchorParams<float> params{m,
                                   n,
                                   begin,
                                   data<float>(rows),
                                   data<float>(columns),
                                   data<float>(row_a),
                                   data<float>(column_a),
                                   data<float>(tau_image),
                                   data<float>(tau_text),
                                   tau_image.stride(0),
                                   tau_text.stride(0),
                                   data<int64_t>(positive),
                                   data<int32_t>(pair),
                                   data<float>(log_s_image),
                                   data<float>(log_s_text),
                                   AnchorOptions(gamma, rho),
                                   mutable_data<float>(stats),
                                   mutable_data<float>(term),
                                   mutable_data<float>(total),
                                   mutable_data<float>(row_parameters),
                                   mutable_data<float>(column_parameters)};
  launch_anchors(params, on.stream);
  return {stats, term, total, row_parameters, column_parameters};
}

GradientSide side_of(const Tensor& grad, const Tensor& sum, const Tensor& others) {
  return {grad.numel() ? grad.size(0) : 0, grad.mutable_data_ptr(), data<float>(sum),
          others.const_data_ptr()};
}

void pair_gradients_(Tensor grad_image, Tensor grad_text, Tensor image_sum, Tensor text_sum,
                     Tensor image, Tensor text, Tensor total, Tensor positive, Tensor pair,
                     Tensor unit, Tensor scale) {
  const OnDevice on(kName, image);
  image = dense(image), text = dense(text);
  check_float32(kName, "total", total);
  const GradientParams params{side_of(grad_image, image_sum, text),
                              side_of(grad_text, text_sum, image),
                              image.size(1),
                              data<float>(total),
                              data<int64_t>(positive),
                              data<int32_t>(pair),
                              data<float>(unit),
                              data<float>(scale)};
  for_dtype(kName, "image", image, [&](auto zero) {
    using F = decltype(zero);
    if (grad_text.scalar_type() == image.scalar_type()) {
      launch_gradients<F, F>(params, on.stream);
    } else {  // not rounded before it is summed over the ranks
      check_float32(kName, "grad_text", grad_text);
      launch_gradients<F, float>(params, on.stream);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("anchor_states.native", TORCH_BOX(&anchor_states));
  library.impl("contrastive_anchors.native", TORCH_BOX(&contrastive_anchors));
  library.impl("pair_gradients_.native", TORCH_BOX(&pair_gradients_));
}

}  // namespace tempnet
