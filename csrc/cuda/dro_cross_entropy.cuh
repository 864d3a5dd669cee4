// The token loss on a GPU: kernels and their launch plan. No torch: tests/cuda_emulator/ compiles
// this file with g++ and runs it on a CPU.
//
// - row_kernel: one CTA per row, the row in registers where it fits, else two passes.
// - cluster_kernel (sm_90): a cluster of CTAs per row and a grid that stays; the row's next
//   neighbour is copied to shared memory while this one is worked on in registers.
// - split_kernel, join_kernel: few rows, each spread over many CTAs.
#pragma once

#include "row_reduce.cuh"

namespace tempnet {
namespace device {

enum RowField { kLoss, kGradTau, kM, kLog2S, kEntropy, kLogProb, kRowFields };

struct Params {
  int64_t n;
  int v;
  const void* logits;  // [n, v], column stride 1
  int64_t logits_stride;
  void* grad;  // null where no gradient is wanted; may be the logits
  int64_t grad_stride;
  const void* target;
  int64_t target_stride;
  bool wide_target;  // int64, not int32
  const float* tau;
  int64_t tau_stride;
  const float* scale;
  int64_t scale_stride;
  float* loss;      // [n]
  float* rows;      // [kRowFields, n]
  int64_t* argmax;  // [n] or null
  int64_t ignore_index;
  LossOptions<float> options;
  bool unscaled;    // store c p - q without the row's scale
  int slice;        // columns per CTA of a cluster, or of a split row
  int slices;       // per row
  Partial* parts;   // [n, slices], for split_kernel
  Extras* extras;   // the same
};

// What a launch computes. The statistics that cost more have a kernel of their own.
enum Mode { kForward, kGradient, kAll };

constexpr int kVectors = 8;  // 16-byte vectors of a row that a thread holds: 32 registers

struct RowInputs {
  int64_t i;
  int y;
  float tau, scale, a;
  bool ignored, live;
};

TEMPNET_DEVICE RowInputs load_row(const Params& params, int64_t i) {
  RowInputs row;
  row.i = i;
  const int64_t y = params.wide_target
                        ? static_cast<const int64_t*>(params.target)[i * params.target_stride]
                        : static_cast<const int32_t*>(params.target)[i * params.target_stride];
  row.tau = params.tau[i * params.tau_stride];
  row.scale = params.scale[i * params.scale_stride];
  row.ignored = y == params.ignore_index;
  const bool inside = y >= 0 && y < params.v;
  row.y = inside ? int(y) : 0;
  row.live = !row.ignored && inside && row.tau > 0;
  row.a = Constants<float>::kLog2e / row.tau;
  return row;
}

template <class Z>
TEMPNET_DEVICE const Z* logits_row(const Params& params, int64_t i) {
  return static_cast<const Z*>(params.logits) + i * params.logits_stride;
}
template <class Z>
TEMPNET_DEVICE Z* grad_row(const Params& params, int64_t i) {
  return static_cast<Z*>(params.grad) + i * params.grad_stride;
}

template <class Z>
TEMPNET_DEVICE void fill(Z* row, int begin, int end, float value) {
  const uint32_t word = Word<Z>::pack(value, value);
  const uint32_t words[kWords] = {word, word, word, word};
  const Span<Z> span(row, begin, end);
  const int vectors = span.vectors();
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    store_vector(span, row, span.column(k), words);
  }
}

TEMPNET_DEVICE float times(float scale, float x) { return scale == 0 ? 0.0f : scale * x; }

// A row that is not read: ignored, or with a bad target or temperature.
template <class Z>
TEMPNET_DEVICE void dead_row(const Params& params, const RowInputs& row, bool first, int begin,
                             int end) {
  const float value = row.ignored ? 0.0f : NAN, scaled = times(row.scale, value);
  if (first && threadIdx.x == 0) {
    params.loss[row.i] = scaled;
    params.rows[kLoss * params.n + row.i] = value;
    params.rows[kGradTau * params.n + row.i] = scaled;
    for (int field = kM; field < kRowFields; ++field) params.rows[field * params.n + row.i] = NAN;
    if (params.argmax) params.argmax[row.i] = -1;
  }
  if (params.grad && begin < end) fill(grad_row<Z>(params, row.i), begin, end, scaled);
}

// One thread's work.
TEMPNET_DEVICE void store_row(const Params& params, const RowInputs& row, const Partial& p,
                              const Extras* extras) {
  const RowState<float> state{row_maximum(p.zmax, row.a), p.s, p.sx};
  const float mean_u = extras ? extras->su / float(params.v) : 0.0f;
  const RowResult<float> r = finish(state, p.zmax, p.z_y, mean_u, row.tau, params.options);
  const int64_t n = params.n, i = row.i;
  params.loss[i] = times(row.scale, r.loss);
  params.rows[kLoss * n + i] = r.loss;
  params.rows[kGradTau * n + i] = times(row.scale, r.grad_tau);
  params.rows[kM * n + i] = state.m;
  params.rows[kLog2S * n + i] = r.log2_s;
  params.rows[kEntropy * n + i] = r.entropy;
  params.rows[kLogProb * n + i] = r.log_prob;
  if (params.argmax) {
    const bool finite = r.log2_s - r.log2_s == 0;
    params.argmax[i] = finite ? extras->argmax : -1;
  }
}

TEMPNET_DEVICE float z_loss_factor(const Params& params, float m, float log2_s, float tau) {
  return 1 + 2 * params.options.z_loss * Constants<float>::kLn2 * (m + log2_s) / tau;
}

TEMPNET_DEVICE Gradient gradient(const Params& params, const RowInputs& row, const Partial& p,
                                 float stored) {
  const float m = row_maximum(p.zmax, row.a);
  const float c = params.options.z_loss == 0
                      ? 1.0f
                      : z_loss_factor(params, m, log2f(p.s), row.tau);
  return gradient_of_row(row.a, m, 1 / p.s, p.z_y, row.y, c, stored,
                         params.options.label_smoothing, 1 / float(params.v));
}

// The merge over a CTA's warps, in every thread. Ends with a barrier that every read of the row's
// logits by this CTA comes before.
template <bool kHasExtras>
TEMPNET_DEVICE void block_merge(Partial& p, Extras* extras, float a) {
  Partial* parts = reinterpret_cast<Partial*>(shared_memory());
  Extras* parts_extras = reinterpret_cast<Extras*>(parts + kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  warp_merge(p, extras, a);
  if (lane == 0) {
    parts[warp] = p;
    if (kHasExtras) parts_extras[warp] = *extras;
  }
  __syncthreads();
  p = lane < warps ? parts[lane] : Partial{};
  if (kHasExtras) *extras = lane < warps ? parts_extras[lane] : Extras{};
  warp_merge(p, extras, a);
}
constexpr int kBlockMergeBytes = kWarp * int(sizeof(Partial) + sizeof(Extras));

template <class Z, bool kKeep>
TEMPNET_DEVICE void load_tile(const Span<Z>& span, int tile, uint32_t (&words)[kVectors][kWords]) {
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    load_vector<Z, kKeep>(span, span.column((tile * kVectors + k) * blockDim.x + threadIdx.x),
                          words[k]);
  }
}

// The part of columns [begin, end) that this thread reads, tile by tile.
template <class Z, bool kHasExtras, bool kKeep>
TEMPNET_DEVICE Partial reduce_span(const Span<Z>& span, float a, Extras* extras,
                                   uint32_t (&words)[kVectors][kWords]) {
  const int tile_vectors = kVectors * blockDim.x;
  const int tiles = (span.vectors() + tile_vectors - 1) / tile_vectors;
  Partial p;
  for (int tile = 0; tile < tiles; ++tile) {
    Extras q_extras;
    load_tile<Z, kKeep>(span, tile, words);
    const Partial q = reduce_vectors<Z>(
        words, a, span,
        [&](int k) {
          return span.column((tile * kVectors + k) * int(blockDim.x) + int(threadIdx.x));
        },
        kHasExtras ? &q_extras : nullptr);
    merge_into(p, extras, q, kHasExtras ? &q_extras : nullptr, a);
  }
  return p;
}

template <class Z>
TEMPNET_DEVICE void write_span(const Span<Z>& span, Z* row, const Gradient& g) {
  const int vectors = span.vectors();
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    uint32_t words[kWords];
    load_vector<Z, false>(span, span.column(k), words);
    to_gradient<Z>(g, span.column(k), words);
    store_vector(span, row, span.column(k), words);
  }
}

