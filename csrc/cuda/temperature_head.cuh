// The temperature networks around their matrix products on a GPU. No float atomics: a block of rows
// is one CTA's, which adds its rows in their order.
#pragma once

#include "../temperature_head.h"
#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace head {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDropoutRows = 8;  // of a CTA: a column's hash is made once for them
constexpr int kHeldRows = 32;    // whose numbers the backward holds in shared memory at a time

TEMPNET_DEVICE float sigmoid(float x) {
  const float e = exp2_approx(-fabsf(x) * Constants<float>::kLog2e);  // keeps NaN
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

struct DropoutParams {
  int64_t n;
  int h;
  const float *pre, *bias;
  const float* factor;  // nullptr: 1
  const int64_t* key;   // nullptr: nothing is dropped
  const int64_t* ids;   // nullptr: the row's number from first_row on
  int64_t ids_stride, first_row;
  uint32_t threshold;
  float scale;  // of what is kept
  float* dropped;
};

// A thread per column of kDropoutRows rows.
TEMPNET_KERNEL(kThreads, 4)
dropout_kernel(TEMPNET_PARAM DropoutParams params) {
  const int j = blockIdx.y * kThreads + threadIdx.x;
  if (j >= params.h) return;
  const bool drops = params.key != nullptr;
  const uint64_t mixed_key = drops ? mix(uint64_t(*params.key)) : 0;
  const uint32_t column = drops ? column_hash(j) : 0;
  const float bias = params.bias[j];
  const int64_t first = int64_t(blockIdx.x) * kDropoutRows;
#pragma unroll
  for (int r = 0; r < kDropoutRows; ++r) {
    const int64_t i = first + r;
    if (i >= params.n) return;
    const float factor = params.factor ? params.factor[i] : 1.0f;
    float x = sigmoid(fmaf(factor, params.pre[i * params.h + j], bias));
    if (drops) {
      const int64_t id = params.ids ? params.ids[i * params.ids_stride] : params.first_row + i;
      const bool kept = is_kept(row_hash(mixed_key, id), column, params.threshold);
      x *= kept ? params.scale : 0.0f;  // a NaN is never dropped
    }
    params.dropped[i * params.h + j] = x;
  }
}

inline void launch_dropout(const DropoutParams& params, Stream stream) {
  if (params.n == 0 || params.h == 0) return;
  const dim3 grid(unsigned((params.n + kDropoutRows - 1) / kDropoutRows),
                  unsigned(divide_up(params.h, kThreads)));
  launch(dropout_kernel, grid, kThreads, 1, 0, stream, params);
}

struct DropoutGradParams {
  int64_t n, rows;  // rows of a block
  int h;
  const float *grad, *dropped;
  const float* factor;  // nullptr: 1
  float kept;           // 1 - probability
  float* grad_pre;
  float* sums;  // [blocks, h]
};

// A thread per column of a block of rows.
TEMPNET_KERNEL(kThreads, 4)
dropout_grad_kernel(TEMPNET_PARAM DropoutGradParams params) {
  const int j = blockIdx.y * kThreads + threadIdx.x;
  if (j >= params.h) return;
  const int64_t first = blockIdx.x * params.rows;
  const int64_t left = params.n - first;
  const int64_t rows = left < params.rows ? left : params.rows;
  float sum = 0;
#pragma unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r, at = i * params.h + j;
    const float dropped = params.dropped[at];
    const float grad_x = params.grad[at] * dropped * (1.0f - dropped * params.kept);
    sum += grad_x;
    params.grad_pre[at] = params.factor ? grad_x * params.factor[i] : grad_x;
  }
  params.sums[int64_t(blockIdx.x) * params.h + j] = sum;
}

inline void launch_dropout_grad(const DropoutGradParams& params, Stream stream) {
  if (params.n == 0 || params.h == 0) return;
  const dim3 grid(unsigned(row_blocks(params.n)), unsigned(divide_up(params.h, kThreads)));
  launch(dropout_grad_kernel, grid, kThreads, 1, 0, stream, params);
}

