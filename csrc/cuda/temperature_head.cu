// The temperature networks around their matrix products on a GPU: the operators under the CUDA key.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../tensors.h"
#include "on_device.h"
#include "temperature_head.cuh"

namespace tempnet {
namespace {

using namespace device;
using torch::stable::Tensor;

Tensor sigmoid_dropout(Tensor pre, Tensor bias, std::optional<Tensor> factor,
                       std::optional<Tensor> key, std::optional<Tensor> ids, int64_t first_row,
                       double probability) {
  const char* const name = "sigmoid_dropout";
  check_float32(name, "pre", pre);
  pre = dense(pre), bias = dense(bias), factor = dense(factor);
  const OnDevice on(name, pre);
  Tensor dropped = allocate(pre, {pre.size(0), pre.size(1)});
  head::DropoutParams params{};
  params.n = pre.size(0);
  params.h = static_cast<int>(pre.size(1));
  params.pre = data<float>(pre);
  params.bias = data<float>(bias);
  params.factor = data<float>(factor);
  params.key = data<int64_t>(key);
  params.ids = data<int64_t>(ids);
  params.ids_stride = ids ? ids->stride(0) : 0;
  params.first_row = first_row;
  params.threshold = dropout_threshold(probability);
  params.scale = float(1 / (1 - probability));
  params.dropped = mutable_data<float>(dropped);
  head::launch_dropout(params, on.stream);
  return dropped;
}

std::tuple<Tensor, Tensor> sigmoid_dropout_bwd(Tensor grad, Tensor dropped,
                                               std::optional<Tensor> factor, double probability) {
  const char* const name = "sigmoid_dropout_bwd";
  check_float32(name, "grad", grad);
  grad = dense(grad), dropped = dense(dropped), factor = dense(factor);
  const OnDevice on(name, grad);
  const int64_t n = dropped.size(0), h = dropped.size(1);
  Tensor grad_pre = allocate(dropped, {n, h});
  Tensor sums = allocate(dropped, {row_blocks(n), h});
  head::DropoutGradParams params{};
  params.n = n;
  params.rows = rows_of_block(n);
  params.h = static_cast<int>(h);
  params.grad = data<float>(grad);
  params.dropped = data<float>(dropped);
  params.factor = data<float>(factor);
  params.kept = float(1 - probability);
  params.grad_pre = mutable_data<float>(grad_pre);
  params.sums = mutable_data<float>(sums);
  head::launch_dropout_grad(params, on.stream);
  return {grad_pre, sums};
}

head::HeadParams head_params(const Tensor& h, const std::optional<Tensor>& norms,
                             const Tensor& scaler, const Tensor& weight, const Tensor& bias,
                             double tau_min, double tau_max) {
  head::HeadParams params{};
  params.n = h.size(0);
  params.rows = rows_of_block(params.n);
  params.k = static_cast<int>(h.size(1));
  params.h = data<float>(h);
  params.norms = data<float>(norms);
  params.scaler = data<float>(scaler);
  params.weight = data<float>(weight);
  params.bias = data<float>(bias);
  params.tau_min = float(tau_min);
  params.tau_range = float(tau_max - tau_min);
  return params;
}

Tensor temperature_head(Tensor h, std::optional<Tensor> norms, Tensor scaler, Tensor weight,
                        Tensor bias, bool squash, double tau_min, double tau_max) {
  const char* const name = "temperature_head";
  check_float32(name, "h", h);
  h = dense(h), norms = dense(norms), weight = dense(weight);
  const OnDevice on(name, h);
  Tensor tau = allocate(h, {h.size(0)});
  head::HeadParams params = head_params(h, norms, scaler, weight, bias, tau_min, tau_max);
  params.tau = mutable_data<float>(tau);
  head::launch_head(params, squash, on.stream);
  return tau;
}

std::tuple<Tensor, Tensor> temperature_head_bwd(Tensor grad_tau, Tensor h,
                                                std::optional<Tensor> norms, Tensor scaler,
                                                Tensor weight, Tensor bias, bool squash,
                                                double tau_min, double tau_max) {
  const char* const name = "temperature_head_bwd";
  check_float32(name, "h", h);
  check_float32(name, "grad_tau", grad_tau);
  h = dense(h), norms = dense(norms), weight = dense(weight);
  const OnDevice on(name, h);
  const int64_t n = h.size(0), k = h.size(1);
  Tensor grad_h = allocate(h, {n, k});
  Tensor sums = allocate(h, {row_blocks(n), along_sums(k) + (norms ? k : 0)});
  head::HeadParams params = head_params(h, norms, scaler, weight, bias, tau_min, tau_max);
  params.grad_tau = data<float>(grad_tau);
  params.grad_tau_stride = grad_tau.stride(0);
  params.grad_h = mutable_data<float>(grad_h);
  params.sums = mutable_data<float>(sums);
  head::launch_head_grad(params, squash, on.stream);
  return {grad_h, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("sigmoid_dropout.native", TORCH_BOX(&sigmoid_dropout));
  library.impl("sigmoid_dropout_bwd.native", TORCH_BOX(&sigmoid_dropout_bwd));
  library.impl("temperature_head.native", TORCH_BOX(&temperature_head));
  library.impl("temperature_head_bwd.native", TORCH_BOX(&temperature_head_bwd));
}

}  // namespace tempnet
