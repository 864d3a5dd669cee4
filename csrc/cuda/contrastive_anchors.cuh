// What stands before and behind the tiles of the contrastive loss on a GPU: the states that they
// begin with, what the anchors make of them, the positives' share of the gradients, and the state
// per sample. No torch: tests/emulator/ compiles this file with g++ and runs it on a CPU.
#pragma once

#include "../contrastive_anchors.h"
#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace anchors {

constexpr int kAnchorThreads = 128;

TEMPNET_DEVICE int64_t thread_of_grid() {
  return int64_t(blockIdx.x) * kAnchorThreads + threadIdx.x;
}
inline dim3 blocks_of(int64_t size) {
  return dim3(unsigned((size + kAnchorThreads - 1) / kAnchorThreads));
}

TEMPNET_KERNEL(kAnchorThreads, 1)
start_kernel(TEMPNET_PARAM StartParams<float> params) { params.fill(thread_of_grid()); }

TEMPNET_KERNEL(kAnchorThreads, 1)
pair_columns_kernel(TEMPNET_PARAM StartParams<float> params) {
  const int64_t i = thread_of_grid();
  if (i < params.m) params.pair_column(i);
}

TEMPNET_KERNEL(kAnchorThreads, 1)
anchors_kernel(TEMPNET_PARAM AnchorParams<float> params) { params.one(thread_of_grid()); }

inline void launch_start(const StartParams<float>& params, Stream stream) {
  const int64_t size = params.m > params.all ? params.m : params.all;
  if (size == 0) return;
  launch(start_kernel, blocks_of(size), kAnchorThreads, 1, 0, stream, params);
  if (!params.given || params.m == 0) return;
  launch(pair_columns_kernel, blocks_of(params.m), kAnchorThreads, 1, 0, stream, params);
}

inline void launch_anchors(const AnchorParams<float>& params, Stream stream) {
  const int64_t size = params.m > params.n ? params.m : params.n;
  if (size == 0) return;
  launch(anchors_kernel, blocks_of(size), kAnchorThreads, 1, 0, stream, params);
}

// Of every row of a side, (sum / unit - total of its pair * the pair's features) * scale, the
// difference before it is rounded.
struct GradientSide {
  int64_t rows;      // 0 where the gradient is not wanted
  void* grad;        // [rows, d]; may be the sums
  const float* sum;  // [rows, d]
  const void* others;
};
struct GradientParams {
  GradientSide image, text;
  int64_t d;
  const float* total;       // [M]
  const int64_t* positive;  // [M]
  const int32_t* pair;      // [N] the row whose pair a column is, or -1
  const float* unit;        // null: 1
  const float* scale;
};

template <class F, class Z>
TEMPNET_DEVICE void gradient_row(const GradientParams& params, const GradientSide& side, int64_t r,
                                 int64_t i, int64_t other) {
  const float inverse = params.unit ? 1 / *params.unit : 1.0f;  // of a power of two
  const float scale = *params.scale, total = i < 0 ? 0.0f : params.total[i];
  const float* sum = side.sum + r * params.d;
  const F* others = static_cast<const F*>(side.others) + other * params.d;
  Z* grad = static_cast<Z*>(side.grad) + r * params.d;
  for (int64_t k = threadIdx.x; k < params.d; k += blockDim.x) {
    float difference = sum[k] * inverse;
    if (i >= 0) difference = fmaf(-total, to_float(others[k]), difference);
    difference *= scale;
    grad[k] = from_bits<Z>(Word<Z>::pack(difference, difference));
  }
}

// A CTA per row of either side.
template <class F, class Z>
TEMPNET_KERNEL(kAnchorThreads, 1)
gradients_kernel(TEMPNET_PARAM GradientParams params) {
  const int64_t r = blockIdx.x, j = r - params.image.rows;
  if (j < 0) {
    gradient_row<F, F>(params, params.image, r, r, params.positive[r]);
  } else {
    const int64_t i = params.pair[j];
    gradient_row<F, Z>(params, params.text, j, i, i < 0 ? 0 : i);
  }
}

// F: of the features and of the images' gradient; Z: of the texts'.
template <class F, class Z>
void launch_gradients(const GradientParams& params, Stream stream) {
  const int64_t rows = params.image.rows + params.text.rows;
  if (rows == 0 || params.d == 0) return;
  const int64_t warps = (params.d + kWarp - 1) / kWarp;
  const int threads = int(min(int64_t(kAnchorThreads), warps * kWarp));
  launch(gradients_kernel<F, Z>, dim3(unsigned(rows)), threads, 1, 0, stream, params);
}

}  // namespace anchors
}  // namespace device
}  // namespace tempnet
