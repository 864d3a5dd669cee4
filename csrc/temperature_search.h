// The search for the temperature of a row with kl(tau) = rho (docs/numerics.md): Newton with a
// bracket, on sums over the row that its owner makes. No torch, no CUDA header: g++ and nvcc
// compile it unchanged.
#pragma once

#include <cmath>
#include <limits>

#include "online_softmax.h"

namespace tempnet {

// With d_j = z_j - max z and u_j = d_j log2(e) / tau: the sums of 2^u, 2^u u and 2^u u^2. Centred
// before the product: tau is searched, and at a small one z_j log2(e) / tau may have no digit left.
template <class T>
struct Moments {
  T s = 0, sx = 0, sxx = 0;
};

template <class T>
struct TemperatureSearch {
  static constexpr int kMostEvaluations = 30;
  // Of |kl - rho|, in nats: about three times the rounding of kl.
  static constexpr T kTolerance = sizeof(T) == 4 ? T(3e-6) : T(1e-12);
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  T rho, log_v, inverse_v, tau_min, tau_max;
  T tau = 0;                               // where the sums are wanted
  T kl = 0;                                // at tau
  T low = 0, high = kInfinity;             // evaluated: kl > rho at low, kl < rho at high
  T last = kInfinity, before = kInfinity;  // |kl - rho| of the last evaluation and of that before
  int evaluations = 0;

  // From the number of columns with a finite d_j (s), the sum of these d_j and of their squares.
  TEMPNET_INLINE void begin(const Moments<T>& d) {
    const T mean = d.sx / d.s, variance = d.sxx / d.s - mean * mean;
    // At a large tau, kl = log(V / number) + variance / (2 tau^2); of normal logits at any that
    // matters.
    const T excess = rho + std::log(d.s * inverse_v);
    tau = excess > 0 ? std::sqrt(variance / (2 * excess)) : tau_max;
    // No kl is above log V, and kl of equal logits does not depend on tau.
    if (rho >= log_v || !(variance > 0)) tau = tau_min;
    tau = clamped(tau);
  }

  // Takes the sums at tau. Whether they are wanted at another tau; if not, tau is the result.
  TEMPNET_INLINE bool next(const Moments<T>& at) {
    const T ln2 = Constants<T>::kLn2;
    const T mean = at.sx / at.s;
    kl = ln2 * (mean - std::log2(at.s * inverse_v));
    kl = kl < 0 ? T(0) : kl > log_v ? log_v : kl;  // comparisons that keep NaN
    const T excess = kl - rho, error = std::abs(excess);
    ++evaluations;
    if (!(error >= 0)) tau = kl = excess;  // NaN
    const bool clipped = excess > 0 ? tau >= tau_max : tau <= tau_min;
    if (!(error > kTolerance) || clipped || evaluations == kMostEvaluations) return false;
    if (excess > 0) {
      low = tau;
    } else {
      high = tau;
    }
    // -d kl / d log tau. The largest logit has u = 0 and a weight of at least 1 / V, so the
    // variance is at least mean^2 / V and does not drown in the rounding of mean^2.
    const T slope = ln2 * ln2 * (at.sxx / at.s - mean * mean);
    // Newton for log(kl / (log V - kl)) as a function of log tau: nearly straight where kl is small
    // (kl ~ tau^-2) as well as where it saturates.
    const T rest = log_v - kl;
    const T odds = kl * (log_v - rho) / (rest * rho);
    T to = clamped(tau * std::exp2(std::log2(odds) * kl * rest / (log_v * slope)));
    // kl is 0 or log V, all there can be: nothing says how far the root is.
    if (!(to > 0)) to = excess > 0 ? tau_max : tau_min;
    const bool slow = error > T(0.9) * before;
    before = last;
    last = error;
    tau = to;
    if (slow || !(low < to && to < high)) {
      tau = std::sqrt(clamped(low)) * std::sqrt(clamped(high));
      before = last = kInfinity;
    }
    // Nothing is left between them.
    if (!(low < tau && tau < high)) {
      tau = excess > 0 ? low : high;
      return false;
    }
    return true;
  }

  TEMPNET_INLINE T clamped(T x) const { return x < tau_min ? tau_min : x > tau_max ? tau_max : x; }
};

}  // namespace tempnet
