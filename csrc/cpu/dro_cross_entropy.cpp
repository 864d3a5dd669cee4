// The token loss on the CPU. A row is read from memory once: block by block into the state of
// online_softmax.h, then again, out of the cache, for its gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../online_softmax.h"
#include "vectorize.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_cross_entropy";
// Columns per block: 16 KiB of fp32 stay in the first-level cache between the block's two passes.
constexpr int64_t kBlock = 4096;
// Columns summed before the sum is added to the block's: without it the error grows with the row.
constexpr int64_t kSum = 512;

template <class T>
struct Strided {
  T* data;
  int64_t stride;
  T& operator[](int64_t i) const { return data[i * stride]; }
};

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
  int64_t ignore_index;
  LossOptions<T> options;
};

template <class T>
struct Block {
  RowState<T> state;
  T zmax;
  T su;  // sum_j u_j
};

template <class T>
TEMPNET_INLINE const T* widen(const T* z, T*, int64_t) {
  return z;
}
template <class Z, class T>
TEMPNET_INLINE const T* widen(const Z* z, T* scratch, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) scratch[j] = load(z[j]);
  return scratch;
}

template <bool kFma, class Z, class T>
TEMPNET_INLINE Block<T> reduce_block(const Z* logits, int64_t count, T a) {
  // 16-bit logits are converted once: the compiler does not vectorise a reduction over mixed
  // widths.
  T scratch[kBlock];
  const T* z = widen(logits, scratch, count);
  T zmax = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : zmax)
  for (int64_t j = 0; j < count; ++j) {
    zmax = z[j] > zmax ? z[j] : zmax;  // drops NaN, which reaches s below
  }
  const T m = std::max(zmax * a, Constants<T>::kEmpty);
  Block<T> block{{m, 0, 0}, zmax, 0};
  for (int64_t begin = 0; begin < count; begin += kSum) {
    const int64_t end = std::min(count, begin + kSum);
    T s = 0, sx = 0, su = 0;
#pragma omp simd reduction(+ : s, sx, su)
    for (int64_t j = begin; j < end; ++j) {
      const T u = centred<kFma>(z[j], a, m);
      const T clamped = clamp_exponent(u);
      const T e = exp2_clamped(clamped);
      s += e;
      sx += e * clamped;
      su += u;
    }
    prefetch(logits + kBlock + begin, kSum);
    block.state.s += s;
    block.state.sx += sx;
    block.su += su;
  }
  return block;
}

template <bool kFma, class T>
TEMPNET_INLINE T weight(T z, T a, T m) {
  return exp2_clamped(clamp_exponent(centred<kFma>(z, a, m)));
}

// grad_j = scale * (c p_j - q_j), with p_j = 2^u_j / s. grad may be z.
template <bool kFma, class Z, class T>
TEMPNET_INLINE void write_gradient(const Z* z, Z* grad, int64_t v, int64_t y, T a, T m, T inverse_s,
                                   T c, T scale, T label_smoothing) {
  const T factor = scale * c * inverse_s;
  const T uniform = scale * label_smoothing / T(v);
  // In fp32 before it is rounded to the gradient's type: p_y - 1 cancels.
  const T p_y = weight<kFma>(load(z[y]), a, m) * inverse_s;
  const T grad_y = scale * ((c * p_y - 1) + label_smoothing * (1 - 1 / T(v)));
#pragma omp simd
  for (int64_t j = 0; j < v; ++j) {
    grad[j] = store<Z>(weight<kFma>(load(z[j]), a, m) * factor - uniform);
  }
  grad[y] = store<Z>(grad_y);
}

