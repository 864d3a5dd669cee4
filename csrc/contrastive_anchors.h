// What the states of one anchor of the contrastive loss give, in double: m - S_ii a cancels, and an
// anchor is one of a few thousand (docs/numerics.md). No torch, no CUDA header: g++ and nvcc
// compile it unchanged.
#pragma once

#include <cmath>
#include <cstdint>

#include "online_softmax.h"
#include "similarity_fields.h"

namespace tempnet {

// The rows of an anchor's statistics, [kAnchorFields, M]; tempnet_kernels/core/fields.py has the
// same order.
enum AnchorField { kLogSImage, kLogSText, kKlImage, kKlText, kKImage, kKText, kAnchorFields };

// a of an anchor without negatives and of a candidate that is no anchor: a weight 0 * 2^(z a). Not
// 0, whose product with the -inf of a masked pair is NaN.
template <class T>
constexpr T kNoAnchor = T(1e-30);

// Where an anchor's pair is: positive[i] among n columns, or without positives column i. Never read
// out of bounds: `inside` is false where it was not one of the n.
struct PairPlace {
  int64_t column;
  bool inside;
};
TEMPNET_INLINE PairPlace place_of_pair(const int64_t* positive, int64_t i, int64_t n) {
  if (!positive) return {i, true};
  const int64_t y = positive[i];
  return {y < 0 ? 0 : y >= n ? n - 1 : y, y >= 0 && y < n};
}

struct AnchorOptions {
  double gamma, rho, log_gamma, log_rest;  // log_rest: log(1 - gamma)

  AnchorOptions() = default;
  AnchorOptions(double gamma, double rho)
      : gamma(gamma), rho(rho), log_gamma(std::log(gamma)), log_rest(std::log1p(-gamma)) {}
};

struct AnchorResult {
  bool live;  // has a negative
  double term, log_s, kl, k, q, total;
};

// log(e^x + e^y)
TEMPNET_INLINE double log_of_sum(double x, double y) {
  if (x == y) return x + Constants<double>::kLn2;  // both -inf, too
  return (x > y ? x : y) + std::log1p(std::exp(-std::fabs(x - y)));
}

// state: the anchor's (m, s, sx); old: log s before this visit, NaN where there is none.
TEMPNET_INLINE AnchorResult anchor_result(const RowState<double>& state, double count,
                                          double s_positive, double a, double tau, double old,
                                          const AnchorOptions& options) {
  const double ln2 = Constants<double>::kLn2, nan = NAN;
  AnchorResult r{count > 0, 0, old, nan, 0, 0, 0};
  if (!r.live) return r;
  const double shift = state.m - s_positive * a, mean = state.sx / state.s;
  const double log_n = std::log(count), log2_s = std::log2(state.s);
  const double log_g = ln2 * (log2_s + shift);
  double entropy = ln2 * (log2_s - mean);
  entropy = entropy < 0 ? 0 : entropy > log_n ? log_n : entropy;  // comparisons that keep NaN
  double log_s = log_g;
  if (old == old) {
    log_s = log_g + options.log_gamma;
    if (options.gamma < 1) log_s = log_of_sum(old + options.log_rest, log_s);
  }
  // What is not finite must not reach the state.
  if (std::fabs(log_s) < INFINITY) r.log_s = log_s;
  r.kl = log_n - entropy;
  const double behind = log_g - log_s;  // exactly 0 for gamma = 1 and on a first visit
  r.total = std::exp(behind);
  r.term = tau * (log_s - log_n + options.rho);
  // log(s/n) + rho - sum_j w_ij h_ij / tau, without a difference of large numbers at behind = 0.
  r.k = options.rho - r.kl - behind - std::expm1(behind) * ln2 * (mean + shift);
  r.q = r.total / state.s;
  if (!(a > 0 && a < INFINITY)) r.term = r.kl = r.k = r.q = r.total = nan;
  return r;
}

// What a visit of the tiles begins with, and where it finds an anchor's pair.
template <class T>
struct StartParams {
  int64_t m, n, all, begin;  // own columns are [begin, begin + n) of all
  const T *tau_image, *tau_text;
  int64_t tau_image_stride, tau_text_stride;
  const int64_t* given;  // [m] or null: column i for row i
  bool include_positive;
  bool every_pair;  // counts; else the visit counts them

  T *row_a, *column_a;  // [m], [n]
  T *rows, *columns;    // [kStateFields, m], [kStateFields, all]
  int64_t* positive;    // [m] in [0, all)
  int32_t* pair;        // [all] the row whose pair a column is, or -1