// More threads leave 64 registers each, which the row and the rarer statistics do not fit in.
constexpr int row_threads(bool has_extras) { return has_extras ? 512 : 1024; }

template <class Z, Mode kMode, bool kResident>
TEMPNET_KERNEL(row_threads(kMode == kAll), 1)
row_kernel(TEMPNET_PARAM Params params) {
  constexpr bool kHasExtras = kMode == kAll;
  const RowInputs row = load_row(params, blockIdx.x);
  if (!row.live) {
    dead_row<Z>(params, row, true, 0, params.v);
    return;
  }
  const Z* logits = logits_row<Z>(params, row.i);
  const Span<Z> span(logits, 0, params.v);
  uint32_t words[kVectors][kWords];
  Partial p;
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  const auto column = [&](int k) {
    return span.column(k * int(blockDim.x) + int(threadIdx.x));
  };
  if (kResident) {
    load_tile<Z, false>(span, 0, words);
    p = reduce_vectors<Z>(words, row.a, span, column, extras);
  } else {
    p = reduce_span<Z, kHasExtras, true>(span, row.a, extras, words);
  }
  p.z_y = to_float(logits[row.y]);
  block_merge<kHasExtras>(p, extras, row.a);
  if (threadIdx.x == 0) store_row(params, row, p, extras);
  if (kMode == kForward || !params.grad) return;
  Z* grad = grad_row<Z>(params, row.i);
  if (row.scale == 0) {
    fill(grad, 0, params.v, 0.0f);
    return;
  }
  const Gradient g = gradient(params, row, p, params.unscaled ? 1.0f : row.scale);
  if constexpr (kResident) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) forget(words[k][w]);
      to_gradient<Z>(g, column(k), words[k]);
      store_vector(span, grad, column(k), words[k]);
    }
  } else {
    write_span(span, grad, g);
  }
}

