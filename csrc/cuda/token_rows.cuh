// What surrounds the token loss on a GPU, each in one small launch: the weight of every row, and
// the sum of the rows. One CTA, so that the order of every sum is fixed and nothing is read back.
// No torch: tests/emulator/ compiles this file with g++ and runs it on a CPU.
#pragma once

#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace token_rows {

constexpr int kThreads = 1024;
constexpr int kSharedBytes = (kWarp + 1) * sizeof(float);

// In every thread. Between two calls stands a barrier of the caller's.
TEMPNET_DEVICE float sum_of_cta(float x) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

struct ScaleParams {
  int64_t n;
  const void* target;  // [n] int64, or int32 where not wide
  int64_t target_stride;
  bool wide_target;
  bool weighted;
  const float* weight;  // [n]
  int64_t weight_stride;
  const float* normalizer;  // [1] or null
  float divisor;            // what to divide by where there is no normalizer; negative: the sum
  int64_t ignore_index;
  bool mean;
  float *scale, *total;  // [n], without weights all at the first place; [1]

  TEMPNET_DEVICE bool kept(int64_t i) const {
    const int64_t y = wide_target ? static_cast<const int64_t*>(target)[i * target_stride]
                                  : static_cast<const int32_t*>(target)[i * target_stride];
    return y != ignore_index;
  }
  TEMPNET_DEVICE float weight_of(int64_t i) const {
    return weighted ? weight[i * weight_stride] : 1.0f;
  }
};

TEMPNET_KERNEL(kThreads, 1)
scale_kernel(TEMPNET_PARAM ScaleParams p) {
  float sum = 0;
  if (p.normalizer) {
    sum = *p.normalizer;
  } else if (p.divisor >= 0) {
    sum = p.divisor;
  } else if (p.mean) {
    for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
      if (p.kept(i)) sum += p.weight_of(i);
    }
    sum = sum_of_cta(sum);
  }
  const float inverse = !p.mean ? 1.0f : sum == 0 ? 0.0f : 1 / sum;
  if (threadIdx.x == 0) *p.total = sum;
  if (!p.weighted) {
    if (threadIdx.x == 0 && p.n > 0) *p.scale = inverse;
    return;
  }
  // The weight of an ignored row may be anything, NaN too.
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    p.scale[i] = p.kept(i) ? p.weight_of(i) * inverse : 0.0f;
  }
}

struct SumParams {
  int64_t n;
  const float* rows;  // [n]
  int64_t stride;
  const float* total;  // [1] or null; NaN is the result where it is 0
  float* sum;          // [1]
};

TEMPNET_KERNEL(kThreads, 1)
sum_kernel(TEMPNET_PARAM SumParams p) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) sum += p.rows[i * p.stride];
  sum = sum_of_cta(sum);
  if (threadIdx.x == 0) *p.sum = p.total && *p.total == 0 ? NAN : sum;
}

// Threads for n rows: those of a CTA, or fewer.
inline int threads_of(int64_t n) {
  return n >= kThreads ? kThreads : (int(n) + kWarp - 1) / kWarp * kWarp + (n == 0) * kWarp;
}

inline void launch_scale(const ScaleParams& params, Stream stream) {
  launch(scale_kernel, dim3(1), threads_of(params.n), 1, kSharedBytes, stream, params);
}

inline void launch_sum(const SumParams& params, Stream stream) {
  launch(sum_kernel, dim3(1), threads_of(params.n), 1, kSharedBytes, stream, params);
}

}  // namespace token_rows
}  // namespace device
}  // namespace tempnet
