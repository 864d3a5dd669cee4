// The softcap c of logits: the loss is taken of z' = c tanh(z / c). What makes a logit the exponent
// u = z' a - m is then a Capped, and without a softcap the number a: `logit` takes both.
#pragma once

#include "online_softmax.h"

namespace tempnet {

// inverse_c is not to be multiplied by alone: its rounding would shift all logits one way.
template <class T>
struct Capped {
  T a, c, inverse_c;
};

template <class Scale>
constexpr bool is_capped = false;
template <class T>
constexpr bool is_capped<Capped<T>> = true;

template <bool kCapped, class T>
TEMPNET_INLINE auto scale_of(T c, T a) {
  if constexpr (kCapped) {
    return Capped<T>{a, c, 1 / c};
  } else {
    return a;
  }
}

TEMPNET_INLINE float factor_of(float a) { return a; }
TEMPNET_INLINE double factor_of(double a) { return a; }
template <class T>
TEMPNET_INLINE T factor_of(const Capped<T>& scale) {
  return scale.a;
}

// The logit z' that the loss is taken of, and d z' / d z.
template <class T>
struct Logit {
  T value, slope;
};

// tanh in fp32: y + y^3 P(y^2) for |x| = y < kEnd, with a relative error of 4e-8, and above, where
// it does not cancel, 1 - 2 e / (1 + e) with e = 2^(kRate y); its derivative 4 e / (1 + e)^2.
struct Tanh {
  static constexpr float kEnd = 0.55f, kRate = -2.88539008f;
  static constexpr float k3 = -0.33332947f, k5 = 0.13320725f, k7 = -0.052671812f, k9 = 0.016437578f;
};

}  // namespace tempnet