// Shared memory of cluster_kernel: one slot for a slice of a row, then barriers and the parts that
// the warps of the cluster exchange, double buffered.
constexpr int kClusterThreads = 512;
constexpr int kClusterWarps = kClusterThreads / kWarp;
struct Exchange {
  uint64_t loaded, exchanged[2];
  uint64_t unused;
};
struct Record {
  Partial part;
  Extras extras;
};
inline int cluster_shared_bytes(int slice_bytes, int cluster, bool has_extras) {
  const int record = has_extras ? sizeof(Record) : sizeof(Partial);
  return (slice_bytes + 127) / 128 * 128 + int(sizeof(Exchange)) +
         2 * cluster * kClusterWarps * record;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <class Z, Mode kMode, int kHeld>
TEMPNET_KERNEL(kClusterThreads, 2)
cluster_kernel(TEMPNET_PARAM Params params) {
  constexpr bool kHasExtras = kMode == kAll;
  constexpr int kRecord = kHasExtras ? 2 : 1;  // in units of 16 bytes
  const int rank = int(cluster_rank()), cluster = int(cluster_size());
  const int64_t clusters = gridDim.x / cluster;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int begin = min(params.v, rank * params.slice);
  const int end = min(params.v, begin + params.slice);
  // A last vector that is not whole is read by its thread: what comes after it may be no memory.
  const int whole = (end - begin) / kColumns<Z>;

  uint8_t* slot = shared_memory();
  const int slot_bytes = (params.slice * int(sizeof(Z)) + 127) / 128 * 128;
  Exchange* exchange = reinterpret_cast<Exchange*>(slot + slot_bytes);
  float4* records = reinterpret_cast<float4*>(exchange + 1);
  const int buffer = cluster * kClusterWarps * kRecord;
  if (threadIdx.x == 0) {
    mbarrier_init(&exchange->loaded, 1);
    mbarrier_init(&exchange->exchanged[0], 1);
    mbarrier_init(&exchange->exchanged[1], 1);
    mbarrier_init_fence();
  }
  cluster_sync();

  // The row's slice into the slot, if the row is read at all. One thread's work.
  const auto load_slot = [&](const RowInputs& row) {
    if (!row.live || whole == 0) return;
    const uint32_t bytes = whole * 16;
    mbarrier_arrive_expect(&exchange->loaded, bytes);
    bulk_load(slot, logits_row<Z>(params, row.i) + begin, bytes, &exchange->loaded);
  };

  uint32_t round = 0;  // of live rows: the phase of the barriers
  int64_t i = blockIdx.x / cluster;
  RowInputs next = load_row(params, i);
  if (threadIdx.x == 0) load_slot(next);
  for (; i < params.n; i += clusters) {
    const RowInputs row = next;
    const bool more = i + clusters < params.n;
    if (more) next = load_row(params, i + clusters);
    if (!row.live) {
      if (more && threadIdx.x == 0) load_slot(next);
      dead_row<Z>(params, row, rank == 0, begin, end);
      continue;
    }
    const Z* logits = logits_row<Z>(params, row.i);
    const Span<Z> span(logits, begin, end);
    const auto column = [&](int k) {
      return begin + (k * kClusterThreads + int(threadIdx.x)) * kColumns<Z>;
    };
    uint32_t words[kHeld][kWords];
    if (whole > 0) mbarrier_wait(&exchange->loaded, round & 1);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int vector = k * kClusterThreads + threadIdx.x;
      if (vector < whole) {
        const uint4 v = reinterpret_cast<const uint4*>(slot)[vector];
        words[k][0] = v.x, words[k][1] = v.y, words[k][2] = v.z, words[k][3] = v.w;
      } else {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          words[k][w] = load_word_by_columns(span, column(k) + w * Word<Z>::kCount);
        }
      }
    }
    float z_y = -INFINITY;
    if (warp == 0 && span.holds(row.y)) {
      const int at = row.y - begin;
      z_y = to_float(at < whole * kColumns<Z> ? reinterpret_cast<const Z*>(slot)[at]
                                              : logits[row.y]);
    }
    __syncthreads();  // the slot is in registers
    if (more && threadIdx.x == 0) load_slot(next);

    Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
    Partial p = reduce_vectors<Z>(words, row.a, span, column, extras);
    p.z_y = z_y;
    warp_merge(p, extras, row.a);

    // Every warp sends its part to every CTA. A buffer is free again after the exchange that
    // follows its own: that one proves that every warp has read it.
    uint64_t* exchanged = &exchange->exchanged[round & 1];
    float4* parts = records + (round & 1) * buffer;
    if (threadIdx.x == 0) mbarrier_arrive_expect(exchanged, buffer * 16);
    if (lane < cluster) {
      float4* to = parts + (rank * kClusterWarps + warp) * kRecord;
      store_remote(to, lane, float4{p.zmax, p.s, p.sx, p.z_y}, exchanged);
      if (kHasExtras) {
        store_remote(to + 1, lane,
                     float4{extras->su, extras->count, bits_to_float(uint32_t(extras->argmax)), 0},
                     exchanged);
      }
    }
    mbarrier_wait(exchanged, (round >> 1) & 1);
    ++round;
    p = Partial{};
    if (kHasExtras) *extras = Extras{};
    for (int j = lane; j < cluster * kClusterWarps; j += kWarp) {
      const float4 x = parts[j * kRecord];
      const Partial q{x.x, x.y, x.z, x.w};
      Extras q_extras;
      if (kHasExtras) {
        const float4 e = parts[j * kRecord + 1];
        q_extras = Extras{e.x, e.y, int(float_to_bits(e.z)), 0};
      }
      merge_into(p, extras, q, kHasExtras ? &q_extras : nullptr, row.a);
    }
    warp_merge(p, extras, row.a);

    if (rank == 0 && threadIdx.x == 0) store_row(params, row, p, extras);
    if (kMode == kForward || !params.grad) continue;
    Z* grad = grad_row<Z>(params, row.i);
    if (row.scale == 0) {
      if (begin < end) fill(grad, begin, end, 0.0f);
      continue;
    }
    const Gradient g = gradient(params, row, p, params.unscaled ? 1.0f : row.scale);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (column(k) < end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) forget(words[k][w]);
        to_gradient<Z>(g, column(k), words[k]);
        store_vector(span, grad, column(k), words[k]);
      }
    }
  }
  cluster_sync();  // a CTA that left could not be sent to
}
#endif