struct HeadParams {
  int64_t n, rows;  // rows of a block, of the backward
  int k;
  const float* h;
  const float* norms;  // nullptr: 1
  const float *scaler, *weight, *bias;
  float tau_min, tau_range;
  float* tau;             // of the forward
  const float* grad_tau;  // of the backward, which recomputes the row
  int64_t grad_tau_stride;
  float* grad_h;
  float* sums;  // [blocks, HeadSums]
};

struct Column {
  float q, f, weighted;  // weighted: weight_k f_k
};
TEMPNET_DEVICE float norm_of(const HeadParams& params, int j) {
  const float norm = params.norms[j];
  return norm < float(kNormMin) ? float(kNormMin) : norm;
}
template <bool kSquash>
TEMPNET_DEVICE Column column_of(const HeadParams& params, const float* h, int j) {
  const float q = params.norms ? h[j] / norm_of(params, j) : h[j];
  const float f = kSquash ? sigmoid(q) : q;
  return {q, f, multiply(params.weight[j], f)};
}

// What the columns of a row have in common. mixed: sum_k weight_k w_k f_k.
struct Row {
  float qmax, s, share, mixed;
};

TEMPNET_DEVICE float softmax_of(float q, float a, const Row& row) {
  const float m = multiply(row.qmax, a);
  // What m was rounded by is taken off: where a is large it is no small number.
  return exp2_approx(fmaf(q, a, -m) - fmaf(row.qmax, a, -m)) / row.s;
}

// By a warp.
template <bool kSquash>
TEMPNET_DEVICE Row row_of(const HeadParams& params, const float* h, float a, int lane) {
  Row row{-INFINITY, 1, 0, 0};
  for (int j = lane; j < params.k; j += kWarp) {
    row.qmax = fmaxf(row.qmax, column_of<kSquash>(params, h, j).q);  // drops NaN: it reaches s
  }
  row.qmax = warp_max(row.qmax);
  float s = 0;
  for (int j = lane; j < params.k; j += kWarp) {
    s += softmax_of(column_of<kSquash>(params, h, j).q, a, row);
  }
  row.s = warp_sum(s);
  const float uniform = 1.0f / params.k;
  float t = 0;
  for (int j = lane; j < params.k; j += kWarp) {
    const Column c = column_of<kSquash>(params, h, j);
    const float w = softmax_of(c.q, a, row);
    t = fmaf(w - uniform, c.weighted, t);
    row.mixed = fmaf(w, c.weighted, row.mixed);
  }
  row.share = sigmoid(warp_sum(t) + params.bias[0]);
  row.mixed = warp_sum(row.mixed);
  return row;
}

// A warp per row.
template <bool kSquash>
TEMPNET_KERNEL(kThreads, 4)
head_kernel(TEMPNET_PARAM HeadParams params) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= params.n) return;  // with its whole warp
  const int lane = threadIdx.x % kWarp;
  const float a = Constants<float>::kLog2e / expf(params.scaler[0]);
  const Row row = row_of<kSquash>(params, params.h + i * params.k, a, lane);
  if (lane == 0) params.tau[i] = fmaf(params.tau_range, row.share, params.tau_min);
}

inline void launch_head(const HeadParams& params, bool squash, Stream stream) {
  if (params.n == 0) return;
  const dim3 grid(unsigned((params.n + kWarps - 1) / kWarps));
  launch(squash ? head_kernel<true> : head_kernel<false>, grid, kThreads, 1, 0, stream, params);
}

struct Gradient {
  float through_w, of_q, of_weight;  // of q, by way of w and as a whole; of the column's weight
};

template <bool kSquash>
TEMPNET_DEVICE Gradient gradient_of(const HeadParams& params, const Column& c, int j, float a,
                                    float temperature, const Row& row, float grad_t) {
  const float weight = params.weight[j];
  const float w = softmax_of(c.q, a, row);
  const float deviation = w - 1.0f / params.k;
  const float through_w = grad_t * w * (c.weighted - row.mixed) / temperature;
  const float grad_f = grad_t * weight * deviation;
  const float direct = kSquash ? grad_f * c.f * (1.0f - c.f) : grad_f;
  return {through_w, through_w + direct, grad_t * deviation * c.f};
}

