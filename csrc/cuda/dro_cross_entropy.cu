// The token loss on a GPU: the operators under the CUDA key. The kernels and their launches are in
// the .cuh files.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "../tensors.h"
#include "dro_cross_entropy_launch.cuh"
#include "launch_plan.h"
#include "on_device.h"

namespace tempnet {
namespace {

using namespace device;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_cross_entropy";
constexpr int64_t kMaxColumns = int64_t(1) << 28;     // byte offsets in a row stay in 32 bits
constexpr int64_t kMaxRows = (int64_t(1) << 28) - 1;  // times 8 CTAs a grid's first dimension

// What the code was compiled for, not what the device is: PTX of 8.0 that the driver compiles for a
// 9.0 knows no clusters.
int compiled_arch() { return attributes_of(scale_kernel<float>).ptxVersion; }

Params shape_params(const Tensor& wide) {
  Params params{};
  params.n = wide.size(0);
  if (params.n > kMaxRows) throw_bad_argument(kName, "logits", "of fewer than 2^28 rows");
  if (wide.size(1) > kMaxColumns) throw_bad_argument(kName, "logits", "of at most 2^28 columns");
  params.v = static_cast<int>(wide.size(1));
  if (params.v > 1 && wide.stride(1) != 1) {
    throw_bad_argument(kName, "logits", "of column stride 1");
  }
  return params;
}

Params state_params(const Tensor& logits, const Tensor& target, const Tensor& tau,
                    int64_t ignore_index, double softcap, int64_t begin, int64_t vocab_size) {
  Params params = shape_params(logits);
  params.logits = logits.const_data_ptr();
  params.logits_stride = logits.stride(0);
  params.target = target.const_data_ptr();
  params.target_stride = target.stride(0);
  params.wide_target = target.scalar_type() == ScalarType::Long;
  params.tau = static_cast<const float*>(tau.const_data_ptr());
  params.tau_stride = tau.stride(0);
  params.ignore_index = ignore_index;
  params.softcap = float(softcap);
  params.begin = begin;
  params.vocab_size = vocab_size;
  return params;
}

Params row_params(const Tensor& logits, const Tensor& target, const Tensor& tau,
                  const Tensor& scale, double rho, int64_t ignore_index, double label_smoothing,
                  double z_loss, double softcap, int64_t begin, int64_t vocab_size) {
  Params params = state_params(logits, target, tau, ignore_index, softcap, begin, vocab_size);
  params.scale = static_cast<const float*>(scale.const_data_ptr());
  params.scale_stride = scale.stride(0);
  params.options = {float(rho), float(std::log(double(vocab_size))), float(label_smoothing),
                    float(z_loss)};
  return params;
}

// The memory of so many parts of rows.
Tensor allocate_parts(Params& params, const Tensor& like, int64_t count) {
  Tensor parts =
      allocate(like, {count * int64_t((sizeof(Partial) + sizeof(Extras)) / sizeof(float))});
  params.parts = static_cast<Partial*>(parts.mutable_data_ptr());
  params.extras = reinterpret_cast<Extras*>(params.parts + count);
  return parts;
}

using RowTensors = std::tuple<Tensor, Tensor, Tensor>;

RowTensors forward(const Tensor& logits, const Tensor* grad, const Tensor& target,
                   const Tensor& tau, const Tensor& scale, double rho, int64_t ignore_index,
                   double label_smoothing, double z_loss, double softcap, bool want_argmax) {
  const OnDevice on(kName, logits);
  const int64_t n = logits.size(0);
  Tensor loss = allocate(tau, {n});
  Tensor rows = allocate(tau, {kRowFields, n});
  Tensor argmax = allocate(tau, {want_argmax ? n : 0}, ScalarType::Long);
  if (n == 0) return {loss, rows, argmax};
  Params params = row_params(logits, target, tau, scale, rho, ignore_index, label_smoothing, z_loss,
                             softcap, 0, logits.size(1));
  if (grad) {
    params.grad = grad->mutable_data_ptr();
    params.grad_stride = grad->stride(0);
  }
  params.loss = static_cast<float*>(loss.mutable_data_ptr());
  params.rows = static_cast<float*>(rows.mutable_data_ptr());
  params.argmax = want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr;
  // fp16 is stored unscaled: p / N underflows where no loss scale can bring it back.
  params.unscaled = logits.scalar_type() == ScalarType::Half;
  for_dtype(kName, "logits", logits, [&](auto zero) {
    using Z = decltype(zero);
    const Plan plan = plan_forward(n, params.v, sizeof(Z), aligned_rows<Z>(params), compiled_arch(),
                                   on.multiprocessors, mode_of(params), params.grad != nullptr,
                                   params.softcap > 0);
    Tensor parts = tau;  // holds the memory until the launches are queued
    if (plan.kernel == Kernel::kSplit) {
      parts = allocate_parts(params, tau, n * divide_up(params.v, plan.slice));
    }
    launch_forward<Z>(params, plan, on.stream);
  });
  return {loss, rows, argmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dro_cross_entropy_fwd(
    Tensor logits, Tensor target, Tensor tau, Tensor scale, double rho, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, bool want_grad, bool want_argmax) {
  const int64_t grad_rows = want_grad ? logits.size(0) : 0;
  Tensor grad = allocate(logits, {grad_rows, logits.size(1)});
  auto [loss, rows, argmax] = forward(logits, want_grad ? &grad : nullptr, target, tau, scale, rho,
                                      ignore_index, label_smoothing, z_loss, softcap, want_argmax);
  return {grad, loss, rows, argmax};
}

RowTensors dro_cross_entropy_fwd_(Tensor logits, Tensor target, Tensor tau, Tensor scale,
                                  double rho, int64_t ignore_index, double label_smoothing,
                                  double z_loss, double softcap, bool want_argmax) {
  return forward(logits, &logits, target, tau, scale, rho, ignore_index, label_smoothing, z_loss,
                 softcap, want_argmax);
}

std::tuple<Tensor, Tensor> dro_cross_entropy_stats(Tensor logits, Tensor target, Tensor tau,
                                                   int64_t ignore_index, double softcap,
                                                   int64_t begin, int64_t vocab_size,
                                                   bool want_mean, bool want_argmax) {
  const OnDevice on(kName, logits);
  const int64_t n = logits.size(0);
  Tensor stats = allocate(tau, {kPartFields, n});
  Tensor argmax = allocate(tau, {want_argmax ? n : 0}, ScalarType::Long);
  if (n == 0) return {stats, argmax};
  Params params = state_params(logits, target, tau, ignore_index, softcap, begin, vocab_size);
  params.stats = static_cast<float*>(stats.mutable_data_ptr());
  params.argmax = want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr;
  for_dtype(kName, "logits", logits, [&](auto zero) {
    using Z = decltype(zero);
    plan_stats(params, sizeof(Z), on.multiprocessors);
    const Tensor parts = allocate_parts(params, tau, n * params.slices);
    launch_stats<Z>(params, want_mean, on.stream);
  });
  return {stats, argmax};
}

// grad may be the logits.
void backward(const Tensor& logits, const Tensor& grad, const Tensor& target, const Tensor& tau,
              const Tensor& scale, const Tensor& rows, int64_t ignore_index, double label_smoothing,
              double z_loss, double softcap, int64_t begin, int64_t vocab_size) {
  const OnDevice on(kName, logits);
  Params params = row_params(logits, target, tau, scale, 0, ignore_index, label_smoothing, z_loss,
                             softcap, begin, vocab_size);
  params.grad = grad.mutable_data_ptr();
  params.grad_stride = grad.stride(0);
  params.rows = static_cast<float*>(rows.mutable_data_ptr());
  for_dtype(kName, "logits", logits,
            [&](auto zero) { launch_backward<decltype(zero)>(params, on.stream); });
}

Tensor dro_cross_entropy_bwd(Tensor logits, Tensor target, Tensor tau, Tensor scale, Tensor rows,
                             int64_t ignore_index, double label_smoothing, double z_loss,
                             double softcap, int64_t begin, int64_t vocab_size) {
  Tensor grad = allocate(logits, {logits.size(0), logits.size(1)});
  backward(logits, grad, target, tau, scale, rows, ignore_index, label_smoothing, z_loss, softcap,
           begin, vocab_size);
  return grad;
}

void dro_cross_entropy_bwd_(Tensor logits, Tensor target, Tensor tau, Tensor scale, Tensor rows,
                            int64_t ignore_index, double label_smoothing, double z_loss,
                            double softcap, int64_t begin, int64_t vocab_size) {
  backward(logits, logits, target, tau, scale, rows, ignore_index, label_smoothing, z_loss, softcap,
           begin, vocab_size);
}

void scale_rows_(Tensor grad, Tensor scale) {
  const OnDevice on(kName, grad);
  Params params = shape_params(grad);
  params.grad = grad.mutable_data_ptr();
  params.grad_stride = grad.stride(0);
  params.scale = static_cast<const float*>(scale.const_data_ptr());
  params.scale_stride = scale.stride(0);
  for_dtype(kName, "grad", grad, [&](auto zero) {
    launch_scale<decltype(zero)>(params, on.multiprocessors, on.stream);
  });
}

}  // namespace

LaunchPlan launch_plan(int64_t n, int64_t v, const std::string& dtype, int arch) {
  if (n < 1 || n > kMaxRows) throw_bad_argument("launch_plan", "N", "in [1, 2^28)");
  if (v < 1 || v > kMaxColumns) throw_bad_argument("launch_plan", "V", "in [1, 2^28]");
  int devices = 0, multiprocessors = 132;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  if (devices) {
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0),
          "cudaDeviceGetAttribute");
  }
  const auto describe = [&](auto zero) {
    using Z = decltype(zero);
    const bool aligned = v % kColumns<Z> == 0;
    const Plan plan =
        plan_forward(n, int(v), sizeof(Z), aligned, arch, multiprocessors, kGradient, true, false);
    int registers = -1;
    if (devices)
      registers = attributes_of(forward_kernel<Z, kGradient>(plan.kernel, aligned)).numRegs;
    return LaunchPlan{kernel_name(plan.kernel),
                      plan.cluster,
                      plan.threads,
                      plan.vectors,
                      plan.slice,
                      merge_bytes(plan.threads, plan.cluster),
                      registers};
  };
  if (dtype == "float32") return describe(float{});
  if (dtype == "bfloat16") return describe(device::BFloat16{});
  if (dtype == "float16") return describe(device::Half{});
  throw_bad_argument("launch_plan", "dtype", "'float32', 'bfloat16' or 'float16'");
}

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("dro_cross_entropy_fwd.native", TORCH_BOX(&dro_cross_entropy_fwd));
  library.impl("dro_cross_entropy_fwd_.native", TORCH_BOX(&dro_cross_entropy_fwd_));
  library.impl("dro_cross_entropy_stats.native", TORCH_BOX(&dro_cross_entropy_stats));
  library.impl("dro_cross_entropy_bwd.native", TORCH_BOX(&dro_cross_entropy_bwd));
  library.impl("dro_cross_entropy_bwd_.native", TORCH_BOX(&dro_cross_entropy_bwd_));
  library.impl("scale_rows_.native", TORCH_BOX(&scale_rows_));
}

}  // namespace tempnet
