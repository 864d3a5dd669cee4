// The optimal temperature on the CPU. A row is read from memory once, into a copy that stays in the
// cache, and kl is evaluated there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <memory>
#include <tuple>

#include "../temperature_search.h"
#include "../tensors.h"
#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "optimal_temperature";

// Columns summed in T, at most 32 of them in a lane of a vector, before the sum goes on in double:
// equal terms all round the same way.
template <bool kFma>
constexpr int64_t kTerms = kFma && !kBaselineFma ? 256 : 128;

template <class Z, class T>
struct Args {
  int64_t v;
  const Z* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  Strided<const T> rho;
  T log_v, tau_min, tau_max;
  T *tau, *kl;          // [n]
  int32_t* iterations;  // [n]
};

template <class Z, class T>
struct Rows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> d(new T[args.v]);
    for (int64_t i = begin; i < end; ++i) row<kFma>(args, i, d.get());
  }

  template <bool kFma>
  static TEMPNET_INLINE void row(const Args<Z, T>& args, int64_t i, T* d) {
    const T rho = args.rho[i];
    TemperatureSearch<T> search;
    search.rho = rho >= 0 ? rho : std::numeric_limits<T>::quiet_NaN();
    search.log_v = args.log_v;
    search.inverse_v = 1 / T(args.v);
    search.tau_min = args.tau_min;
    search.tau_max = args.tau_max;
    search.begin(read(args.logits + i * args.logits_stride, args.v, d));
    while (search.next(evaluate<kFma>(d, args.v, Constants<T>::kLog2e / search.tau))) {
    }
    args.tau[i] = search.tau;
    args.kl[i] = search.kl;
    args.iterations[i] = search.evaluations;
  }

  // d_j = z_j - max z; returns the number of finite ones, their sum and that of their squares.
  static TEMPNET_INLINE Moments<T> read(const Z* z, int64_t v, T* d) {
    T zmax = -std::numeric_limits<T>::infinity();
    for (int64_t begin = 0; begin < v; begin += kBlock) {
      const int64_t end = std::min(v, begin + kBlock);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) d[j] = load(z[j]);
#pragma omp simd reduction(max : zmax)
      for (int64_t j = begin; j < end; ++j) {
        zmax = d[j] > zmax ? d[j] : zmax;  // drops NaN, which reaches the sums
      }
    }
    Moments<double> total;
    for (int64_t begin = 0; begin < v; begin += kSum) {
      const int64_t end = std::min(v, begin + kSum);
      T s = 0, sx = 0, sxx = 0;
#pragma omp simd reduction(+ : s, sx, sxx)
      for (int64_t j = begin; j < end; ++j) {
        d[j] -= zmax;
        const bool finite = d[j] >= -std::numeric_limits<T>::max();
        const T x = finite ? d[j] : T(0);
        s += finite ? T(1) : T(0);
        sx += x;
        sxx += x * x;
      }
      total.s += s;
      total.sx += sx;
      total.sxx += sxx;
    }
    return {T(total.s), T(total.sx), T(total.sxx)};
  }

  template <bool kFma>
  static TEMPNET_INLINE Moments<T> evaluate(const T* d, int64_t v, T a) {
    Moments<double> total;
    for (int64_t begin = 0; begin < v; begin += kTerms<kFma>) {
      const int64_t end = std::min(v, begin + kTerms<kFma>);
      T s = 0, sx = 0, sxx = 0;
#pragma omp simd reduction(+ : s, sx, sxx)
      for (int64_t j = begin; j < end; ++j) {
        const T u = clamp_exponent(d[j] * a);
        const T e = exp2_clamped(u), x = e * u;
        s += e;
        sx += x;
        sxx += x * u;
      }
      total.s += s;
      total.sx += sx;
      total.sxx += sxx;
    }
    return {T(total.s), T(total.sx), T(total.sxx)};
  }
};

std::tuple<Tensor, Tensor, Tensor> optimal_temperature(Tensor logits, Tensor rho, double tau_min,
                                                       double tau_max) {
  const int64_t n = logits.size(0), v = logits.size(1);
  if (v > 1 && logits.stride(1) != 1) throw_bad_argument(kName, "logits", "of column stride 1");
  Tensor tau = allocate(rho, {n});
  Tensor kl = allocate(rho, {n});
  Tensor iterations = allocate(rho, {n}, ScalarType::Int);
  for_dtype(kName, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    Args<Z, T> args{};
    args.v = v;
    args.logits = static_cast<const Z*>(logits.const_data_ptr());
    args.logits_stride = logits.stride(0);
    args.rho = strided<T>(rho);
    args.log_v = T(std::log(double(v)));
    args.tau_min = T(tau_min);
    args.tau_max = T(tau_max);
    args.tau = static_cast<T*>(tau.mutable_data_ptr());
    args.kl = static_cast<T*>(kl.mutable_data_ptr());
    args.iterations = static_cast<int32_t*>(iterations.mutable_data_ptr());
    run_parallel<Rows<Z, T>>(args, n, v);
  });
  return {tau, kl, iterations};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("optimal_temperature.native", TORCH_BOX(&optimal_temperature));
}

}  // namespace tempnet
