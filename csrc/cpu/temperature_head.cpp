// The temperature networks around their matrix products on the CPU.
#include "../temperature_head.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../tensors.h"
#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::stable::Tensor;

constexpr int64_t kColumnBlock = 512;  // columns whose hashes are made once

template <class T>
TEMPNET_INLINE T sigmoid(T x) {
  const T e = exp2_clamped(clamp_exponent(-std::fabs(x) * Constants<T>::kLog2e));
  return (x < 0 ? e : T(1)) / (T(1) + e);
}

template <class T>
struct DropoutArgs {
  int64_t h;
  const T *pre, *bias;
  const T* factor;     // nullptr: 1
  const int64_t* key;  // nullptr: nothing is dropped
  const int64_t* ids;  // nullptr: the row's number from first_row on
  int64_t ids_stride, first_row;
  uint32_t threshold;
  T scale;  // of what is kept
  T* dropped;
};

template <class T>
struct DropoutRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const DropoutArgs<T>& args, int64_t begin, int64_t end) {
    const uint64_t mixed_key = args.key ? mix(uint64_t(*args.key)) : 0;
    const uint32_t threshold = args.threshold;
    const T scale = args.scale;
    for (int64_t first = 0; first < args.h; first += kColumnBlock) {
      const int64_t count = std::min(kColumnBlock, args.h - first);
      uint32_t columns[kColumnBlock];
      if (args.key) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) columns[j] = column_hash(first + j);
      }
      for (int64_t i = begin; i < end; ++i) {
        const T* pre = args.pre + i * args.h + first;
        const T* bias = args.bias + first;
        T* dropped = args.dropped + i * args.h + first;
        const T factor = args.factor ? args.factor[i] : T(1);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) dropped[j] = sigmoid(factor * pre[j] + bias[j]);
        if (!args.key) continue;
        const int64_t id = args.ids ? args.ids[i * args.ids_stride] : args.first_row + i;
        const uint32_t row = row_hash(mixed_key, id);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          dropped[j] *= is_kept(row, columns[j], threshold) ? scale : T(0);  // keeps a NaN
        }
      }
    }
  }
};

template <class T>
struct DropoutGradArgs {
  int64_t n, h, rows;  // rows of a block
  const T *grad, *dropped;
  const T* factor;  // nullptr: 1
  T kept;           // 1 - probability
  T* grad_pre;
  T* sums;  // [blocks, h]
};

// Over blocks of rows.
template <class T>
struct DropoutGradBlocks {
  template <bool kFma>
  static TEMPNET_INLINE void run(const DropoutGradArgs<T>& args, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* sums = args.sums + b * args.h;
      std::fill(sums, sums + args.h, T(0));
      for (int64_t i = b * args.rows; i < std::min(args.n, (b + 1) * args.rows); ++i) {
        const T* grad = args.grad + i * args.h;
        const T* dropped = args.dropped + i * args.h;
        T* grad_pre = args.grad_pre + i * args.h;
        const T factor = args.factor ? args.factor[i] : T(1);
#pragma omp simd
        for (int64_t j = 0; j < args.h; ++j) {
          const T grad_x = grad[j] * dropped[j] * (1 - dropped[j] * args.kept);
          sums[j] += grad_x;
          grad_pre[j] = grad_x * factor;
        }
      }
    }
  }
};

template <class T>
struct HeadArgs {
  int64_t n, k, rows;  // rows of a block, of the backward
  const T* h;
  const T* norms;  // nullptr: 1
  const T *scaler, *weight, *bias;
  T tau_min, tau_range;
  T* tau;             // of the forward
  const T* grad_tau;  // of the backward, which recomputes the row
  int64_t grad_tau_stride;
  T* grad_h;
  T* sums;        // [blocks, HeadSums]
  int64_t width;  // of the sums of a block
};

// Room for a row, and for the norms.
template <class T>
struct Scratch {
  explicit Scratch(const HeadArgs<T>& args) : q(args.k), w(q), f(q), weighted(q), norm(q) {
    for (int64_t j = 0; j < args.k; ++j) {
      const T x = args.norms ? args.norms[j] : T(1);
      norm[j] = x < T(kNormMin) ? T(kNormMin) : x;
    }
  }
  std::vector<T> q, w, f, weighted;  // weighted: weight_k f_k
  std::vector<T> norm;
};

template <class T>
struct HeadRow {
  T qmax, share, mixed;  // share: of the range; mixed: sum_k weight_k w_k f_k
};

