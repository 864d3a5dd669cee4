// The token loss on the CPU. A row is read from memory once: block by block into the state of
// online_softmax.h, then again, out of the cache, for its gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_cross_entropy";
struct Target {
  const void* data;
  int64_t stride;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
};

template <class Z, class T>
struct Args {
  int64_t n, v;
  const Z* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  Z* grad;  // null where no gradient is wanted; may be the logits
  int64_t grad_stride;
  Target target;
  Strided<const T> tau, scale;
  T* loss;          // [n]
  T* rows;          // [kRowFields, n]
  int64_t* argmax;  // [n] or null
  T* parts;         // [kPartFields, n]
  int64_t ignore_index;
  LossOptions<T> options;
  T softcap;                  // 0 for none
  int64_t begin, vocab_size;  // the logits are the columns [begin, begin + v) of vocab_size

  bool in_vocabulary(int64_t y) const { return y >= 0 && y < vocab_size; }
  bool held(int64_t y) const { return y >= begin && y < begin + v; }
};

// The state of a row of v columns.
template <class T>
struct RowSums {
  RowState<T> state;
  T zmax = -std::numeric_limits<T>::infinity();
  T su = 0;                  // sum_j u_j
  int64_t argmax_block = 0;  // the first column of the block that holds the largest logit
};

template <bool kFma, class Z, class Scale>
TEMPNET_INLINE auto reduce_row(const Z* z, int64_t v, const Scale& scale) {
  using T = decltype(factor_of(scale));
  RowSums<T> sums;
  for (int64_t j = 0; j < v; j += kBlock) {
    const int64_t count = std::min(kBlock, v - j);
    const Block<T> block = reduce_block<kFma>(z + j, count, scale);
    if (block.zmax > sums.zmax) {
      sums.argmax_block = j;
      sums.zmax = block.zmax;
    }
    const RowState<T> merged = merge(sums.state, block.state);
    sums.su += T(j) * (sums.state.m - merged.m) + block.su + T(count) * (block.state.m - merged.m);
    sums.state = merged;
  }
  return sums;
}

// The first column with the largest logit, in a row with a finite softmax.
template <class Z, class T>
TEMPNET_INLINE int64_t argmax_of(const Z* z, const RowSums<T>& sums) {
  int64_t j = sums.argmax_block;
  while (T(load(z[j])) != sums.zmax) ++j;
  return j;
}

// grad_j = scale * (c p_j - q_j), with p_j = 2^u_j / s, times the slope of the softcap. grad may be
// z; y is the target's column, or negative where it is another process's.
template <bool kFma, class Z, class T, class Scale>
TEMPNET_INLINE void write_gradient(const Args<Z, T>& args, const Z* z, Z* grad, int64_t y,
                                   const Scale& exponent, T m, T inverse_s, T c, T scale) {
  const T a = factor_of(exponent);
  const int64_t v = args.v;
  const T label_smoothing = args.options.label_smoothing, vocab_size = T(args.vocab_size);
  const T factor = scale * c * inverse_s;
  const T uniform = scale * label_smoothing / vocab_size;
  // In fp32 before it is rounded to the gradient's type: p_y - 1 cancels.
  const Logit<T> own = logit(T(load(z[y < 0 ? 0 : y])), exponent);
  const T p_y = weight<kFma>(own.value, a, m) * inverse_s;
  const T grad_y = scale * ((c * p_y - 1) + label_smoothing * (1 - 1 / vocab_size)) * own.slope;
#pragma omp simd
  for (int64_t j = 0; j < v; ++j) {
    const Logit<T> x = logit(T(load(z[j])), exponent);
    grad[j] = store<Z>((weight<kFma>(x.value, a, m) * factor - uniform) * x.slope);
  }
  if (y >= 0) grad[y] = store<Z>(grad_y);
}

template <class Z, class T, bool kCapped>
struct ForwardRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row<kFma>(args, i);
  }

  template <bool kFma>
  static TEMPNET_INLINE void row(const Args<Z, T>& args, int64_t i) {
    const T nan = std::numeric_limits<T>::quiet_NaN(),
            infinity = std::numeric_limits<T>::infinity();
    const int64_t n = args.n, v = args.v;
    const Z* z = args.logits + i * args.logits_stride;
    Z* grad = args.grad ? args.grad + i * args.grad_stride : nullptr;
    const int64_t y = args.target[i];
    const T tau = args.tau[i], scale = args.scale[i];
    const bool ignored = y == args.ignore_index;
    T* rows = args.rows + i;

    if (ignored || !(tau > 0 && tau < infinity)) {
      const T value = ignored ? T(0) : nan, scaled = scale == 0 ? T(0) : value;
      args.loss[i] = rows[kGradTau * n] = scaled;
      rows[kLoss * n] = value;
      for (int field = kM; field < kRowFields; ++field) rows[field * n] = nan;
      if (args.argmax) args.argmax[i] = -1;
      if (grad) std::fill(grad, grad + v, store<Z>(scaled));
      return;
    }

    const auto exponent = scale_of<kCapped>(args.softcap, Constants<T>::kLog2e / tau);
    const RowSums<T> sums = reduce_row<kFma>(z, v, exponent);
    const RowState<T>& state = sums.state;
    const RowResult<T> r =
        finish(state, logit(sums.zmax, exponent).value, logit(T(load(z[y])), exponent).value,
               sums.su / T(v), tau, args.options);
    args.loss[i] = scale == 0 ? T(0) : scale * r.loss;
    rows[kLoss * n] = r.loss;
    rows[kGradTau * n] = scale == 0 ? T(0) : scale * r.grad_tau;
    rows[kM * n] = state.m;
    rows[kLog2S * n] = r.log2_s;
    rows[kEntropy * n] = r.entropy;
    rows[kLogProb * n] = r.log_prob;
    if (args.argmax) args.argmax[i] = std::isfinite(r.log2_s) ? argmax_of(z, sums) : -1;
    if (grad && scale == 0) {
      std::fill(grad, grad + v, store<Z>(T(0)));
    } else if (grad) {
      // fp16 is stored unscaled: p / N underflows where no loss scale can bring it back.
      const T stored = std::is_same<Z, Half>::value ? T(1) : scale;
      write_gradient<kFma>(args, z, grad, y, exponent, state.m, 1 / state.s, r.c, stored);
    }
  }
};

