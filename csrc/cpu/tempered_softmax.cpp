// The tempered softmax on the CPU. A row is read from memory once: block by block into its sums,
// then again, out of the cache, for what is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "../tensors.h"
#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::stable::Tensor;

constexpr const char* kName = "tempered_softmax";

template <class Z, class T>
struct Args {
  int64_t n, v;
  const Z* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  const Z* grad_output;  // the same
  int64_t grad_output_stride;
  Z* out;  // [n, v]: the output, or grad_logits; null where that is not wanted
  Strided<const T> tau;
  T* rows;      // [kSoftmaxFields, n]
  T* grad_tau;  // [n]
};

// log2(e) / tau, NaN for a bad temperature: everything of the row then is.
template <class T>
TEMPNET_INLINE T exponent_factor(T tau) {
  const bool good = tau > 0 && tau < std::numeric_limits<T>::infinity();
  return good ? Constants<T>::kLog2e / tau : std::numeric_limits<T>::quiet_NaN();
}

// The exponent (z - zmax) * a of a weight, exactly 0 for the largest logit.
template <class T>
TEMPNET_INLINE T exponent(T z, T zmax, T a) {
  return (z - zmax) * a;
}

template <class Z, class T, bool kLog>
struct ForwardRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row<kFma>(args, i);
  }

  template <bool kFma>
  static TEMPNET_INLINE void row(const Args<Z, T>& args, int64_t i) {
    const int64_t n = args.n, v = args.v;
    const Z* z = args.logits + i * args.logits_stride;
    Z* out = args.out + i * v;
    const T tau = args.tau[i], a = exponent_factor(tau);
    RowState<T> state;
    T zmax = -std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < v; j += kBlock) {
      const Block<T> block = reduce_block<kFma>(z + j, std::min(kBlock, v - j), a);
      state = merge(state, block.state);
      zmax = std::max(zmax, block.zmax);
    }
    const T delta = centred<kFma>(zmax, a, state.m);
    const T top = exp2_clamped(clamp_exponent(delta));
    const SoftmaxRow<T> r = relative_to_largest(state, zmax, a, delta, top);
    args.rows[kSoftmaxZmax * n + i] = zmax;
    args.rows[kSoftmaxS * n + i] = r.s;
    args.rows[kSoftmaxMean * n + i] = r.mean;
    const T log_s = std::log(r.s), inverse_tau = 1 / tau, inverse_s = 1 / r.s;
#pragma omp simd
    for (int64_t j = 0; j < v; ++j) {
      const T x = load(z[j]);
      out[j] = store<Z>(kLog ? (x - zmax) * inverse_tau - log_s
                             : exp2_clamped(clamp_exponent(exponent(x, zmax, a))) * inverse_s);
    }
  }
};

// Columns of two streams that are widened at a time, and that are summed in fp32: an upstream
// gradient has any sign, so that an error of a long sum is large beside the sum.
constexpr int64_t kPair = 128;