template <class T, bool kSquash>
struct Head {
  template <bool kFma>
  static TEMPNET_INLINE HeadRow<T> row_of(const HeadArgs<T>& args, int64_t i, T a,
                                          Scratch<T>& row) {
    const int64_t k = args.k;
    const T *h = args.h + i * k, *norm = row.norm.data(), *weight = args.weight;
    T *q = row.q.data(), *w = row.w.data(), *f = row.f.data(), *weighted = row.weighted.data();
    T qmax = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : qmax)
    for (int64_t j = 0; j < k; ++j) {
      q[j] = h[j] / norm[j];
      qmax = q[j] > qmax ? q[j] : qmax;  // drops NaN, which reaches s below
    }
    // What m was rounded by is taken off: where a is large it is no small number.
    const T m = qmax * a, rounding = centred<kFma>(qmax, a, m);
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < k; ++j) {
      w[j] = exp2_clamped(clamp_exponent(centred<kFma>(q[j], a, m) - rounding));
      s += w[j];
    }
    const T uniform = T(1) / T(k);
    T t = 0, mixed = 0;
#pragma omp simd reduction(+ : t, mixed)
    for (int64_t j = 0; j < k; ++j) {
      w[j] /= s;
      f[j] = kSquash ? sigmoid(q[j]) : q[j];
      weighted[j] = weight[j] * f[j];
      t += (w[j] - uniform) * weighted[j];
      mixed += w[j] * weighted[j];
    }
    return {qmax, sigmoid(t + args.bias[0]), mixed};
  }
};

template <class T, bool kSquash>
struct HeadRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const HeadArgs<T>& args, int64_t begin, int64_t end) {
    Scratch<T> row(args);
    const T a = Constants<T>::kLog2e / std::exp(args.scaler[0]);
    for (int64_t i = begin; i < end; ++i) {
      const T share = Head<T, kSquash>::template row_of<kFma>(args, i, a, row).share;
      args.tau[i] = args.tau_min + args.tau_range * share;
    }
  }
};

template <class T, bool kSquash>
struct HeadGradBlocks {
  template <bool kFma>
  static TEMPNET_INLINE void run(const HeadArgs<T>& args, int64_t begin, int64_t end) {
    Scratch<T> row(args);
    const int64_t k = args.k;
    const T temperature = std::exp(args.scaler[0]), a = Constants<T>::kLog2e / temperature;
    const T *q = row.q.data(), *w = row.w.data(), *f = row.f.data(), *weight = args.weight;
    const T* weighted = row.weighted.data();
    const T* norm = row.norm.data();
    const T uniform = T(1) / T(k);
    for (int64_t b = begin; b < end; ++b) {
      T* sums = args.sums + b * args.width;
      std::fill(sums, sums + args.width, T(0));
      T *weight_sum = sums + weight_sums(k), *along = sums + along_sums(k);
      for (int64_t i = b * args.rows; i < std::min(args.n, (b + 1) * args.rows); ++i) {
        const HeadRow<T> r = Head<T, kSquash>::template row_of<kFma>(args, i, a, row);
        const T grad_t =
            args.grad_tau[i * args.grad_tau_stride] * args.tau_range * r.share * (T(1) - r.share);
        T* grad_h = args.grad_h + i * k;
        T scaler = 0;
#pragma omp simd reduction(+ : scaler)
        for (int64_t j = 0; j < k; ++j) {
          const T grad_x = grad_t * w[j] * (weighted[j] - r.mixed) / temperature;  // through w
          const T grad_f = grad_t * weight[j] * (w[j] - uniform);
          const T grad_q = grad_x + (kSquash ? grad_f * f[j] * (T(1) - f[j]) : grad_f);
          grad_h[j] = grad_q / norm[j];
          // Of softmax(q / T) only differences of q count: from the largest, nothing cancels.
          scaler += grad_x * (q[j] - r.qmax);
          sums[j] += grad_h[j];
          weight_sum[j] += grad_t * (w[j] - uniform) * f[j];
        }
        if (args.norms) {
#pragma omp simd
          for (int64_t j = 0; j < k; ++j) {
            along[j] -= args.norms[j] < T(kNormMin) ? T(0) : grad_h[j] * q[j] / norm[j];
          }
        }
        sums[scaler_sum(k)] -= scaler;
        sums[bias_sum(k)] += grad_t;
      }
    }
  }
};

Tensor sigmoid_dropout(Tensor pre, Tensor bias, std::optional<Tensor> factor,
                       std::optional<Tensor> key, std::optional<Tensor> ids, int64_t first_row,
                       double probability) {
  pre = dense(pre), bias = dense(bias), factor = dense(factor);
  const int64_t n = pre.size(0), h = pre.size(1);
  Tensor dropped = allocate(pre, {n, h});
  for_accumulator("sigmoid_dropout", "pre", pre, [&](auto zero) {
    using T = decltype(zero);
    const DropoutArgs<T> args{h,
                              data<T>(pre),
                              data<T>(bias),
                              data<T>(factor),
                              data<int64_t>(key),
                              data<int64_t>(ids),
                              ids ? ids->stride(0) : 0,
                              first_row,
                              dropout_threshold(probability),
                              T(1 / (1 - probability)),
                              mutable_data<T>(dropped)};
    run_parallel<DropoutRows<T>>(args, n, h);
  });
  return dropped;
}

