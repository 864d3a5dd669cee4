// The tempered softmax on a GPU: the kernels and their launches. No torch: tests/emulator/
// compiles this file with g++ and runs it on a CPU.
//
// A CTA, or on sm_90 a cluster of CTAs, per row. Rows of whole vectors that fit stay in registers,
// packed, between their sums and what is written; others are read twice, the second time from the
// L2 cache.
#pragma once

#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace softmax {

struct Params {
  int64_t n;
  int v;
  const void* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  const void* grad_output;  // the same; null in the forward
  int64_t grad_output_stride;
  void* out;  // [n, v], contiguous: the output, or grad_logits; null where that is not wanted
  const float* tau;
  int64_t tau_stride;
  float* rows;      // [kSoftmaxFields, n]
  float* grad_tau;  // [n]
  bool log;
  int slice;  // columns per CTA of a cluster
};

constexpr int kThreads = 1024;
// 16-byte vectors that a thread holds of each of the backward's two streams.
constexpr int kPairVectors = kVectors / 2;
constexpr float kLowest = -3e38f;  // finite: 0 * -inf is NaN

struct Row {
  int64_t i;
  int begin, end;  // of this CTA's slice
  bool first;      // this thread writes the row's numbers
  float tau, a, inverse_tau;
};

TEMPNET_DEVICE Row load_row(const Params& params) {
  Row row;
  const int rank = int(cluster_rank());
  row.i = blockIdx.x / cluster_size();
  row.begin = min(params.v, rank * params.slice);
  row.end = min(params.v, row.begin + params.slice);
  row.first = rank == 0 && threadIdx.x == 0;
  row.tau = params.tau[row.i * params.tau_stride];
  // NaN for a bad temperature: everything of the row then is.
  row.a = row.tau > 0 && row.tau < INFINITY ? Constants<float>::kLog2e / row.tau : NAN;
  row.inverse_tau = 1 / row.tau;
  return row;
}

template <class Z>
TEMPNET_DEVICE const Z* row_of(const void* wide, int64_t i, int64_t stride) {
  return static_cast<const Z*>(wide) + i * stride;
}

// f(column j of the vector) for every column.
template <class Z, class F>
TEMPNET_DEVICE void map_columns(uint32_t (&words)[kWords], F f) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const float low = f(w * Word<Z>::kCount);
    const float high = Word<Z>::kCount == 1 ? low : f(w * Word<Z>::kCount + 1);
    words[w] = Word<Z>::pack(low, high);
  }
}

template <class Z>
TEMPNET_DEVICE float column(const uint32_t (&words)[kWords], int j) {
  return Word<Z>::get(words[j / Word<Z>::kCount], j % Word<Z>::kCount);
}

// Of a row's softmax: exponents are (z - zmax) * a, exactly 0 for the largest logit.
struct Softmax {
  float zmax, a, inverse_s;
  TEMPNET_DEVICE float weight(float z) const { return exp2_approx((z - zmax) * a); }
};

// What the forward left of it.
TEMPNET_DEVICE Softmax load_softmax(const Params& params, const Row& row) {
  return {params.rows[kSoftmaxZmax * params.n + row.i], row.a,
          1 / params.rows[kSoftmaxS * params.n + row.i]};
}

template <class Z>
TEMPNET_DEVICE void to_output(const Softmax& row, bool log, float log_s, float inverse_tau,
                              uint32_t (&words)[kWords]) {
  if (log) {
    map_columns<Z>(
        words, [&](int j) { return fmaf(column<Z>(words, j) - row.zmax, inverse_tau, -log_s); });
  } else {
    map_columns<Z>(words, [&](int j) { return row.weight(column<Z>(words, j)) * row.inverse_s; });
  }
}

template <class Z, bool kTwice>
TEMPNET_KERNEL(kThreads, 1)
forward_kernel(TEMPNET_PARAM Params params) {
  const Row row = load_row(params);
  begin_merge<false>();
  const Span<Z, kTwice> span(row_of<Z>(params.logits, row.i, params.logits_stride), row.begin,
                             row.end);
  uint32_t words[kVectors][kWords];
  Partial p;
  if constexpr (kTwice) {
    p = reduce_span<Z, kForward>(span, row.a, nullptr);
  } else {
    const auto at = [&](int k) { return span.column(k * int(blockDim.x) + int(threadIdx.x)); };
#pragma unroll
    for (int k = 0; k < kVectors; ++k) span.template load<false>(at(k), words[k]);
    p = reduce_vectors<Z, kForward>(words, row.a, span, at, nullptr);
  }
  merge_warps<false>(p, nullptr, row.a);
  const RowState<float> state{row_maximum(p.zmax, row.a), p.s, p.sx};
  const float delta = centred(p.zmax, row.a, state.m);
  const SoftmaxRow<float> r = relative_to_largest(state, p.zmax, row.a, delta, exp2_approx(delta));
  if (row.first) {
    params.rows[kSoftmaxZmax * params.n + row.i] = r.zmax;
    params.rows[kSoftmaxS * params.n + row.i] = r.s;
    params.rows[kSoftmaxMean * params.n + row.i] = r.mean;
  }
  const Softmax softmax{r.zmax, row.a, 1 / r.s};
  const float log_s = params.log ? logf(r.s) : 0;
  Z* out = static_cast<Z*>(params.out) + row.i * params.v;
  if constexpr (kTwice) {
    transform_span(span, out, [&](int, uint32_t (&vector)[kWords]) {
      to_output<Z>(softmax, params.log, log_s, row.inverse_tau, vector);
    });
  } else {
    // Counted up again: eight columns kept from above would be eight registers.
    int at = span.column(threadIdx.x);
    forget(at);
#pragma unroll
    for (int k = 0; k < kVectors; ++k, at += int(blockDim.x) * kColumns<Z>) {
      if (at < row.end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) forget(words[k][w]);
        to_output<Z>(softmax, params.log, log_s, row.inverse_tau, words[k]);
        span.store(out, true, at, words[k]);
      }
    }
  }
}