// The part of slice blockIdx.y of row blockIdx.x.
template <class Z, bool kHasExtras>
TEMPNET_KERNEL(512, 2)
split_kernel(TEMPNET_PARAM Params params) {
  const RowInputs row = load_row(params, blockIdx.x);
  if (!row.live) return;
  const Z* logits = logits_row<Z>(params, row.i);
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  const Span<Z> span(logits, begin, end);
  uint32_t words[kVectors][kWords];
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  Partial p = reduce_span<Z, kHasExtras, true>(span, row.a, extras, words);
  if (span.holds(row.y)) p.z_y = to_float(logits[row.y]);
  block_merge<kHasExtras>(p, extras, row.a);
  if (threadIdx.x == 0) {
    const int64_t at = row.i * params.slices + blockIdx.y;
    params.parts[at] = p;
    if (kHasExtras) params.extras[at] = *extras;
  }
}

// The row's result from its parts, and the gradient of slice blockIdx.y.
template <class Z, bool kHasExtras>
TEMPNET_KERNEL(512, 1)
join_kernel(TEMPNET_PARAM Params params) {
  const RowInputs row = load_row(params, blockIdx.x);
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  if (!row.live) {
    dead_row<Z>(params, row, blockIdx.y == 0, begin, end);
    return;
  }
  Partial p;
  Extras extras_of_row, *extras = kHasExtras ? &extras_of_row : nullptr;
  for (int j = threadIdx.x % kWarp; j < params.slices; j += kWarp) {
    const int64_t at = row.i * params.slices + j;
    Extras q_extras;
    if (kHasExtras) q_extras = params.extras[at];
    merge_into(p, extras, params.parts[at], kHasExtras ? &q_extras : nullptr, row.a);
  }
  warp_merge(p, extras, row.a);
  if (blockIdx.y == 0 && threadIdx.x == 0) store_row(params, row, p, extras);
  if (!params.grad) return;
  Z* grad = grad_row<Z>(params, row.i);
  if (row.scale == 0) {
    fill(grad, begin, end, 0.0f);
    return;
  }
  write_span(Span<Z>(logits_row<Z>(params, row.i), begin, end), grad,
             gradient(params, row, p, params.unscaled ? 1.0f : row.scale));
}