template <class Z, class T>
struct ForwardRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row<kFma>(args, i);
  }

  template <bool kFma>
  static TEMPNET_INLINE void row(const Args<Z, T>& args, int64_t i) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t n = args.n, v = args.v;
    const Z* z = args.logits + i * args.logits_stride;
    Z* grad = args.grad ? args.grad + i * args.grad_stride : nullptr;
    const int64_t y = args.target[i];
    const T tau = args.tau[i], scale = args.scale[i];
    const bool ignored = y == args.ignore_index;
    T* rows = args.rows + i;

    if (ignored || !(tau > 0)) {
      const T value = ignored ? T(0) : nan, scaled = scale == 0 ? T(0) : value;
      args.loss[i] = rows[kGradTau * n] = scaled;
      rows[kLoss * n] = value;
      for (int field = kM; field < kRowFields; ++field) rows[field * n] = nan;
      if (args.argmax) args.argmax[i] = -1;
      if (grad) std::fill(grad, grad + v, store<Z>(scaled));
      return;
    }

    const T a = Constants<T>::kLog2e / tau;
    RowState<T> state;
    T zmax = -std::numeric_limits<T>::infinity(), su = 0;
    int64_t argmax_block = 0;
    for (int64_t j = 0; j < v; j += kBlock) {
      const int64_t count = std::min(kBlock, v - j);
      const Block<T> block = reduce_block<kFma>(z + j, count, a);
      if (block.zmax > zmax) {
        argmax_block = j;
        zmax = block.zmax;
      }
      const RowState<T> merged = merge(state, block.state);
      su += T(j) * (state.m - merged.m) + block.su + T(count) * (block.state.m - merged.m);
      state = merged;
    }

    const RowResult<T> r = finish(state, zmax, T(load(z[y])), su / T(v), tau, args.options);
    args.loss[i] = scale == 0 ? T(0) : scale * r.loss;
    rows[kLoss * n] = r.loss;
    rows[kGradTau * n] = scale == 0 ? T(0) : scale * r.grad_tau;
    rows[kM * n] = state.m;
    rows[kLog2S * n] = r.log2_s;
    rows[kEntropy * n] = r.entropy;
    rows[kLogProb * n] = r.log_prob;
    if (args.argmax) {
      int64_t j = std::isfinite(r.log2_s) ? argmax_block : -1;
      while (j >= 0 && T(load(z[j])) != zmax) ++j;
      args.argmax[i] = j;
    }
    if (grad && scale == 0) {
      std::fill(grad, grad + v, store<Z>(T(0)));
    } else if (grad) {
      // fp16 is stored unscaled: p / N underflows where no loss scale can bring it back.
      const T stored = std::is_same<Z, Half>::value ? T(1) : scale;
      write_gradient<kFma>(z, grad, v, y, a, state.m, 1 / state.s, r.c, stored,
                           args.options.label_smoothing);
    }
  }
};

// From the state that the forward left in rows.
template <class Z, class T>
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
      write_gradient<kFma>(args.logits + i * args.logits_stride, grad, v, y,
                           Constants<T>::kLog2e / tau, m, std::exp2(-log2_s), c, scale,
                           args.options.label_smoothing);
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

template <template <class, class> class Rows, class Z, class T>
void run_parallel(const Args<Z, T>& args) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / args.v);
  torch::stable::parallel_for(0, args.n, grain, [&](int64_t begin, int64_t end) {
    run_rows<Rows<Z, T>>(args, begin, end);
  });
}

template <class T>
Strided<const T> strided(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
}

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

template <class Z, class T>
Args<Z, T> row_args(const Tensor& logits, const Tensor& target, const Tensor& tau,
                    const Tensor& scale, int64_t ignore_index, double rho, double label_smoothing,
                    double z_loss) {
  Args<Z, T> args = shape_args<Z, T>(logits);
  args.logits = static_cast<const Z*>(logits.const_data_ptr());
  args.logits_stride = logits.stride(0);
  args.target = {target.const_data_ptr(), target.stride(0),
                 target.scalar_type() == ScalarType::Long};
  args.tau = strided<T>(tau);
  args.scale = strided<T>(scale);
  args.ignore_index = ignore_index;
  args.options = {T(rho), T(std::log(double(args.v))), T(label_smoothing), T(z_loss)};
  for (int64_t i = 0; i < args.n; ++i) {
    const int64_t y = args.target[i];
    if ((y < 0 || y >= args.v) && y != ignore_index) {
      throw_bad_target(kName, i, y, args.v, ignore_index);
    }
  }
  return args;
}

