// What the TempNet needs of a chunk's logits on a GPU: the norm of every row, and its maximum. One
// visit: a thread's sums follow its maximum as the columns come.
#pragma once

#include "../temperature_head.h"
#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace linear {

struct Params {
  int64_t n;
  int v;
  const void* logits;  // [n, v], column stride 1
  int64_t stride;
  float* moments;  // [5, n]: shift, sum of (z - shift)^2, of z - shift, count, without -inf; 1/norm
  float softcap;   // 0 for none
};

constexpr int kThreads = 512;
constexpr int kSharedBytes = kThreads / kWarp * 16;

// Of columns that are not -inf. With kCenter about their maximum, which the shift then is.
struct Moments {
  float shift = -INFINITY, squares = 0, sum = 0, count = 0;
};

// Moves the sums to the larger shift. d and the sum are never positive, so nothing cancels.
TEMPNET_DEVICE void move_to(float shift, Moments& p) {
  const float d = p.shift - shift;
  // An empty part's shift is -inf, and a sum that overflowed is not to be multiplied by 0.
  if (p.count == 0 || d == 0) return;
  p.squares += d * fmaf(p.count, d, 2 * p.sum);
  p.sum = fmaf(p.count, d, p.sum);
}

template <bool kCenter>
TEMPNET_DEVICE void warp_merge(Moments& p) {
  if (kCenter) {
    const float shift = warp_max(p.shift);
    move_to(shift, p);
    p.shift = shift;
    p.sum = warp_sum(p.sum);
    p.count = warp_sum(p.count);
  }
  p.squares = warp_sum(p.squares);
}

template <bool kCenter, class Z, class Scale, class Column>
TEMPNET_DEVICE void add_vectors(const uint32_t (&words)[kBatch][kWords], const Scale& scale,
                                const Span<Z, true>& span, Column column, Moments& p) {
  if (kCenter) {
    int unused;
    const float zmax = logit(packed_maximum<Z, false>(words, unused), scale).value;
    const float shift = fmaxf(p.shift, zmax);
    move_to(shift, p);
    p.shift = shift;
  }
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
#pragma unroll
    for (int j = 0; j < kColumns<Z>; ++j) {
      const float given = Word<Z>::get(words[k][j / Word<Z>::kCount], j % Word<Z>::kCount);
      const float z = logit(given, scale).value;
      // NaN counts; and capped, -inf, but not that of a column that is not the span's.
      const bool counted = is_capped<Scale> ? span.holds(column(k) + j) : z != -INFINITY;
      const float x = counted ? (kCenter ? z - p.shift : z) : 0.0f;
      p.squares = fmaf(x, x, p.squares);
      if (kCenter) {
        p.sum += x;
        p.count += counted ? 1.0f : 0.0f;
      }
    }
  }
}

// A CTA per row.
template <class Z, bool kCenter, bool kCapped>
TEMPNET_KERNEL(kThreads, 2)
moments_kernel(TEMPNET_PARAM Params params) {
  const int64_t i = blockIdx.x;
  const Span<Z, true> span(static_cast<const Z*>(params.logits) + i * params.stride, 0, params.v);
  const int vectors = span.vectors();
  const auto scale = scale_of<kCapped>(params.softcap, 1.0f);
  Moments p;
  for (int first = threadIdx.x; first < vectors; first += kBatch * int(blockDim.x)) {
    const auto column = [&](int k) { return span.column(first + k * int(blockDim.x)); };
    uint32_t words[kBatch][kWords];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {  // past the end: -inf, which does not count
      span.template load<true>(column(k), words[k]);
    }
    add_vectors<kCenter>(words, scale, span, column, p);
  }
  warp_merge<kCenter>(p);
  float4* records = reinterpret_cast<float4*>(shared_memory());
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) records[threadIdx.x / kWarp] = float4{p.shift, p.squares, p.sum, p.count};
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  p = Moments{};
  if (lane < warps) {
    const float4 x = records[lane];
    p = Moments{x.x, x.y, x.z, x.w};
  }
  warp_merge<kCenter>(p);
  if (lane != 0) return;
  params.moments[i] = kCenter ? p.shift : 0.0f;
  params.moments[params.n + i] = p.squares;
  params.moments[2 * params.n + i] = p.sum;
  params.moments[3 * params.n + i] = p.count;
  params.moments[4 * params.n + i] = inverse_norm(p.squares);
}

template <class Z>
auto moments_kernel_for(bool center, bool capped) -> void (*)(Params) {
  if (capped) return center ? moments_kernel<Z, true, true> : moments_kernel<Z, false, true>;
  return center ? moments_kernel<Z, true, false> : moments_kernel<Z, false, false>;
}

template <class Z>
void launch_moments(const Params& params, bool center, Stream stream) {
  if (params.n == 0) return;
  const int batches = divide_up(divide_up(params.v, kColumns<Z>) + 1, kBatch);
  const int threads = min(kThreads, divide_up(batches, kWarp) * kWarp);
  launch(moments_kernel_for<Z>(center, params.softcap > 0), dim3(unsigned(params.n)), threads, 1,
         kSharedBytes, stream, params);
}

struct NormalizeParams {
  int64_t n;
  int v;
  const void* logits;  // [n, v], column stride 1
  int64_t stride;
  const float *shift, *inverse;  // [n]
  float softcap;                 // 0 for none
  float* x;                      // [n, v]
};

constexpr int kNormalizeThreads = 256;
constexpr int kNormalizeColumns = 8;                                   // of a thread
constexpr int kNormalizeSpan = kNormalizeThreads * kNormalizeColumns;  // of a CTA
constexpr int kMostSpans = 65535;                                      // of a grid's second axis

template <class Z, bool kCapped>
TEMPNET_KERNEL(kNormalizeThreads, 4)
normalize_kernel(TEMPNET_PARAM NormalizeParams params) {
  const int64_t i = blockIdx.x;
  const Z* z = static_cast<const Z*>(params.logits) + i * params.stride;
  float* x = params.x + i * params.v;
  const float shift = params.shift[i], inverse = params.inverse[i];
  const auto scale = scale_of<kCapped>(params.softcap, 1.0f);
  for (int begin = blockIdx.y * kNormalizeSpan; begin < params.v;
       begin += gridDim.y * kNormalizeSpan) {
#pragma unroll
    for (int c = 0; c < kNormalizeColumns; ++c) {
      const int j = begin + threadIdx.x + c * kNormalizeThreads;
      if (j >= params.v) return;
      const float centred = logit(to_float(z[j]), scale).value - shift;
      // A row of a negative inverse is 0, whatever is there.
      x[j] = centred == -INFINITY || inverse < 0 ? 0.0f : centred * inverse;
    }
  }
}

template <class Z>
void launch_normalize(const NormalizeParams& params, Stream stream) {
  if (params.n == 0) return;
  const dim3 grid(unsigned(params.n),
                  unsigned(min(divide_up(params.v, kNormalizeSpan), kMostSpans)));
  launch(params.softcap > 0 ? normalize_kernel<Z, true> : normalize_kernel<Z, false>, grid,
         kNormalizeThreads, 1, 0, stream, params);
}

}  // namespace linear
}  // namespace device
}  // namespace tempnet