// The gradient of slice blockIdx.y from the state that the forward left in rows.
template <class Z>
TEMPNET_KERNEL(512, 1)
backward_kernel(TEMPNET_PARAM Params params) {
  const RowInputs row = load_row(params, blockIdx.x);
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  Z* grad = grad_row<Z>(params, row.i);
  if (!row.live || row.scale == 0) {
    fill(grad, begin, end, times(row.scale, row.ignored ? 0.0f : NAN));
    return;
  }
  const Z* logits = logits_row<Z>(params, row.i);
  const float m = params.rows[kM * params.n + row.i];
  const float log2_s = params.rows[kLog2S * params.n + row.i];
  const float c = z_loss_factor(params, m, log2_s, row.tau);
  write_span(Span<Z>(logits, begin, end), grad,
             gradient_of_row(row.a, m, exp2f(-log2_s), to_float(logits[row.y]), row.y, c,
                             row.scale, params.options.label_smoothing, 1 / float(params.v)));
}

template <class Z>
TEMPNET_KERNEL(512, 1)
scale_kernel(TEMPNET_PARAM Params params) {
  const int64_t i = blockIdx.x;
  const int begin = blockIdx.y * params.slice, end = min(params.v, begin + params.slice);
  const float scale = params.scale[i * params.scale_stride];
  if (scale == 1) return;
  Z* grad = grad_row<Z>(params, i);
  if (scale == 0) {  // also where the gradient is NaN
    fill(grad, begin, end, 0.0f);
    return;
  }
  const Span<Z> span(grad, begin, end);
  const int vectors = span.vectors();
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    uint32_t words[kWords];
    load_vector<Z, false>(span, span.column(k), words);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = Word<Z>::pack(Word<Z>::get(words[w], 0) * scale,
                               Word<Z>::get(words[w], Word<Z>::kCount - 1) * scale);
    }
    store_vector(span, grad, span.column(k), words);
  }
}

// How a forward is launched.
enum class Kernel { kRow, kTwoPass, kCluster, kSplit };

struct Plan {
  Kernel kernel;
  int cluster;  // CTAs per row
  int threads;  // per CTA
  int vectors;  // of 16 bytes that a thread holds
  int slice;    // columns per CTA
};

inline int divide_up(int x, int y) { return (x + y - 1) / y; }

constexpr int kSplitThreads = 512;
constexpr int kElementwiseSlice = 16384;  // columns per CTA of backward_kernel and scale_kernel

// A slice of whole 128-byte lines.
inline int lines(int columns, int itemsize) {
  return divide_up(columns * itemsize, 128) * (128 / itemsize);
}