template <class Z, class T>
struct Types {
  using Storage = Z;
  using Accumulator = T;
};

template <class F>
void for_dtype(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(Types<float, float>{});
    case ScalarType::Double:
      return f(Types<double, double>{});
    case ScalarType::BFloat16:
      return f(Types<BFloat16, float>{});
    case ScalarType::Half:
      return f(Types<Half, float>{});
    default:
      throw_bad_argument(kName, "logits", "float32, float64, bfloat16 or float16");
  }
}

using RowTensors = std::tuple<Tensor, Tensor, Tensor>;

// grad: undefined where none is wanted; may be the logits.
RowTensors forward(const Tensor& logits, const Tensor* grad, const Tensor& target,
                   const Tensor& tau, const Tensor& scale, double rho, int64_t ignore_index,
                   double label_smoothing, double z_loss, bool want_argmax) {
  const int64_t n = logits.size(0);
  Tensor loss = torch::stable::new_empty(tau, {n});
  Tensor rows = torch::stable::new_empty(tau, {kRowFields, n});
  Tensor argmax = torch::stable::new_empty(tau, {want_argmax ? n : 0}, ScalarType::Long);
  for_dtype(logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args =
        row_args<Z, T>(logits, target, tau, scale, ignore_index, rho, label_smoothing, z_loss);
    if (grad) {
      args.grad = static_cast<Z*>(grad->mutable_data_ptr());
      args.grad_stride = grad->stride(0);
    }
    args.loss = static_cast<T*>(loss.mutable_data_ptr());
    args.rows = static_cast<T*>(rows.mutable_data_ptr());
    args.argmax = want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr;
    run_parallel<ForwardRows>(args);
  });
  return {loss, rows, argmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dro_cross_entropy_fwd(
    Tensor logits, Tensor target, Tensor tau, Tensor scale, double rho, int64_t ignore_index,
    double label_smoothing, double z_loss, bool want_grad, bool want_argmax) {
  const int64_t grad_rows = want_grad ? logits.size(0) : 0;
  Tensor grad = torch::stable::new_empty(logits, {grad_rows, logits.size(1)});
  auto [loss, rows, argmax] = forward(logits, want_grad ? &grad : nullptr, target, tau, scale, rho,
                                      ignore_index, label_smoothing, z_loss, want_argmax);
  return {grad, loss, rows, argmax};
}

RowTensors dro_cross_entropy_fwd_(Tensor logits, Tensor target, Tensor tau, Tensor scale,
                                  double rho, int64_t ignore_index, double label_smoothing,
                                  double z_loss, bool want_argmax) {
  return forward(logits, &logits, target, tau, scale, rho, ignore_index, label_smoothing, z_loss,
                 want_argmax);
}

Tensor dro_cross_entropy_bwd(Tensor logits, Tensor target, Tensor tau, Tensor scale, Tensor rows,
                             int64_t ignore_index, double label_smoothing, double z_loss) {
  Tensor grad = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  for_dtype(logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args =
        row_args<Z, T>(logits, target, tau, scale, ignore_index, 0, label_smoothing, z_loss);
    args.grad = static_cast<Z*>(grad.mutable_data_ptr());
    args.grad_stride = grad.stride(0);
    args.rows = static_cast<T*>(rows.mutable_data_ptr());
    run_parallel<BackwardRows>(args);
  });
  return grad;
}

void scale_rows_(Tensor grad, Tensor scale) {
  for_dtype(grad, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = shape_args<Z, T>(grad);
    args.grad = static_cast<Z*>(grad.mutable_data_ptr());
    args.grad_stride = grad.stride(0);
    args.scale = strided<T>(scale);
    run_parallel<ScaleRows>(args);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("dro_cross_entropy_fwd.native", TORCH_BOX(&dro_cross_entropy_fwd));
  library.impl("dro_cross_entropy_fwd_.native", TORCH_BOX(&dro_cross_entropy_fwd_));
  library.impl("dro_cross_entropy_bwd.native", TORCH_BOX(&dro_cross_entropy_bwd));
  library.impl("scale_rows_.native", TORCH_BOX(&scale_rows_));
}

}  // namespace tempnet
