// The optimal temperature on a GPU: the operator under the CUDA key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "../tensors.h"
#include "on_device.h"
#include "optimal_temperature.cuh"

namespace tempnet {
namespace {

using namespace device;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "optimal_temperature";
constexpr int64_t kMaxColumns = int64_t(1) << 28;     // byte offsets in a row stay in 32 bits
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;  // a grid's first dimension

std::tuple<Tensor, Tensor, Tensor> optimal_temperature(Tensor logits, Tensor rho, double tau_min,
                                                       double tau_max) {
  const OnDevice on(kName, logits);
  const int64_t n = logits.size(0), v = logits.size(1);
  if (n > kMaxRows) throw_bad_argument(kName, "logits", "of fewer than 2^31 rows");
  if (v > kMaxColumns) throw_bad_argument(kName, "logits", "of at most 2^28 columns");
  if (v > 1 && logits.stride(1) != 1) throw_bad_argument(kName, "logits", "of column stride 1");
  Tensor tau = allocate(rho, {n});
  Tensor kl = allocate(rho, {n});
  Tensor iterations = allocate(rho, {n}, ScalarType::Int);
  TemperatureParams params{};
  params.n = n;
  params.v = static_cast<int>(v);
  params.logits = logits.const_data_ptr();
  params.logits_stride = logits.stride(0);
  params.rho = static_cast<const float*>(rho.const_data_ptr());
  params.rho_stride = rho.stride(0);
  params.log_v = float(std::log(double(v)));
  params.tau_min = float(tau_min);
  params.tau_max = float(tau_max);
  params.tau = static_cast<float*>(tau.mutable_data_ptr());
  params.kl = static_cast<float*>(kl.mutable_data_ptr());
  params.iterations = static_cast<int32_t*>(iterations.mutable_data_ptr());
  for_dtype(kName, "logits", logits,
            [&](auto zero) { launch_temperature<decltype(zero)>(params, true, on.stream); });
  return {tau, kl, iterations};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("optimal_temperature.native", TORCH_BOX(&optimal_temperature));
}

}  // namespace tempnet