template <class Z, class T, bool kLog>
struct BackwardRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(args, i);
  }

  static TEMPNET_INLINE void row(const Args<Z, T>& args, int64_t i) {
    const int64_t n = args.n, v = args.v;
    const Z* z = args.logits + i * args.logits_stride;
    const Z* g = args.grad_output + i * args.grad_output_stride;
    Z* grad = args.out ? args.out + i * v : nullptr;
    const T tau = args.tau[i], a = exponent_factor(tau);
    const T zmax = args.rows[kSoftmaxZmax * n + i], inverse_s = 1 / args.rows[kSoftmaxS * n + i];
    const T mean = args.rows[kSoftmaxMean * n + i];
    T z_scratch[kPair], g_scratch[kPair], c[kPair];

    double sum = 0;  // of 2^u_j g_j, or for the logarithm of g_j
    for (int64_t j = 0; j < v; j += kPair) {
      const int64_t count = std::min(kPair, v - j);
      const T* x = widen(z + j, z_scratch, count);
      const T* y = widen(g + j, g_scratch, count);
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t k = 0; k < count; ++k) {
        const T e = exp2_clamped(clamp_exponent(exponent(x[k], zmax, a)));
        part += kLog ? y[k] : e == 0 ? T(0) : e * y[k];
      }
      sum += part;
      prefetch(z + j + kBlock, kPair);
      prefetch(g + j + kBlock, kPair);
    }
    // Divided here, not weight by weight: s is the sum of the same weights.
    const T total = kLog ? T(sum) : T(sum) * inverse_s, inverse_tau = 1 / tau;

    // c_j / tau is the logit's gradient, and tau's -1 / tau^2 times this sum of c_j (z_j - zmax -
    // mean): the exponents' factor has no part in it, nor has its rounding.
    double covariance = 0;
    for (int64_t j = 0; j < v; j += kPair) {
      const int64_t count = std::min(kPair, v - j);
      const T* x = widen(z + j, z_scratch, count);
      const T* y = widen(g + j, g_scratch, count);
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t k = 0; k < count; ++k) {
        const T p = exp2_clamped(clamp_exponent(exponent(x[k], zmax, a))) * inverse_s;
        c[k] = kLog ? y[k] - p * total : p == 0 ? T(0) : p * (y[k] - total);
        part += c[k] == 0 ? T(0) : c[k] * (x[k] - zmax - mean);  // 0 * -inf is NaN
      }
      covariance += part;
      if (!grad) continue;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) grad[j + k] = store<Z>(c[k] * inverse_tau);
    }
    args.grad_tau[i] = -T(covariance / tau / tau);
  }
};

template <class Z, class T>
Args<Z, T> row_args(const Tensor& logits, const Tensor& tau, const Tensor& rows) {
  Args<Z, T> args{};
  args.n = logits.size(0);
  args.v = logits.size(1);
  if (args.v > 1 && logits.stride(1) != 1) {
    throw_bad_argument(kName, "logits", "of column stride 1");
  }
  args.logits = static_cast<const Z*>(logits.const_data_ptr());
  args.logits_stride = logits.stride(0);
  args.tau = strided<T>(tau);
  args.rows = static_cast<T*>(rows.mutable_data_ptr());
  return args;
}

std::tuple<Tensor, Tensor> tempered_softmax_fwd(Tensor logits, Tensor tau, bool is_log) {
  const int64_t n = logits.size(0);
  Tensor output = allocate(logits, {n, logits.size(1)});
  Tensor rows = allocate(tau, {kSoftmaxFields, n});
  for_dtype(kName, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = row_args<Z, T>(logits, tau, rows);
    args.out = static_cast<Z*>(output.mutable_data_ptr());
    if (is_log) {
      run_parallel<ForwardRows<Z, T, true>>(args, args.n, args.v);
    } else {
      run_parallel<ForwardRows<Z, T, false>>(args, args.n, args.v);
    }
  });
  return {output, rows};
}

std::tuple<Tensor, Tensor> tempered_softmax_bwd(Tensor logits, Tensor tau, Tensor rows,
                                                Tensor grad_output, bool is_log,
                                                bool want_grad_logits) {
  const int64_t n = logits.size(0), v = logits.size(1);
  if (v > 1 && grad_output.stride(1) != 1) {
    throw_bad_argument(kName, "grad_output", "of column stride 1");
  }
  Tensor grad_logits = allocate(logits, {want_grad_logits ? n : 0, v});
  Tensor grad_tau = allocate(tau, {n});
  for_dtype(kName, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    auto args = row_args<Z, T>(logits, tau, rows);
    args.grad_output = static_cast<const Z*>(grad_output.const_data_ptr());
    args.grad_output_stride = grad_output.stride(0);
    args.out = want_grad_logits ? static_cast<Z*>(grad_logits.mutable_data_ptr()) : nullptr;
    args.grad_tau = static_cast<T*>(grad_tau.mutable_data_ptr());
    if (is_log) {
      run_parallel<BackwardRows<Z, T, true>>(args, args.n, args.v);
    } else {
      run_parallel<BackwardRows<Z, T, false>>(args, args.n, args.v);
    }
  });
  return {grad_logits, grad_tau};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("tempered_softmax_fwd.native", TORCH_BOX(&tempered_softmax_fwd));
  library.impl("tempered_softmax_bwd.native", TORCH_BOX(&tempered_softmax_bwd));
}

}  // namespace tempnet
