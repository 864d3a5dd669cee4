// The algebra of the tempered softmax over a row, in base 2 and centred (docs/numerics.md). No
// torch, no CUDA header: g++ and nvcc compile it unchanged.
//
// With a = log2(e) / tau and u_j = z_j * a - m, a partial row is the state (m, s, sx):
//   m  = the rounded value of max_j(z_j) * a,   s = sum_j 2^u_j,   sx = sum_j 2^u_j u_j
// Every term of s and of sx has one sign, so nothing cancels, whatever the offset of the logits.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define TEMPNET_INLINE __host__ __device__ __forceinline__
#else
#define TEMPNET_INLINE inline __attribute__((always_inline))
#endif

namespace tempnet {

template <class T>
struct Constants {
  static constexpr T kLn2 = T(0.693147180559945309417232121458);
  static constexpr T kLog2e = T(1.44269504088896340735992468100);
  // The maximum of nothing. Finite: -inf - -inf would be NaN. No less: the rounding of a smaller m
  // is more than 2^u can take, and a part of only such logits (a mask of -1e10) would be infinite.
  static constexpr T kEmpty = sizeof(T) == 4 ? T(-0x1p31) : T(-0x1p60);
  // 2^u is 0 long before this, and 0 * -inf would be NaN: u is clamped here inside the product of
  // sx only.
  static constexpr T kFloor = sizeof(T) == 4 ? T(-300) : T(-2000);
};

template <class T>
struct RowState {
  T m = Constants<T>::kEmpty;
  T s = 0;
  T sx = 0;
};

// One term's contribution to sx, given e = 2^u.
template <class T>
TEMPNET_INLINE T weighted_exponent(T e, T u) {
  return e * (u < Constants<T>::kFloor ? Constants<T>::kFloor : u);
}

// The state of the union of two partial rows. RowState{} is the identity.
template <class T>
TEMPNET_INLINE RowState<T> merge(const RowState<T>& x, const RowState<T>& y) {
  RowState<T> r;
  r.m = x.m > y.m ? x.m : y.m;
  const T dx = x.m - r.m, dy = y.m - r.m;
  const T fx = std::exp2(dx), fy = std::exp2(dy);
  r.s = fx * x.s + fy * y.s;
  r.sx = fx * (x.sx + weighted_exponent(x.s, dx)) + fy * (y.sx + weighted_exponent(y.s, dy));
  return r;
}

// The rows of the per-row result, [kRowFields, N]; tempnet_kernels/core/fields.py has the
// same order.
enum RowField { kLoss, kGradTau, kM, kLog2S, kEntropy, kLogProb, kRowFields };

// What the tempered softmax keeps of a row for its backward, [kSoftmaxFields, N], relative to the
// largest logit itself and not to the rounded m: zmax, the sum of the weights, the weighted mean of
// z - zmax. The weight of the largest logit is then 1, and in a row of one column or of one
// confident logit so are the sum and p, exactly.
enum SoftmaxField { kSoftmaxZmax, kSoftmaxS, kSoftmaxMean, kSoftmaxFields };

template <class T>
struct SoftmaxRow {
  T zmax, s, mean;
};

// delta: fma(zmax, a, -m), what the rounding of m left out; top: 2^delta.
template <class T>
TEMPNET_INLINE SoftmaxRow<T> relative_to_largest(const RowState<T>& state, T zmax, T a, T delta,
                                                 T top) {
  return {zmax, state.s / top, (state.sx / state.s - delta) / a};
}

// c of d loss / d z = c p - q.
template <class T>
TEMPNET_INLINE T probability_factor(T z_loss, T lse, T tau) {
  return 1 + 2 * z_loss * lse / tau;
}

// What a row's loss is made of. Names as in docs/numerics.md.
template <class T>
struct LossOptions {
  T rho, log_v, label_smoothing, z_loss;
};

template <class T>
struct RowResult {
  T loss, grad_tau, log2_s, entropy, log_prob;
  T c;  // d loss / d z = c p - q
};

// m is the rounded zmax * a: what the rounding left out.
template <class T>
TEMPNET_INLINE T rounding_of_maximum(T zmax, T m, T tau) {
  return std::fma(zmax, Constants<T>::kLog2e / tau, -m);
}

// zmax: the largest logit; z_y: the target's; mean_u: mean_j u_j, read only with label smoothing.
template <class T>
TEMPNET_INLINE RowResult<T> finish(const RowState<T>& state, T zmax, T z_y, T mean_u, T tau,
                                   const LossOptions<T>& o) {
  const T ln2 = Constants<T>::kLn2;
  RowResult<T> r;
  r.log2_s = std::log2(state.s);
  const T delta = rounding_of_maximum(zmax, state.m, tau);
  const T centred_lse = ln2 * (r.log2_s - delta);
  const T lse = ln2 * (state.m + r.log2_s);
  const T entropy = ln2 * (r.log2_s - state.sx / state.s);
  // Comparisons that keep NaN.
  r.entropy = entropy < 0 ? T(0) : entropy > o.log_v ? o.log_v : entropy;
  T below = zmax - z_y;  // zmax - sum_j q_j z_j
  if (o.label_smoothing > 0) {
    const T mean_below = ln2 * tau * (delta - mean_u);
    below = (1 - o.label_smoothing) * below + o.label_smoothing * mean_below;
  }
  r.loss = below + tau * (centred_lse + o.rho - o.log_v) + o.z_loss * lse * lse;
  r.log_prob = (z_y - zmax) / tau - centred_lse;
  r.c = probability_factor(o.z_loss, lse, tau);
  r.grad_tau = r.entropy + o.rho - o.log_v - 2 * o.z_loss * lse * (lse - r.entropy) / tau;
  return r;
}

// The state of some columns of a row, for other processes to merge: [kPartFields, N];
// tempnet_kernels/core/fields.py has the same order.
enum PartField { kPartZmax, kPartM, kPartDelta, kPartS, kPartSx, kPartZy, kPartMeanU, kPartFields };

// part: the row's first field. zmax and z_y are logits as they were given, delta the rounding of
// the largest one that the loss is of.
template <class T>
TEMPNET_INLINE void store_part(T* part, int64_t n, const RowState<T>& state, T zmax, T delta, T z_y,
                               T mean_u) {
  part[kPartZmax * n] = zmax;
  part[kPartM * n] = state.m;
  part[kPartDelta * n] = delta;
  part[kPartS * n] = state.s;
  part[kPartSx * n] = state.sx;
  part[kPartZy * n] = z_y;
  part[kPartMeanU * n] = mean_u;
}

}  // namespace tempnet