// A row's numbers between the two parts of the backward.
struct HeldRow {
  Row row;
  float grad_t, grad_scaler;
};
constexpr int kHeldBytes = kHeldRows * sizeof(HeldRow);

// A CTA per block of rows. First a warp per row, for what its columns have in common; then a thread
// per column, which adds the rows in their order.
template <bool kSquash>
TEMPNET_KERNEL(kThreads, 4)
head_grad_kernel(TEMPNET_PARAM HeadParams params) {
  HeldRow* held = reinterpret_cast<HeldRow*>(shared_memory());
  const int lane = threadIdx.x % kWarp, k = params.k;
  const float temperature = expf(params.scaler[0]);
  const float a = Constants<float>::kLog2e / temperature;
  const int64_t begin = blockIdx.x * params.rows;
  const int64_t end = begin + params.rows < params.n ? begin + params.rows : params.n;
  float* sums = params.sums + blockIdx.x * int64_t(along_sums(k) + (params.norms ? k : 0));
  for (int64_t first = begin; first < end; first += kHeldRows) {
    const int count = int(end - first < kHeldRows ? end - first : kHeldRows);
    for (int r = threadIdx.x / kWarp; r < count; r += kWarps) {
      const float* h = params.h + (first + r) * k;
      const Row row = row_of<kSquash>(params, h, a, lane);
      const float grad_t = params.grad_tau[(first + r) * params.grad_tau_stride] *
                           params.tau_range * row.share * (1.0f - row.share);
      float scaler = 0;
      for (int j = lane; j < k; j += kWarp) {
        const Column c = column_of<kSquash>(params, h, j);
        // Of softmax(q / T) only differences of q count: from the largest, nothing cancels.
        const Gradient g = gradient_of<kSquash>(params, c, j, a, temperature, row, grad_t);
        scaler = fmaf(g.through_w, c.q - row.qmax, scaler);
      }
      scaler = warp_sum(scaler);
      if (lane == 0) held[r] = HeldRow{row, grad_t, -scaler};
    }
    __syncthreads();
    const bool adds = first > begin;  // to what this thread has written
    for (int j = threadIdx.x; j < k; j += kThreads) {
      float sum_h = adds ? sums[j] : 0.0f;
      float sum_weight = adds ? sums[weight_sums(k) + j] : 0.0f;
      float sum_along = adds && params.norms ? sums[along_sums(k) + j] : 0.0f;
      const float norm = params.norms ? norm_of(params, j) : 1.0f;
      const bool clamped = !params.norms || params.norms[j] < float(kNormMin);
      for (int r = 0; r < count; ++r) {
        const int64_t at = (first + r) * k;
        const Column c = column_of<kSquash>(params, params.h + at, j);
        const HeldRow x = held[r];
        const Gradient g = gradient_of<kSquash>(params, c, j, a, temperature, x.row, x.grad_t);
        const float grad_h = params.norms ? g.of_q / norm : g.of_q;
        params.grad_h[at + j] = grad_h;
        sum_h += grad_h;
        sum_weight += g.of_weight;
        if (!clamped) sum_along -= grad_h * c.q / norm;
      }
      sums[j] = sum_h;
      sums[weight_sums(k) + j] = sum_weight;
      if (params.norms) sums[along_sums(k) + j] = sum_along;
    }
    if (threadIdx.x == 0) {
      float scaler = adds ? sums[scaler_sum(k)] : 0.0f, bias = adds ? sums[bias_sum(k)] : 0.0f;
      for (int r = 0; r < count; ++r) {
        scaler += held[r].grad_scaler;
        bias += held[r].grad_t;
      }
      sums[scaler_sum(k)] = scaler;
      sums[bias_sum(k)] = bias;
    }
    __syncthreads();
  }
}

inline void launch_head_grad(const HeadParams& params, bool squash, Stream stream) {
  if (params.n == 0) return;
  launch(squash ? head_grad_kernel<true> : head_grad_kernel<false>,
         dim3(unsigned(row_blocks(params.n))), kThreads, 1, kHeldBytes, stream, params);
}

}  // namespace head
}  // namespace device
}  // namespace tempnet
