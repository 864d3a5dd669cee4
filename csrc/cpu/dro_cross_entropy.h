// The loops of the token loss over rows on the CPU. A row is read from memory once: block by block
// into the state of online_softmax.h, then again, out of the cache, for its gradient.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "row_reduce.h"

namespace tempnet {
namespace {

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

// The columns of a row that one thread reduces where rows are fewer than threads. Rows are always
// reduced by these slices, so that a result does not depend on the number of either.
constexpr int64_t kSlice = 4 * kBlock;
// The width of the slices of a row, nearly all the same, so that threads end together.
inline int64_t slice_width(int64_t v) {
  const int64_t slices = (v + kSlice - 1) / kSlice;
  return (((v + slices - 1) / slices) + 63) / 64 * 64;
}

// The state of some columns of a row.
template <class T>
struct RowSums {
  RowState<T> state;
  T zmax = -std::numeric_limits<T>::infinity();
  T su = 0;                  // sum_j u_j
  int64_t argmax_block = 0;  // the first column of the block that holds the largest logit
};

// Adds the next `width` columns, `before` of which have been added.
template <class T>
TEMPNET_INLINE void add(RowSums<T>& sums, const RowSums<T>& next, int64_t before, int64_t width) {
  if (next.zmax > sums.zmax) {
    sums.argmax_block = next.argmax_block;
    sums.zmax = next.zmax;
  }
  const RowState<T> merged = merge(sums.state, next.state);
  sums.su += T(before) * (sums.state.m - merged.m) + next.su + T(width) * (next.state.m - merged.m);
  sums.state = merged;
}

// Of columns [begin, begin + count).
template <bool kFma, class Z, class Scale>
TEMPNET_INLINE auto reduce_slice(const Z* z, int64_t begin, int64_t count, const Scale& scale) {
  using T = decltype(factor_of(scale));
  RowSums<T> sums;
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t width = std::min(kBlock, count - j);
    const Block<T> block = reduce_block<kFma>(z + begin + j, width, scale);
    add(sums, {block.state, block.zmax, block.su, begin + j}, j, width);
  }
  return sums;
}

template <bool kFma, class Z, class Scale>
TEMPNET_INLINE auto reduce_row(const Z* z, int64_t v, const Scale& scale) {
  using T = decltype(factor_of(scale));
  RowSums<T> sums;
  const int64_t slice = slice_width(v);
  for (int64_t j = 0; j < v; j += slice) {
    const int64_t width = std::min(slice, v - j);
    add(sums, reduce_slice<kFma>(z, j, width, scale), j, width);
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

// What the gradient of a row is made of: grad_j = scale * (c p_j - q_j), with p_j = 2^u_j / s,
// times the slope of the softcap.
template <class T>
struct RowWeights {
  T m, inverse_s, c, scale;
};

// Of columns [begin, end). grad may be z; y is the target's column, or another where it is not
// among them.
template <bool kFma, class Z, class T, class Scale>
TEMPNET_INLINE void write_gradient(const Args<Z, T>& args, const Z* z, Z* grad, int64_t y,
                                   const Scale& exponent, const RowWeights<T>& row, int64_t begin,
                                   int64_t end) {
  const T a = factor_of(exponent);
  const auto [m, inverse_s, c, scale] = row;
  const T label_smoothing = args.options.label_smoothing, vocab_size = T(args.vocab_size);
  const T factor = scale * c * inverse_s;
  const T uniform = scale * label_smoothing / vocab_size;
  // In fp32 before it is rounded to the gradient's type: p_y - 1 cancels.
  const bool is_held = y >= begin && y < end;
  const Logit<T> own = logit(T(load(z[is_held ? y : begin])), exponent);
  T p_y = weight<kFma>(own.value, a, m) * inverse_s;
  if (args.vocab_size == 1 && p_y > 0) p_y = 1;  // of one column, exactly
  const T grad_y = scale * ((c * p_y - 1) + label_smoothing * (1 - 1 / vocab_size)) * own.slope;
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const Logit<T> x = logit(T(load(z[j])), exponent);
    grad[j] = store<Z>((weight<kFma>(x.value, a, m) * factor - uniform) * x.slope);
  }
  if (is_held) grad[y] = store<Z>(grad_y);
}

// The results of a row that is not read, if it is one: it is ignored, or its temperature is none.
template <class Z, class T>
TEMPNET_INLINE bool finish_unread(const Args<Z, T>& args, int64_t i) {
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  const T tau = args.tau[i], scale = args.scale[i];
  const bool ignored = args.target[i] == args.ignore_index;
  if (!ignored && tau > 0 && tau < infinity) return false;
  const int64_t n = args.n;
  T* rows = args.rows + i;
  const T value = ignored ? T(0) : nan, scaled = scale == 0 ? T(0) : value;
  args.loss[i] = rows[kGradTau * n] = scaled;
  rows[kLoss * n] = value;
  for (int field = kM; field < kRowFields; ++field) rows[field * n] = nan;
  if (args.argmax) args.argmax[i] = -1;
  if (args.grad) {
    Z* grad = args.grad + i * args.grad_stride;
    std::fill(grad, grad + args.v, store<Z>(scaled));
  }
  return true;
}

// What makes row i's logits exponents.
template <bool kCapped, class Z, class T>
TEMPNET_INLINE auto exponent_of(const Args<Z, T>& args, int64_t i) {
  return scale_of<kCapped>(args.softcap, Constants<T>::kLog2e / args.tau[i]);
}

// The results of a row but for its gradient, which they are returned for.
template <class Z, class T, class Scale>
TEMPNET_INLINE RowWeights<T> finish_row(const Args<Z, T>& args, int64_t i, const RowSums<T>& sums,
                                        const Scale& exponent) {
  const int64_t n = args.n;
  const Z* z = args.logits + i * args.logits_stride;
  const T tau = args.tau[i], scale = args.scale[i];
  const RowState<T>& state = sums.state;
  const T z_y = load(z[args.target[i]]);
  const RowResult<T> r = finish(state, logit(sums.zmax, exponent).value, logit(z_y, exponent).value,
                                sums.su / T(args.v), tau, args.options);
  T* rows = args.rows + i;
  args.loss[i] = scale == 0 ? T(0) : scale * r.loss;
  rows[kLoss * n] = r.loss;
  rows[kGradTau * n] = scale == 0 ? T(0) : scale * r.grad_tau;
  rows[kM * n] = state.m;
  rows[kLog2S * n] = r.log2_s;
  rows[kEntropy * n] = r.entropy;
  rows[kLogProb * n] = r.log_prob;
  if (args.argmax) args.argmax[i] = std::isfinite(r.log2_s) ? argmax_of(z, sums) : -1;
  // fp16 is stored unscaled: p / N underflows where no loss scale can bring it back.
  const T stored = std::is_same<Z, Half>::value && scale != 0 ? T(1) : scale;
  return {state.m, 1 / state.s, r.c, stored};
}

template <bool kFma, class Z, class T, class Scale>
TEMPNET_INLINE void finish_gradient(const Args<Z, T>& args, int64_t i, const Scale& exponent,
                                    const RowWeights<T>& row, int64_t begin, int64_t end) {
  Z* grad = args.grad + i * args.grad_stride;
  if (row.scale == 0) {
    std::fill(grad + begin, grad + end, store<Z>(T(0)));
  } else {
    const Z* z = args.logits + i * args.logits_stride;
    write_gradient<kFma>(args, z, grad, args.target[i], exponent, row, begin, end);
  }
}

template <class Z, class T, bool kCapped>
struct ForwardRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (finish_unread(args, i)) continue;
      const Z* z = args.logits + i * args.logits_stride;
      const auto exponent = exponent_of<kCapped>(args, i);
      const RowSums<T> sums = reduce_row<kFma>(z, args.v, exponent);
      const RowWeights<T> row = finish_row(args, i, sums, exponent);
      if (args.grad) finish_gradient<kFma>(args, i, exponent, row, 0, args.v);
    }
  }
};

