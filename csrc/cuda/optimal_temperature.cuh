// The optimal temperature on a GPU: a CTA per row. Its threads hold the row packed in registers,
// or, where it is longer, read it again from the L2 cache in every iteration. Nothing waits on the
// host: a row stops when it is done. No torch: tests/emulator/ compiles this file with g++ and
// runs it on a CPU.
#pragma once

#include <cfloat>

#include "../temperature_search.h"
#include "row_reduce.cuh"

namespace tempnet {
namespace device {

struct TemperatureParams {
  int64_t n;
  int v;
  const void* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  const float* rho;
  int64_t rho_stride;
  float log_v, tau_min, tau_max;
  float *tau, *kl;      // [n]
  int32_t* iterations;  // [n]
};

constexpr int kTemperatureThreads = 1024;
// A record of every warp, for two merges in turn: a barrier stands between the reads of one and the
// writes of the next but one.
constexpr int kTemperatureBytes = 2 * kWarp * int(sizeof(float4));

// The sums over the CTA, in every thread, by the same operations in the same order.
TEMPNET_DEVICE Moments<float> sum_of_cta(Moments<float> x, int turn) {
  float4* records = reinterpret_cast<float4*>(shared_memory()) + turn * kWarp;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = {warp_sum(x.s), warp_sum(x.sx), warp_sum(x.sxx)};
  if (lane == 0) records[threadIdx.x / kWarp] = float4{x.s, x.sx, x.sxx, 0};
  __syncthreads();
  float4 record{0, 0, 0, 0};
  if (lane < warps) record = records[lane];
  return {warp_sum(record.x), warp_sum(record.y), warp_sum(record.z)};
}

TEMPNET_DEVICE float max_of_cta(float x, int turn) {
  float4* records = reinterpret_cast<float4*>(shared_memory()) + turn * kWarp;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_max(x);
  if (lane == 0) records[threadIdx.x / kWarp].x = x;
  __syncthreads();
  return warp_max(lane < warps ? records[lane].x : -INFINITY);
}

// Adds a vector's columns: of d_j = z_j - zmax the number of finite ones, their sum and that of
// their squares (kWeighted false), or the sums at a temperature. A vector has sums of its own: the
// fewer terms one after the other, the less equal ones add to a rounding that is always the same.
template <class Z, bool kWeighted>
TEMPNET_DEVICE void add_vector(const uint32_t (&words)[kWords], float zmax, float a,
                               Moments<float>& total) {
  Moments<float> sum;
#pragma unroll
  for (int j = 0; j < kColumns<Z>; ++j) {
    const float d = Word<Z>::get(words[j / Word<Z>::kCount], j % Word<Z>::kCount) - zmax;
    float e, x;
    if (kWeighted) {
      const float u = multiply(d, a);
      e = exp2_approx(u);  // NaN stays NaN
      x = fmaxf(u, Constants<float>::kFloor);
    } else {
      const bool finite = d >= -FLT_MAX;
      e = finite ? 1.0f : 0.0f;
      x = finite ? d : 0.0f;
    }
    const float ex = multiply(e, x);
    sum.s += e;
    sum.sx += ex;
    sum.sxx = fmaf(ex, x, sum.sxx);
  }
  total.s += sum.s;
  total.sx += sum.sx;
  total.sxx += sum.sxx;
}

template <class Z, bool kHeld>
TEMPNET_KERNEL(kTemperatureThreads, 1)
temperature_kernel(TEMPNET_PARAM TemperatureParams params) {
  const int64_t i = blockIdx.x;
  const Z* row = static_cast<const Z*>(params.logits) + i * params.logits_stride;
  const Span<Z, true> span(row, 0, params.v);
  constexpr int kTile = kHeld ? kVectors : kBatch;
  uint32_t words[kTile][kWords];
  const auto load_tile = [&](int first) {
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      span.template load<!kHeld>(span.column(first + k * int(blockDim.x)), words[k]);
    }
  };
  if constexpr (kHeld) load_tile(threadIdx.x);
  // f() on every tile of this thread's vectors.
  const auto for_each_tile = [&](auto f) {
    if constexpr (kHeld) {
      // What the last visit made of them would take more registers than the packed words.
#pragma unroll
      for (int k = 0; k < kTile; ++k) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) forget(words[k][w]);
      }
      f();
    } else {
      const int vectors = span.vectors();
      for (int first = threadIdx.x; first < vectors; first += kTile * int(blockDim.x)) {
        load_tile(first);
        f();
      }
    }
  };

  float zmax = -INFINITY;
  for_each_tile([&] {
    int where = 0;
    zmax = fmaxf(zmax, packed_maximum<Z, false>(words, where));  // drops NaN, which reaches s
  });
  zmax = max_of_cta(zmax, 0);
  int turn = 1;
  const auto moments = [&](auto weighted, float a) {
    Moments<float> total;
    for_each_tile([&] {
#pragma unroll
      for (int k = 0; k < kTile; ++k) {
        add_vector<Z, decltype(weighted)::value>(words[k], zmax, a, total);
      }
    });
    total = sum_of_cta(total, turn);
    turn = 1 - turn;
    return total;
  };

  const float rho = params.rho[i * params.rho_stride];
  TemperatureSearch<float> search;
  search.rho = rho >= 0 ? rho : NAN;
  search.log_v = params.log_v;
  search.inverse_v = 1 / float(params.v);
  search.tau_min = params.tau_min;
  search.tau_max = params.tau_max;
  search.begin(moments(std::false_type(), 1));
  while (search.next(moments(std::true_type(), Constants<float>::kLog2e / search.tau))) {
  }
  if (threadIdx.x == 0) {
    params.tau[i] = search.tau;
    params.kl[i] = search.kl;
    params.iterations[i] = search.evaluations;
  }
}

template <class Z>
void launch_temperature(const TemperatureParams& params, bool hold, Stream stream) {
  if (params.n == 0) return;
  // One more than the row has: it may begin off 16 bytes.
  const int vectors = divide_up(params.v, kColumns<Z>) + 1;
  const int threads = divide_up(divide_up(vectors, kVectors), kWarp) * kWarp;
  const bool held = hold && threads <= kTemperatureThreads;
  launch(held ? temperature_kernel<Z, true> : temperature_kernel<Z, false>,
         dim3(unsigned(params.n)), min(threads, kTemperatureThreads), 1, kTemperatureBytes, stream,
         params);
}

}  // namespace device
}  // namespace tempnet
