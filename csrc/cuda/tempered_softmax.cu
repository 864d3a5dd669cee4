// The tempered softmax on a GPU: the operators under the CUDA key. The kernels and their launches
// are in the .cuh file.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../tensors.h"
#include "on_device.h"
#include "tempered_softmax.cuh"

namespace tempnet {
namespace {

using namespace device::softmax;
using torch::stable::Tensor;

constexpr const char* kName = "tempered_softmax";
constexpr int64_t kMaxColumns = int64_t(1) << 28;     // byte offsets in a row stay in 32 bits
constexpr int64_t kMaxRows = (int64_t(1) << 28) - 1;  // times 8 CTAs a grid's first dimension

void check_columns(const char* argument, const Tensor& wide) {
  if (wide.size(1) > 1 && wide.stride(1) != 1) {
    throw_bad_argument(kName, argument, "of column stride 1");
  }
}

Params row_params(const Tensor& logits, const Tensor& tau, const Tensor& rows, bool is_log) {
  Params params{};
  params.n = logits.size(0);
  if (params.n > kMaxRows) throw_bad_argument(kName, "logits", "of fewer than 2^28 rows");
  if (logits.size(1) > kMaxColumns) {
    throw_bad_argument(kName, "logits", "of at most 2^28 columns");
  }
  check_columns("logits", logits);
  params.v = static_cast<int>(logits.size(1));
  params.logits = logits.const_data_ptr();
  params.logits_stride = logits.stride(0);
  params.tau = static_cast<const float*>(tau.const_data_ptr());
  params.tau_stride = tau.stride(0);
  params.rows = static_cast<float*>(rows.mutable_data_ptr());
  params.log = is_log;
  return params;
}

void launch_on(const OnDevice& on, const Tensor& logits, const Params& params) {
  for_dtype(kName, "logits", logits, [&](auto zero) {
    using Z = decltype(zero);
    // What the code was compiled for, not what the device is: PTX of 8.0 that the driver compiles
    // for a 9.0 knows no clusters.
    const int arch = device::attributes_of(forward_kernel<Z, false>).ptxVersion;
    launch_softmax<Z>(params, plan_launch<Z>(params, arch, on.multiprocessors), on.stream);
  });
}

std::tuple<Tensor, Tensor> tempered_softmax_fwd(Tensor logits, Tensor tau, bool is_log) {
  const OnDevice on(kName, logits);
  const int64_t n = logits.size(0);
  Tensor output = allocate(logits, {n, logits.size(1)});
  Tensor rows = allocate(tau, {kSoftmaxFields, n});
  if (n == 0) return {output, rows};
  Params params = row_params(logits, tau, rows, is_log);
  params.out = output.mutable_data_ptr();
  launch_on(on, logits, params);
  return {output, rows};
}

std::tuple<Tensor, Tensor> tempered_softmax_bwd(Tensor logits, Tensor tau, Tensor rows,
                                                Tensor grad_output, bool is_log,
                                                bool want_grad_logits) {
  const OnDevice on(kName, logits);
  const int64_t n = logits.size(0), v = logits.size(1);
  Tensor grad_logits = allocate(logits, {want_grad_logits ? n : 0, v});
  Tensor grad_tau = allocate(tau, {n});
  if (n == 0) return {grad_logits, grad_tau};
  check_columns("grad_output", grad_output);
  Params params = row_params(logits, tau, rows, is_log);
  params.grad_output = grad_output.const_data_ptr();
  params.grad_output_stride = grad_output.stride(0);
  params.out = want_grad_logits ? grad_logits.mutable_data_ptr() : nullptr;
  params.grad_tau = static_cast<float*>(grad_tau.mutable_data_ptr());
  launch_on(on, logits, params);
  return {grad_logits, grad_tau};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("tempered_softmax_fwd.native", TORCH_BOX(&tempered_softmax_fwd));
  library.impl("tempered_softmax_bwd.native", TORCH_BOX(&tempered_softmax_bwd));
}

}  // namespace tempnet