// arch: 80 for compute capability 8.0. aligned: every row of the logits begins on 16 bytes.
inline Plan plan_forward(int64_t n, int v, int itemsize, bool aligned, int arch,
                         int multiprocessors, bool has_extras) {
  const int columns = 16 / itemsize;
  const int bytes = v * itemsize;  // v is at most 2^20 columns
  if (n < multiprocessors && bytes >= (1 << 14)) {
    const int wanted = divide_up(2 * multiprocessors, int(n));
    const int slices = min(wanted, divide_up(bytes, 1 << 13));
    return {Kernel::kSplit, 1, kSplitThreads, kVectors, lines(divide_up(v, slices), itemsize)};
  }
  const int slot = kClusterThreads * kVectors * 16;
  if (arch >= 90 && aligned && bytes >= (1 << 15) && bytes <= 8 * slot) {
    int cluster = 1;
    while (lines(divide_up(v, cluster), itemsize) * itemsize > slot) cluster *= 2;
    if (cluster <= 8) {
      const int slice = lines(divide_up(v, cluster), itemsize);
      const int held = slice * itemsize <= slot / 2 ? kVectors / 2 : kVectors;
      return {Kernel::kCluster, cluster, kClusterThreads, held, slice};
    }
  }
  const int vectors = divide_up(v, columns) + 1;  // one more where the row is not aligned
  const int threads =
      min(row_threads(has_extras), divide_up(divide_up(vectors, kVectors), kWarp) * kWarp);
  const bool resident = threads * kVectors >= vectors;
  return {resident ? Kernel::kRow : Kernel::kTwoPass, 1, threads, kVectors, v};
}

inline const char* kernel_name(Kernel kernel) {
  const char* const names[] = {"row", "row, two passes", "cluster", "split"};
  return names[int(kernel)];
}

// The kernel that reads the logits first.
template <class Z, Mode kMode>
auto forward_kernel(const Plan& plan) -> void (*)(Params) {
  switch (plan.kernel) {
    case Kernel::kRow:
      return row_kernel<Z, kMode, true>;
    case Kernel::kTwoPass:
      return row_kernel<Z, kMode, false>;
    case Kernel::kCluster:
      return plan.vectors == kVectors ? cluster_kernel<Z, kMode, kVectors>
                                      : cluster_kernel<Z, kMode, kVectors / 2>;
    default:
      return split_kernel<Z, kMode == kAll>;
  }
}

template <class Z, Mode kMode>
void launch_mode(Params params, const Plan& plan, int multiprocessors, Stream stream) {
  constexpr bool kHasExtras = kMode == kAll;
  const auto kernel = forward_kernel<Z, kMode>(plan);
  const unsigned n = unsigned(params.n);
  params.slice = plan.slice;
  if (plan.kernel == Kernel::kCluster) {
    const int bytes = cluster_shared_bytes(plan.slice * int(sizeof(Z)), plan.cluster, kHasExtras);
    const int resident =
        resident_clusters(kernel, plan.cluster, plan.threads, bytes, multiprocessors);
    const unsigned clusters = params.n < resident ? n : resident;
    launch(kernel, dim3(clusters * plan.cluster), plan.threads, plan.cluster, bytes, stream,
           params);
  } else if (plan.kernel == Kernel::kSplit) {
    params.slices = divide_up(params.v, plan.slice);
    launch(kernel, dim3(n, params.slices), plan.threads, 1, kBlockMergeBytes, stream, params);
    launch(join_kernel<Z, kHasExtras>, dim3(n, params.grad ? params.slices : 1), plan.threads, 1,
           0, stream, params);
  } else {
    launch(kernel, dim3(n), plan.threads, 1, kBlockMergeBytes, stream, params);
  }
}

inline bool needs_extras(const Params& params) {
  return params.argmax || params.options.label_smoothing > 0;
}

template <class Z>
void launch_forward(const Params& params, const Plan& plan, int multiprocessors, Stream stream) {
  if (params.n == 0) return;
  if (needs_extras(params)) {
    launch_mode<Z, kAll>(params, plan, multiprocessors, stream);
  } else if (params.grad) {
    launch_mode<Z, kGradient>(params, plan, multiprocessors, stream);
  } else {
    launch_mode<Z, kForward>(params, plan, multiprocessors, stream);
  }
}

inline void launch_elementwise(void (*kernel)(Params), Params params, Stream stream) {
  if (params.n == 0) return;
  params.slice = kElementwiseSlice;
  launch(kernel, dim3(unsigned(params.n), divide_up(params.v, params.slice)), kSplitThreads, 1, 0,
         stream, params);
}

}  // namespace device
}  // namespace tempnet