std::tuple<Tensor, Tensor> sigmoid_dropout_bwd(Tensor grad, Tensor dropped,
                                               std::optional<Tensor> factor, double probability) {
  grad = dense(grad), dropped = dense(dropped), factor = dense(factor);
  const int64_t n = dropped.size(0), h = dropped.size(1);
  const int64_t blocks = row_blocks(n), rows = rows_of_block(n);
  Tensor grad_pre = allocate(dropped, {n, h});
  Tensor sums = allocate(dropped, {blocks, h});
  for_accumulator("sigmoid_dropout_bwd", "dropped", dropped, [&](auto zero) {
    using T = decltype(zero);
    const DropoutGradArgs<T> args{n,
                                  h,
                                  rows,
                                  data<T>(grad),
                                  data<T>(dropped),
                                  data<T>(factor),
                                  T(1 - probability),
                                  mutable_data<T>(grad_pre),
                                  mutable_data<T>(sums)};
    run_parallel<DropoutGradBlocks<T>>(args, blocks, rows * h);
  });
  return {grad_pre, sums};
}

template <class T>
HeadArgs<T> head_args(const Tensor& h, const std::optional<Tensor>& norms, const Tensor& scaler,
                      const Tensor& weight, const Tensor& bias, double tau_min, double tau_max) {
  HeadArgs<T> args{};
  args.n = h.size(0);
  args.k = h.size(1);
  args.h = data<T>(h);
  args.norms = data<T>(norms);
  args.scaler = data<T>(scaler);
  args.weight = data<T>(weight);
  args.bias = data<T>(bias);
  args.tau_min = T(tau_min);
  args.tau_range = T(tau_max - tau_min);
  return args;
}

Tensor temperature_head(Tensor h, std::optional<Tensor> norms, Tensor scaler, Tensor weight,
                        Tensor bias, bool squash, double tau_min, double tau_max) {
  h = dense(h), norms = dense(norms), weight = dense(weight);
  Tensor tau = allocate(h, {h.size(0)});
  for_accumulator("temperature_head", "h", h, [&](auto zero) {
    using T = decltype(zero);
    HeadArgs<T> args = head_args<T>(h, norms, scaler, weight, bias, tau_min, tau_max);
    args.tau = mutable_data<T>(tau);
    squash ? run_parallel<HeadRows<T, true>>(args, args.n, args.k)
           : run_parallel<HeadRows<T, false>>(args, args.n, args.k);
  });
  return tau;
}

std::tuple<Tensor, Tensor> temperature_head_bwd(Tensor grad_tau, Tensor h,
                                                std::optional<Tensor> norms, Tensor scaler,
                                                Tensor weight, Tensor bias, bool squash,
                                                double tau_min, double tau_max) {
  h = dense(h), norms = dense(norms), weight = dense(weight);
  const int64_t n = h.size(0), k = h.size(1), blocks = row_blocks(n);
  const int64_t width = along_sums(k) + (norms ? k : 0);
  Tensor grad_h = allocate(h, {n, k});
  Tensor sums = allocate(h, {blocks, width});
  for_accumulator("temperature_head_bwd", "h", h, [&](auto zero) {
    using T = decltype(zero);
    HeadArgs<T> args = head_args<T>(h, norms, scaler, weight, bias, tau_min, tau_max);
    args.rows = rows_of_block(n);
    args.grad_tau = data<T>(grad_tau);
    args.grad_tau_stride = grad_tau.stride(0);
    args.grad_h = mutable_data<T>(grad_h);
    args.sums = mutable_data<T>(sums);
    args.width = width;
    squash ? run_parallel<HeadGradBlocks<T, true>>(args, blocks, args.rows * k)
           : run_parallel<HeadGradBlocks<T, false>>(args, blocks, args.rows * k);
  });
  return {grad_h, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("sigmoid_dropout.native", TORCH_BOX(&sigmoid_dropout));
  library.impl("sigmoid_dropout_bwd.native", TORCH_BOX(&sigmoid_dropout_bwd));
  library.impl("temperature_head.native", TORCH_BOX(&temperature_head));
  library.impl("temperature_head_bwd.native", TORCH_BOX(&temperature_head_bwd));
}

}  // namespace tempnet