  TEMPNET_INLINE void empty(T* states, int64_t size, int64_t at, T count) const {
    states[kStateM * size + at] = Constants<T>::kEmpty;
    states[kStateS * size + at] = 0;
    states[kStateSx * size + at] = 0;
    states[kStateCount * size + at] = every_pair ? count : T(0);
    states[kStatePositive * size + at] = 0;
  }
  TEMPNET_INLINE T text_a(int64_t i) const {
    return Constants<T>::kLog2e / tau_text[i * tau_text_stride];
  }

  // Row t and column t. Given positives are not known to their columns here: see pair_column.
  TEMPNET_INLINE void fill(int64_t t) const {
    if (t < m) {
      const PairPlace place = place_of_pair(given, t, n);
      row_a[t] = place.inside ? Constants<T>::kLog2e / tau_image[t * tau_image_stride] : T(NAN);
      positive[t] = begin + place.column;
      empty(rows, m, t, T(all - (include_positive ? 0 : 1)));
    }
    if (t < all) {
      const int64_t own = t - begin;
      const bool is_paired = !given && own >= 0 && own < m;
      pair[t] = is_paired ? int32_t(own) : -1;
      // Not every column is one of these rows' pairs: the other ranks have theirs.
      empty(columns, all, t, T(m - (is_paired && !include_positive ? 1 : 0)));
      if (own >= 0 && own < n) column_a[own] = is_paired ? text_a(own) : kNoAnchor<T>;
    }
  }

  // The column of row i, with given positives, after every fill.
  TEMPNET_INLINE void pair_column(int64_t i) const {
    const PairPlace place = place_of_pair(given, i, n);
    if (!place.inside) return;
    const int64_t y = place.column;
    pair[begin + y] = int32_t(i);
    column_a[y] = text_a(i);
    if (every_pair && !include_positive) columns[kStateCount * all + begin + y] = T(m - 1);
  }
};

// What both sides' states give, of the anchors of this process.
template <class T>
struct AnchorParams {
  int64_t m, n, begin;
  const T *rows, *columns;    // [kStateFields, m], [>= 4, n]
  const T *row_a, *column_a;  // [m], [n]
  const T *tau_image, *tau_text;
  int64_t tau_image_stride, tau_text_stride;
  const int64_t* positive;            // [m] in [begin, begin + n)
  const int32_t* pair;                // [all]
  const T *log_s_image, *log_s_text;  // [m] or null: a first visit of all
  AnchorOptions options;

  T* stats;                               // [kAnchorFields, m]
  T *term, *total;                        // [m], of both sides
  T *row_parameters, *column_parameters;  // [3, m], [3, n]

  TEMPNET_INLINE AnchorResult side(const T* states, int64_t size, int64_t at, int64_t i, T a, T tau,
                                   const T* log_s) const {
    const RowState<double> state{states[kStateM * size + at], states[kStateS * size + at],
                                 states[kStateSx * size + at]};
    const double old = log_s ? double(log_s[i]) : NAN;
    return anchor_result(state, states[kStateCount * size + at], rows[kStatePositive * m + i], a,
                         tau, old, options);
  }
  TEMPNET_INLINE static void store(T* parameters, int64_t size, int64_t at, T a, T m,
                                   const AnchorResult& r) {
    parameters[kWeightA * size + at] = r.live ? a : kNoAnchor<T>;
    parameters[kWeightM * size + at] = r.live ? m : T(0);
    parameters[kWeightQ * size + at] = T(r.q);
  }

  // Both anchors of pair t, and column t where it is no anchor.
  TEMPNET_INLINE void one(int64_t t) const {
    if (t < n && pair[begin + t] < 0) {
      store(column_parameters, n, t, kNoAnchor<T>, 0, AnchorResult{});
    }
    if (t >= m) return;
    const int64_t y = positive[t] - begin;
    const AnchorResult image =
        side(rows, m, t, t, row_a[t], tau_image[t * tau_image_stride], log_s_image);
    const AnchorResult text =
        side(columns, n, y, t, column_a[y], tau_text[t * tau_text_stride], log_s_text);
    store(row_parameters, m, t, row_a[t], rows[kStateM * m + t], image);
    store(column_parameters, n, y, column_a[y], columns[kStateM * n + y], text);
    stats[kLogSImage * m + t] = T(image.log_s);
    stats[kLogSText * m + t] = T(text.log_s);
    stats[kKlImage * m + t] = T(image.kl);
    stats[kKlText * m + t] = T(text.kl);
    stats[kKImage * m + t] = T(image.k);
    stats[kKText * m + t] = T(text.k);
    term[t] = T(image.term + text.term);
    total[t] = T(image.total + text.total);
  }
};

}  // namespace tempnet
