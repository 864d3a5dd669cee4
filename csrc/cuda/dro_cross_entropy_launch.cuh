// The token loss on a GPU: which kernel is launched, and how. No torch, as in the kernels.
#pragma once

#include "dro_cross_entropy.cuh"

namespace tempnet {
namespace device {

// How a forward is launched.
enum class Kernel { kRow, kTwoPass, kSplit };

struct Plan {
  Kernel kernel;
  int cluster;  // CTAs per row
  int threads;  // per CTA
  int vectors;  // of 16 bytes that a thread holds
  int slice;    // columns per CTA
};

// arch: 80 for compute capability 8.0. aligned: see forward_kernel. Limits as measured on an H100
// (benchmarks/NOTES.md).
inline Plan plan_forward(int64_t n, int v, int itemsize, bool aligned, int arch,
                         int multiprocessors, Mode mode, bool want_grad, bool capped) {
  const int bytes = v * itemsize;
  const bool few = n <= multiprocessors / 2, long_row = bytes > 1 << 16;
  // A long row that is read once needs no registers to stay in, and no exchange. With a gradient,
  // two visits pay where the rows of two CTAs per multiprocessor stay in the L2 cache and the
  // edges of slices that are not aligned would cost more.
  const int once = mode == kForward ? 1 << 16 : 104 << 10;
  const bool twice_in_cache = mode == kGradient && !aligned && bytes <= 104 << 10;
  const Plan twice{Kernel::kTwoPass, 1, 512, kVectors, v};
  // Fewer threads than without a cap: tanh takes registers, of which more CTAs are to have enough.
  if (capped) return {Kernel::kTwoPass, 1, 256, kVectors, v};
  if (!few && long_row && (want_grad ? twice_in_cache : bytes > once)) return twice;
  // The smallest cluster that holds the row in CTAs of which two fit on a multiprocessor; for few
  // rows the largest.
  const int largest = arch >= 90 ? 8 : 1;
  for (int cluster = few && bytes >= 1 << 15 ? largest : 1; cluster <= largest; cluster *= 2) {
    const int slice = cluster == 1 ? v : lines(divide_up(v, cluster), itemsize);
    const int vectors = divide_up(slice * itemsize, 16) + !aligned;
    const int threads = divide_up(divide_up(vectors, kVectors), kWarp) * kWarp;
    if (threads <= 512 || (cluster == largest && threads <= row_threads(mode))) {
      return {Kernel::kRow, cluster, threads, kVectors, slice};
    }
  }
  if (!few) return twice;
  const int slices = min(divide_up(multiprocessors, int(n)), divide_up(bytes, 1 << 14));
  return {Kernel::kSplit, 1, kSplitThreads, kVectors, lines(divide_up(v, slices), itemsize)};
}

inline const char* kernel_name(Kernel kernel) {
  const char* const names[] = {"row", "row, two passes", "split"};
  return names[int(kernel)];
}

// The kernel that reads the logits first. aligned: rows of logits and of the gradient are whole
// vectors that begin on 16 bytes.
template <class Z, Mode kMode>
auto forward_kernel(Kernel kernel, bool aligned) -> void (*)(Params) {
  switch (kernel) {
    case Kernel::kRow:
      return aligned ? row_kernel<Z, kMode, kAligned, false> : row_kernel<Z, kMode, kEdged, false>;
    case Kernel::kTwoPass:
      return row_kernel<Z, kMode, kTwice, false>;
    default:
      return split_kernel<Z, kMode, false>;
  }
}

template <class Z>
bool aligned_rows(const Params& params) {
  return params.v % kColumns<Z> == 0 && aligned_rows<Z>(params.logits, params.logits_stride) &&
         aligned_rows<Z>(params.grad, params.grad_stride);
}

template <class Z, Mode kMode>
void launch_mode(Params params, const Plan& plan, Stream stream) {
  const auto kernel = forward_kernel<Z, kMode>(plan.kernel, aligned_rows<Z>(params));
  const unsigned n = unsigned(params.n);
  const int bytes = merge_bytes(plan.threads, plan.cluster);
  params.slice = plan.slice;
  if (plan.kernel == Kernel::kSplit) {
    params.slices = divide_up(params.v, plan.slice);
    launch(kernel, dim3(n, params.slices), plan.threads, 1, bytes, stream, params);
    launch(join_kernel<Z, has_extras<kMode>>, dim3(n, params.grad ? params.slices : 1),
           plan.threads, 1, 0, stream, params);
  } else {
    launch(kernel, dim3(n * plan.cluster), plan.threads, plan.cluster, bytes, stream, params);
  }
}

// What the launch must compute.
inline Mode mode_of(const Params& params) {
  if (params.options.label_smoothing > 0) return kAll;
  return params.argmax ? kArgmax : params.grad ? kGradient : kForward;
}

template <class Z>
void launch_forward(Params params, const Plan& plan, Stream stream) {
  if (params.n == 0) return;
  const Mode mode = mode_of(params);
  if (params.softcap > 0) {  // two kernels for the four modes: each is compiled, and rarely used
    params.slice = plan.slice;
    launch(mode > kGradient ? row_kernel<Z, kAll, kTwice, true>
                            : row_kernel<Z, kGradient, kTwice, true>,
           dim3(unsigned(params.n)), plan.threads, 1, merge_bytes(plan.threads, 1), stream, params);
    return;
  }
  switch (mode) {
    case kForward:
      return launch_mode<Z, kForward>(params, plan, stream);
    case kGradient:
      return launch_mode<Z, kGradient>(params, plan, stream);
    case kArgmax:
      return launch_mode<Z, kArgmax>(params, plan, stream);
    default:
      return launch_mode<Z, kAll>(params, plan, stream);
  }
}

// Slices of a row whose state only is wanted: enough CTAs for every multiprocessor.
inline void plan_stats(Params& params, int itemsize, int multiprocessors) {
  const int slices =
      min(divide_up(multiprocessors, int(params.n)), divide_up(params.v * itemsize, 1 << 14));
  params.slice = lines(divide_up(params.v, slices), itemsize);
  params.slices = divide_up(params.v, params.slice);
}

template <class Z, Mode kMode, bool kCapped>
void launch_stats_mode(const Params& params, Stream stream) {
  const unsigned n = unsigned(params.n);
  launch(split_kernel<Z, kMode, kCapped>, dim3(n, params.slices), kSplitThreads, 1,
         merge_bytes(kSplitThreads, 1), stream, params);
  launch(stats_kernel<has_extras<kMode>, kCapped>, dim3(divide_up(int(n), kSplitThreads / kWarp)),
         kSplitThreads, 1, 0, stream, params);
}

template <class Z>
void launch_stats(Params params, bool want_mean, Stream stream) {
  if (params.n == 0) return;
  params.scale = params.tau;  // load_row reads a scale, which a state has not
  params.scale_stride = params.tau_stride;
  if (params.softcap > 0) {
    if (want_mean || params.argmax) return launch_stats_mode<Z, kAll, true>(params, stream);
    return launch_stats_mode<Z, kForward, true>(params, stream);
  }
  if (want_mean) return launch_stats_mode<Z, kAll, false>(params, stream);
  if (params.argmax) return launch_stats_mode<Z, kArgmax, false>(params, stream);
  launch_stats_mode<Z, kForward, false>(params, stream);
}

template <class Z>
void launch_backward(Params params, Stream stream) {
  if (params.n == 0) return;
  const int most = kElementwiseThreads * kBatch * kColumns<Z>;
  const int slices = divide_up(params.v, most);
  params.slice = lines(divide_up(params.v, slices), sizeof(Z));
  const int vectors = divide_up(params.slice, kColumns<Z>) + 1;
  const int threads = divide_up(divide_up(vectors, kBatch), kWarp) * kWarp;
  launch(params.softcap > 0 ? backward_kernel<Z, true> : backward_kernel<Z, false>,
         dim3(unsigned(params.n), slices), min(kElementwiseThreads, threads), 1, 0, stream, params);
}

template <class Z>
void launch_scale(const Params& params, int multiprocessors, Stream stream) {
  if (params.n == 0) return;
  const int ctas = 4 * multiprocessors;
  launch(scale_kernel<Z>, dim3(unsigned(params.n < ctas ? params.n : ctas)), kElementwiseThreads, 1,
         0, stream, params);
}

}  // namespace device
}  // namespace tempnet