// The state of these columns.
template <class Z, class T, bool kCapped>
struct StatsRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    const T nan = std::numeric_limits<T>::quiet_NaN(),
            infinity = std::numeric_limits<T>::infinity();
    for (int64_t i = begin; i < end; ++i) {
      const Z* z = args.logits + i * args.logits_stride;
      const int64_t y = args.target[i];
      const T tau = args.tau[i];
      if (y == args.ignore_index || !args.in_vocabulary(y) || !(tau > 0 && tau < infinity)) {
        for (int field = 0; field < kPartFields; ++field) args.parts[field * args.n + i] = nan;
        if (args.argmax) args.argmax[i] = -1;
        continue;
      }
      const auto exponent = scale_of<kCapped>(args.softcap, Constants<T>::kLog2e / tau);
      const RowSums<T> sums = reduce_row<kFma>(z, args.v, exponent);
      const T z_y = args.held(y) ? T(load(z[y - args.begin])) : -infinity;
      const T delta = rounding_of_maximum(logit(sums.zmax, exponent).value, sums.state.m, tau);
      store_part(args.parts + i, args.n, sums.state, sums.zmax, delta, z_y, sums.su / T(args.v));
      if (args.argmax) {
        // Of columns that are all -inf the first is as good as any; NaN has none.
        args.argmax[i] = std::isnan(sums.state.s) ? -1 : args.begin + argmax_of(z, sums);
      }
    }
  }
};

// From the state that the forward left in rows.
template <class Z, class T, bool kCapped>
struct BackwardRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    const int64_t n = args.n, v = args.v;
    for (int64_t i = begin; i < end; ++i) {
      Z* grad = args.grad + i * args.grad_stride;
      const int64_t y = args.target[i];
      const T tau = args.tau[i], scale = args.scale[i];
      const T m = args.rows[kM * n + i], log2_s = args.rows[kLog2S * n + i];
      if (y == args.ignore_index || scale == 0) {
        std::fill(grad, grad + v, store<Z>(T(0)));
        continue;
      }
      const T c = probability_factor(args.options.z_loss, Constants<T>::kLn2 * (m + log2_s), tau);
      write_gradient<kFma>(args, args.logits + i * args.logits_stride, grad,
                           args.held(y) ? y - args.begin : -1,
                           scale_of<kCapped>(args.softcap, Constants<T>::kLog2e / tau), m,
                           std::exp2(-log2_s), c, scale);
    }
  }
};

template <class Z, class T>
struct ScaleRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Z* grad = args.grad + i * args.grad_stride;
      const T scale = args.scale[i];
      if (scale == 1) continue;
      if (scale == 0) {  // also where the gradient is NaN
        std::fill(grad, grad + args.v, store<Z>(T(0)));
        continue;
      }
#pragma omp simd
      for (int64_t j = 0; j < args.v; ++j) grad[j] = store<Z>(load(grad[j]) * scale);
    }
  }
};

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
  args.target = {target.const_data_ptr(), target.stride(0),
                 target.scalar_type() == ScalarType::Long};
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
  Tensor loss = torch::stable::new_empty(tau, {n});
  Tensor rows = torch::stable::new_empty(tau, {kRowFields, n});
  Tensor argmax = torch::stable::new_empty(tau, {want_argmax ? n : 0}, ScalarType::Long);
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
    run_capped<ForwardRows, Z, T>(args);
  });
  return {loss, rows, argmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dro_cross_entropy_fwd(
    Tensor logits, Tensor target, Tensor tau, Tensor scale, double rho, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, bool want_grad, bool want_argmax) {
  const int64_t grad_rows = want_grad ? logits.size(0) : 0;
  Tensor grad = torch::stable::new_empty(logits, {grad_rows, logits.size(1)});
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
  Tensor parts = torch::stable::new_empty(tau, {kPartFields, n});
  Tensor argmax = torch::stable::new_empty(tau, {want_argmax ? n : 0}, ScalarType::Long);
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
  Tensor grad = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
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