// Sums over a row: of q_j, which is 2^u_j g_j or for the logarithm g_j, and of q_j d_j and 2^u_j
// d_j, with d_j = z_j - zmax - mean. A term with a weight of 0 is 0, as is one of the logarithm
// with g_j = 0.
struct Sums {
  float q = 0, qd = 0, ed = 0;
};

template <class Z>
TEMPNET_DEVICE void add_columns(const Softmax& row, float mean, bool log,
                                const uint32_t (&z_words)[kWords],
                                const uint32_t (&g_words)[kWords], Sums& sums) {
#pragma unroll
  for (int j = 0; j < kColumns<Z>; ++j) {
    const float z = column<Z>(z_words, j), g = column<Z>(g_words, j);
    const float e = row.weight(z), d = z - row.zmax - mean;
    const float q = log ? g : e == 0 ? 0.0f : e * g;
    sums.q += q;
    sums.qd += q == 0 ? 0.0f : q * d;
    sums.ed = fmaf(e, fmaxf(d, kLowest), sums.ed);  // e keeps NaN
  }
}

// The sums of all threads of a cluster, in every thread.
TEMPNET_DEVICE void add_warps(Sums& sums) {
  const float4 own[1] = {{warp_sum(sums.q), warp_sum(sums.qd), warp_sum(sums.ed), 0}};
  const float4* records = exchange_records<false>(own);
  const int count = int(cluster_size() * blockDim.x / kWarp);
  sums = Sums{};
  for (int j = threadIdx.x % kWarp; j < count; j += kWarp) {
    sums.q += records[j].x;
    sums.qd += records[j].y;
    sums.ed += records[j].z;
  }
  sums = {warp_sum(sums.q), warp_sum(sums.qd), warp_sum(sums.ed)};
}

// Upstream gradients to those of the logits, in their place; total: the sum of q_j / s, or g_j.
template <class Z>
TEMPNET_DEVICE void to_gradient(const Softmax& row, bool log, float total, float inverse_tau,
                                const uint32_t (&z_words)[kWords], uint32_t (&g_words)[kWords]) {
  const auto p = [&](int j) { return row.weight(column<Z>(z_words, j)) * row.inverse_s; };
  if (log) {
    map_columns<Z>(g_words,
                   [&](int j) { return fmaf(-p(j), total, column<Z>(g_words, j)) * inverse_tau; });
  } else {
    map_columns<Z>(g_words, [&](int j) {
      const float p_j = p(j);
      return p_j == 0 ? 0.0f : p_j * (column<Z>(g_words, j) - total) * inverse_tau;
    });
  }
}

// f(column, vector of z, vector of g) for this thread's vectors of a span. Several at a time, so
// that their loads are in flight together.
template <bool kKeep, class Z, class F>
TEMPNET_DEVICE void visit_pairs(const Span<Z, true>& span, const Z* g_row, F f) {
  const int vectors = span.vectors();
  const bool aligned = span.aligned_in(g_row);
  for (int first = threadIdx.x; first < vectors; first += kPairVectors * int(blockDim.x)) {
    const auto at = [&](int k) { return span.column(first + k * int(blockDim.x)); };
    uint32_t z[kPairVectors][kWords], g[kPairVectors][kWords];
#pragma unroll
    for (int k = 0; k < kPairVectors; ++k) {
      span.template load<kKeep>(at(k), z[k]);
      span.load_from(g_row, aligned, at(k), g[k]);
    }
#pragma unroll
    for (int k = 0; k < kPairVectors; ++k) {
      if (at(k) < span.end) f(at(k), z[k], g[k]);
    }
  }
}