// The same with the slices of a row apart, for fewer rows than threads.
template <class Z, class T>
struct SlicedArgs {
  const Args<Z, T>& args;
  int64_t width, slices;
  RowSums<T>* sums;        // [n, slices]
  RowWeights<T>* weights;  // [n]
  bool* unread;            // [n]
};

template <class Z, class T, bool kCapped>
struct ReduceSlices {
  template <bool kFma>
  static TEMPNET_INLINE void run(const SlicedArgs<Z, T>& sliced, int64_t begin, int64_t end) {
    const Args<Z, T>& args = sliced.args;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / sliced.slices, j = item % sliced.slices * sliced.width;
      if (sliced.unread[i]) continue;
      const Z* z = args.logits + i * args.logits_stride;
      const int64_t count = std::min(sliced.width, args.v - j);
      sliced.sums[item] = reduce_slice<kFma>(z, j, count, exponent_of<kCapped>(args, i));
    }
  }
};

template <class Z, class T, bool kCapped>
struct GradientSlices {
  template <bool kFma>
  static TEMPNET_INLINE void run(const SlicedArgs<Z, T>& sliced, int64_t begin, int64_t end) {
    const Args<Z, T>& args = sliced.args;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / sliced.slices, j = item % sliced.slices * sliced.width;
      if (sliced.unread[i]) continue;
      finish_gradient<kFma>(args, i, exponent_of<kCapped>(args, i), sliced.weights[i], j,
                            std::min(j + sliced.width, args.v));
    }
  }
};

// Of rows. Compiled for the level of the others: another contracts other products, to other bits.
template <class Z, class T, bool kCapped>
struct FinishSlices {
  template <bool kFma>
  static TEMPNET_INLINE void run(const SlicedArgs<Z, T>& sliced, int64_t begin, int64_t end) {
    const Args<Z, T>& args = sliced.args;
    for (int64_t i = begin; i < end; ++i) {
      if (sliced.unread[i]) continue;
      RowSums<T> row;
      for (int64_t k = 0; k < sliced.slices; ++k) {
        const int64_t j = k * sliced.width;
        add(row, sliced.sums[i * sliced.slices + k], j, std::min(sliced.width, args.v - j));
      }
      sliced.weights[i] = finish_row(args, i, row, exponent_of<kCapped>(args, i));
    }
  }
};

template <bool kCapped, class Z, class T>
void forward_sliced(const Args<Z, T>& args) {
  const int64_t width = slice_width(args.v), slices = (args.v + width - 1) / width;
  const int64_t items = args.n * slices;
  std::vector<RowSums<T>> sums(items);
  std::vector<RowWeights<T>> weights(args.n);
  const std::unique_ptr<bool[]> unread(new bool[args.n]);
  const SlicedArgs<Z, T> sliced{args, width, slices, sums.data(), weights.data(), unread.get()};
  for (int64_t i = 0; i < args.n; ++i) unread[i] = finish_unread(args, i);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    run_rows<ReduceSlices<Z, T, kCapped>>(sliced, begin, end);
  });
  run_rows<FinishSlices<Z, T, kCapped>>(sliced, 0, args.n);
  if (!args.grad) return;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    run_rows<GradientSlices<Z, T, kCapped>>(sliced, begin, end);
  });
}

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
                           args.held(y) ? y - args.begin : -1, exponent_of<kCapped>(args, i),
                           {m, std::exp2(-log2_s), c, scale}, 0, v);
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

}  // namespace
}  // namespace tempnet
