// The operators of the token loss on the CPU.
#include "dro_cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../tensors.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_cross_entropy";

// Everything of Args that all three ops read off the gradient's or the logits' shape.
template <class Z, class T>
Args<Z, T> shape_args(const Tensor& wide) {
  Args<Z, T> args{};
  args.n = wide.size(0);
  args.v = wide.size(1);
  if (args.v > 1 && wide.stride(1) != 1) {
    throw_bad_argument(kName, "logits", "of column stride 1");
  }
  return args;
}

// Of these rows and columns, without a check of the targets.
template <class Z, class T>
Args<Z, T> state_args(const Tensor& logits, const Tensor& target, const Tensor& tau,
                      int64_t ignore_index, double softcap, int64_t begin, int64_t vocab_size) {
  Args<Z, T> args = shape_args<Z, T>(logits);
  args.logits = static_cast<const Z*>(logits.const_data_ptr());
  args.logits_stride = logits.stride(0);
  args.target = target_of(target);
  args.tau = strided<T>(tau);
  args.ignore_index = ignore_index;
  args.softcap = T(softcap);
  args.begin = begin;
  args.vocab_size = vocab_size;
  return args;
}

template <class Z, class T>
Args<Z, T> row_args(const Tensor& logits, const Tensor& target, const Tensor& tau,
                    const Tensor& scale, int64_t ignore_index, double rho, double label_smoothing,
                    double z_loss, double softcap, int64_t begin, int64_t vocab_size) {
  auto args = state_args<Z, T>(logits, target, tau, ignore_index, softcap, begin, vocab_size);
  args.scale = strided<T>(scale);
  args.options = {T(rho), T(std::log(double(vocab_size))), T(label_smoothing), T(z_loss)};
  for (int64_t i = 0; i < args.n; ++i) {
    const int64_t y = args.target[i];
    if (y != ignore_index && !args.in_vocabulary(y)) {
      throw_bad_target(kName, i, y, vocab_size, ignore_index);
    }
  }
  return args;
}

using RowTensors = std::tuple<Tensor, Tensor, Tensor>;

// grad: undefined where none is wanted; may be the logits.
RowTensors forward(const Tensor& logits, const Tensor* grad, const Tensor& target,
                   const Tensor& tau, const Tensor& scale, double rho, int64_t ignore_index,
                   double label_smoothing, double z_loss, double softcap, bool want_argmax) {
  const int64_t n = logits.size(0);
  Tensor loss = allocate(tau, {n});
  Tensor rows = allocate(tau, {kRowFields, n});
  Tensor argmax = allocate(tau, {want_argmax ? n : 0}, ScalarType::Long);
  for_dtype(kName, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = row_args<Z, T>(logits, target, tau, scale, ignore_index, rho, label_smoothing,
                               z_loss, softcap, 0, logits.size(1));
    if (grad) {
      args.grad = static_cast<Z*>(grad->mutable_data_ptr());
      args.grad_stride = grad->stride(0);
    }
    args.loss = static_cast<T*>(loss.mutable_data_ptr());
    args.rows = static_cast<T*>(rows.mutable_data_ptr());
    args.argmax = want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr;
    if (args.n < torch::stable::get_num_threads() && args.v > kSlice) {
      args.softcap > 0 ? forward_sliced<true>(args) : forward_sliced<false>(args);
    } else {
      run_capped<ForwardRows, Z, T>(args);
    }
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
                                                   int64_t begin, int64_t vocab_size, bool,
                                                   bool want_argmax) {
  const int64_t n = logits.size(0);
  Tensor parts = allocate(tau, {kPartFields, n});
  Tensor argmax = allocate(tau, {want_argmax ? n : 0}, ScalarType::Long);
  for_dtype(kName, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = state_args<Z, T>(logits, target, tau, ignore_index, softcap, begin, vocab_size);
    args.parts = static_cast<T*>(parts.mutable_data_ptr());
    args.argmax = want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr;
    run_capped<StatsRows, Z, T>(args);
  });
  return {parts, argmax};
}

// grad may be the logits.
void backward(const Tensor& logits, const Tensor& grad, const Tensor& target, const Tensor& tau,
              const Tensor& scale, const Tensor& rows, int64_t ignore_index, double label_smoothing,
              double z_loss, double softcap, int64_t begin, int64_t vocab_size) {
  for_dtype(kName, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = row_args<Z, T>(logits, target, tau, scale, ignore_index, 0, label_smoothing, z_loss,
                               softcap, begin, vocab_size);
    args.grad = static_cast<Z*>(grad.mutable_data_ptr());
    args.grad_stride = grad.stride(0);
    args.rows = static_cast<T*>(rows.mutable_data_ptr());
    run_capped<BackwardRows, Z, T>(args);
  });
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
  for_dtype(kName, "grad", grad, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = shape_args<Z, T>(grad);
    args.grad = static_cast<Z*>(grad.mutable_data_ptr());
    args.grad_stride = grad.stride(0);
    args.scale = strided<T>(scale);
    run_parallel<ScaleRows<Z, T>>(args, args.n, args.v);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("dro_cross_entropy_fwd.native", TORCH_BOX(&dro_cross_entropy_fwd));
  library.impl("dro_cross_entropy_fwd_.native", TORCH_BOX(&dro_cross_entropy_fwd_));
  library.impl("dro_cross_entropy_stats.native", TORCH_BOX(&dro_cross_entropy_stats));
  library.impl("dro_cross_entropy_bwd.native", TORCH_BOX(&dro_cross_entropy_bwd));
  library.impl("dro_cross_entropy_bwd_.native", TORCH_BOX(&dro_cross_entropy_bwd_));
  library.impl("scale_rows_.native", TORCH_BOX(&scale_rows_));
}

}  // namespace tempnet