template <class Z, bool kTwice>
TEMPNET_KERNEL(kThreads, 1)
backward_kernel(TEMPNET_PARAM Params params) {
  const Row row = load_row(params);
  begin_merge<false>();
  Softmax softmax = load_softmax(params, row);
  const float mean = params.rows[kSoftmaxMean * params.n + row.i];
  const Span<Z, kTwice> span(row_of<Z>(params.logits, row.i, params.logits_stride), row.begin,
                             row.end);
  const Z* g_row = row_of<Z>(params.grad_output, row.i, params.grad_output_stride);
  uint32_t z[kPairVectors][kWords], g[kPairVectors][kWords];
  Sums sums;
  if constexpr (kTwice) {
    visit_pairs<true>(span, g_row,
                      [&](int, const uint32_t (&z)[kWords], const uint32_t (&g)[kWords]) {
                        add_columns<Z>(softmax, mean, params.log, z, g, sums);
                      });
  } else {
    const auto at = [&](int k) { return span.column(k * int(blockDim.x) + int(threadIdx.x)); };
#pragma unroll
    for (int k = 0; k < kPairVectors; ++k) {
      span.template load<false>(at(k), z[k]);
      span.load_from(g_row, true, at(k), g[k]);
    }
#pragma unroll
    for (int k = 0; k < kPairVectors; ++k) {
      add_columns<Z>(softmax, mean, params.log, z[k], g[k], sums);
    }
  }
  add_warps(sums);
  // Divided here, not weight by weight: s is the sum of the same weights.
  const float scale = params.log ? 1.0f : softmax.inverse_s, total = sums.q * scale;
  if (row.first) {
    // sum_j c_j d_j, where c_j / tau is the logit's gradient.
    const float covariance = sums.qd * scale - total * sums.ed * softmax.inverse_s;
    params.grad_tau[row.i] = -covariance / row.tau / row.tau;
  }
  if (!params.out) return;
  // Read again: of the same numbers the compiler would keep every weight from above, and spill.
  softmax = load_softmax(params, row);
  Z* out = static_cast<Z*>(params.out) + row.i * params.v;
  if constexpr (kTwice) {
    const bool aligned = span.aligned_in(out);
    visit_pairs<false>(span, g_row,
                       [&](int at, const uint32_t (&z)[kWords], uint32_t (&g)[kWords]) {
                         to_gradient<Z>(softmax, params.log, total, row.inverse_tau, z, g);
                         span.store(out, aligned, at, g);
                       });
  } else {
    int at = span.column(threadIdx.x);
    forget(at);
#pragma unroll
    for (int k = 0; k < kPairVectors; ++k, at += int(blockDim.x) * kColumns<Z>) {
      if (at < row.end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) forget(z[k][w]), forget(g[k][w]);
        to_gradient<Z>(softmax, params.log, total, row.inverse_tau, z[k], g[k]);
        span.store(out, true, at, g[k]);
      }
    }
  }
}

struct Plan {
  bool twice;   // the row is read twice, or once where nothing of its size is written
  int cluster;  // CTAs per row
  int threads;  // per CTA
  int slice;    // columns per CTA
};

// held: 16-byte vectors of the logits that a thread holds; 0 where rows cannot stay in registers.
// arch: 80 for compute capability 8.0.
inline Plan plan_rows(int64_t n, int v, int itemsize, int held, int arch, int multiprocessors) {
  const int largest = arch >= 90 ? 8 : 1, bytes = v * itemsize;
  const auto whole_warps = [](int threads) { return divide_up(threads, kWarp) * kWarp; };
  const auto slice = [&](int cluster) {
    return cluster == 1 ? v : lines(divide_up(v, cluster), itemsize);
  };
  // The smallest cluster that holds the row in CTAs of which two fit on a multiprocessor; for few
  // rows the largest.
  const bool few = n <= multiprocessors / 2 && bytes >= 1 << 15;
  const int smallest = few ? largest : 1;
  for (int cluster = smallest; held && cluster <= largest; cluster *= 2) {
    const int vectors = divide_up(slice(cluster) * itemsize, 16);
    const int threads = whole_warps(divide_up(vectors, held));
    if (threads <= 512 || (cluster == largest && threads <= kThreads)) {
      return {false, cluster, threads, slice(cluster)};
    }
  }
  const int vectors = divide_up(slice(smallest) * itemsize, 16) + 1;
  const int threads = whole_warps(divide_up(vectors, kPairVectors));
  return {true, smallest, min(threads, few ? kThreads : 512), slice(smallest)};
}

template <class Z>
Plan plan_launch(const Params& params, int arch, int multiprocessors) {
  const bool aligned = params.v % kColumns<Z> == 0 && params.out &&
                       aligned_rows<Z>(params.out, params.v) &&
                       aligned_rows<Z>(params.logits, params.logits_stride) &&
                       aligned_rows<Z>(params.grad_output, params.grad_output_stride);
  const int held = params.grad_output ? kPairVectors : kVectors;
  return plan_rows(params.n, params.v, sizeof(Z), aligned ? held : 0, arch, multiprocessors);
}

template <class Z>
void launch_softmax(Params params, const Plan& plan, Stream stream) {
  if (params.n == 0) return;
  params.slice = plan.slice;
  const auto kernel = params.grad_output
                          ? plan.twice ? backward_kernel<Z, true> : backward_kernel<Z, false>
                      : plan.twice ? forward_kernel<Z, true>
                                   : forward_kernel<Z, false>;
  launch(kernel, dim3(unsigned(params.n * plan.cluster)), plan.threads, plan.cluster,
         merge_bytes(plan.threads, plan.cluster), stream, params);
}

}  // namespace softmax
}  // namespace device
}  // namespace tempnet
