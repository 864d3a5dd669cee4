// The state of online_softmax.h of rows of logits on a GPU, and its merge over the threads of a
// warp, a CTA and a cluster.
#pragma once

#include "../softcap.h"
#include "row_span.cuh"

namespace tempnet {
namespace device {

constexpr int kVectors = 8;  // 16-byte vectors of a row that a thread holds: 32 registers

// What merges of a row's parts carry. m of online_softmax.h is row_maximum(zmax, a) for every
// owner of the same zmax, so it is not stored.
struct Partial {
  float zmax = -INFINITY;
  float s = 0, sx = 0;
  float z_y = -INFINITY;  // the target's logit where this part holds it
};

// For argmax and label smoothing.
struct Extras {
  float su = 0;     // sum_j u_j
  float count = 0;  // of columns
  int argmax = kNoColumn;
  int unused = 0;
};

// tanh(x), with a relative error below 1e-6, and its derivative, below 5e-6 (1e-6 for |x| <= 2), by
// the documented errors of ex2 and rcp: far out, where it vanishes, the exponent's rounding counts.
TEMPNET_DEVICE Logit<float> tanh_of(float x) {
  const float y = fabsf(x), s = y * y;
  const float e = exp2_approx(y * Tanh::kRate), r = reciprocal_approx(1 + e);
  const float p = fmaf(fmaf(fmaf(Tanh::k9, s, Tanh::k7), s, Tanh::k5), s, Tanh::k3);
  const float t = y < Tanh::kEnd ? fmaf(p * s, y, y) : fmaf(-2 * e, r, 1.0f);
  return {copysignf(t, x), 4 * e * r * r};
}

TEMPNET_DEVICE Logit<float> logit(float z, float) { return {z, 1}; }
TEMPNET_DEVICE Logit<float> logit(float z, const Capped<float>& scale) {
  // z / c, rounded once. One that is infinite has no remainder.
  const float x = z * scale.inverse_c, remainder = fmaf(-x, scale.c, z);
  const Logit<float> t = tanh_of(fabsf(x) < INFINITY ? fmaf(remainder, scale.inverse_c, x) : x);
  return {multiply(scale.c, t.value), t.slope};
}

// Below, `scale` is a or a Capped; zmax and z_y are logits as they are given.
template <class Scale>
TEMPNET_DEVICE float row_maximum(float zmax, const Scale& scale) {
  return fmaxf(multiply(logit(zmax, scale).value, factor_of(scale)), Constants<float>::kEmpty);
}

TEMPNET_DEVICE float centred(float z, float a, float m) { return fmaf(z, a, -m); }

TEMPNET_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
template <class T>
TEMPNET_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
TEMPNET_DEVICE int warp_min(int x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int y = shuffle_xor(x, mask);
    x = x < y ? x : y;
  }
  return x;
}

// Moves a part to the larger maximum m.
template <class Scale>
TEMPNET_DEVICE void move_to(float m, const Scale& scale, Partial& p, Extras* extras) {
  const float d = row_maximum(p.zmax, scale) - m;
  const float f = exp2_approx(d);
  p.sx = f * (p.sx + weighted_exponent(p.s, d));
  p.s *= f;
  if (extras) extras->su += extras->count * d;
}

// Of parts that are relative to the same maximum.
TEMPNET_DEVICE void add(Partial& p, Extras* p_extras, const Partial& q, const Extras* q_extras) {
  p.s += q.s;
  p.sx += q.sx;
  p.z_y = fmaxf(p.z_y, q.z_y);
  if (p_extras) {
    p_extras->su += q_extras->su;
    p_extras->count += q_extras->count;
  }
}
TEMPNET_DEVICE void warp_add(Partial& p, Extras* extras) {
  p.s = warp_sum(p.s);
  p.sx = warp_sum(p.sx);
  p.z_y = warp_max(p.z_y);
  if (extras) {
    extras->su = warp_sum(extras->su);
    extras->count = warp_sum(extras->count);
  }
}

template <class Scale>
TEMPNET_DEVICE void merge_into(Partial& p, Extras* p_extras, Partial q, Extras* q_extras,
                               const Scale& scale) {
  const float zmax = fmaxf(p.zmax, q.zmax), m = row_maximum(zmax, scale);
  if (p_extras) {
    const int x = p.zmax == zmax ? p_extras->argmax : kNoColumn;
    const int y = q.zmax == zmax ? q_extras->argmax : kNoColumn;
    p_extras->argmax = x < y ? x : y;
  }
  move_to(m, scale, p, p_extras);
  move_to(m, scale, q, q_extras);
  p.zmax = zmax;
  add(p, p_extras, q, q_extras);
}

// The union of the parts of a warp's lanes, in every lane.
template <class Scale>
TEMPNET_DEVICE void warp_merge(Partial& p, Extras* extras, const Scale& scale) {
  const float zmax = warp_max(p.zmax);
  if (extras) extras->argmax = warp_min(p.zmax == zmax ? extras->argmax : kNoColumn);
  move_to(row_maximum(zmax, scale), scale, p, extras);
  p.zmax = zmax;
  warp_add(p, extras);
}

// The largest logit of packed vectors, and the first vector that holds it.
template <class Z, bool kWhere, int kVectors>
TEMPNET_DEVICE float packed_maximum(const uint32_t (&words)[kVectors][kWords], int& where) {
  const auto widest = [](uint32_t word) {
    const float z = Word<Z>::get(word, 0);
    return Word<Z>::kCount == 1 ? z : fmaxf(z, Word<Z>::get(word, 1));
  };
  uint32_t high = Word<Z>::kMinusInfinity;
  float zmax = -INFINITY;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t h = Word<Z>::max(Word<Z>::max(words[k][0], words[k][1]),
                                    Word<Z>::max(words[k][2], words[k][3]));
    if (kWhere) {
      const float z = widest(h);
      if (z > zmax) zmax = z, where = k;
    } else {
      high = Word<Z>::max(high, h);
    }
  }
  return kWhere ? zmax : widest(high);
}

// What a launch computes. The statistics that cost more have kernels of their own.
enum Mode { kForward, kGradient, kArgmax, kAll };
template <Mode kMode>
constexpr bool has_extras = kMode >= kArgmax;

// The part of a thread's packed vectors: vector k holds the columns from column(k) on.
template <class Z, Mode kMode, bool kEdges, int kVectors, class Scale, class Column>
TEMPNET_DEVICE Partial reduce_vectors(const uint32_t (&words)[kVectors][kWords], const Scale& scale,
                                      const Span<Z, kEdges>& span, Column column, Extras* extras) {
  Partial p;
  int where = 0;
  p.zmax = packed_maximum<Z, has_extras<kMode>>(words, where);
  const float m = row_maximum(p.zmax, scale);
  // Independent sums hide the latency of the additions.
  float s[2] = {0, 0}, sx[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const bool whole = span.whole(column(k));
#pragma unroll
    for (int j = 0; j < kColumns<Z>; ++j) {
      const float z = Word<Z>::get(words[k][j / Word<Z>::kCount], j % Word<Z>::kCount);
      float u = centred(logit(z, scale).value, factor_of(scale), m);
      // The -inf of a column that is not the span's would be -c.
      if (is_capped<Scale> && !whole && !span.holds(column(k) + j)) u = -INFINITY;
      const float e = exp2_approx(u);  // NaN stays NaN
      s[j % 2] += e;
      sx[j % 2] = fmaf(e, fmaxf(u, Constants<float>::kFloor), sx[j % 2]);
      if (kMode == kAll && (whole || span.holds(column(k) + j))) {
        extras->su += u;
        extras->count += 1;
      }
    }
  }
  p.s = s[0] + s[1];
  p.sx = sx[0] + sx[1];
  if (has_extras<kMode>) {
    uint32_t best[kWords];
    int first = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (where == k) {
        first = column(k);
#pragma unroll
        for (int w = 0; w < kWords; ++w) best[w] = words[k][w];
      }
    }
#pragma unroll
    for (int j = kColumns<Z> - 1; j >= 0; --j) {
      const float z = Word<Z>::get(best[j / Word<Z>::kCount], j % Word<Z>::kCount);
      // Capped, a row of -inf has an argmax, and a column that is not the span's is -inf, too.
      const bool is_held = !is_capped<Scale> || span.holds(first + j);
      if (z == p.zmax && is_held) extras->argmax = first + j;
    }
  }
  return p;
}

// Shared memory of the merge: a barrier, and a record of every warp of the cluster.
struct Records {
  uint64_t* barrier;
  float4* records;
};
TEMPNET_DEVICE Records shared_records() {
  uint8_t* arena = shared_memory();
  return {reinterpret_cast<uint64_t*>(arena), reinterpret_cast<float4*>(arena + 16)};
}
template <bool kHasExtras>
constexpr int kRecord = kHasExtras ? 2 : 1;  // in units of 16 bytes
inline int merge_bytes(int threads, int cluster) {
  return 16 + cluster * threads / kWarp * int(sizeof(Partial) + sizeof(Extras));
}

// Early: the CTAs of a cluster begin at different times.
template <bool kHasExtras>
TEMPNET_DEVICE void begin_merge() {
  if (cluster_size() == 1) return;
  if (threadIdx.x == 0) {
    uint64_t* barrier = shared_records().barrier;
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier,
                           cluster_size() * (blockDim.x / kWarp) * kRecord<kHasExtras> * 16);
  }
  cluster_arrive_relaxed();
}

// Every warp's record, which its lane 0 holds (over a cluster every lane), in every CTA's shared
// memory, in the order of the warps. Every read of the row by this CTA comes before its end.
template <bool kHasExtras>
TEMPNET_DEVICE const float4* exchange_records(const float4 (&record)[kRecord<kHasExtras>]) {
  const auto [barrier, records] = shared_records();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  float4* own = records + (int(cluster_rank()) * warps + warp) * kRecord<kHasExtras>;
  if (cluster_size() == 1) {
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kRecord<kHasExtras>; ++i) own[i] = record[i];
    }
    __syncthreads();
  } else {
    cluster_wait();  // every CTA has begun: its barrier is there
    if (lane < int(cluster_size())) {
#pragma unroll
      for (int i = 0; i < kRecord<kHasExtras>; ++i) store_remote(own + i, lane, record[i], barrier);
    }
    mbarrier_wait(barrier, 0);
  }
  return records;
}

// The merge over the warps of a CTA, or of a cluster of them, in every thread.
template <bool kHasExtras, class Scale>
TEMPNET_DEVICE void merge_warps(Partial& p, Extras* extras, const Scale& scale) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  warp_merge(p, extras, scale);
  float4 record[kRecord<kHasExtras>] = {{p.zmax, p.s, p.sx, p.z_y}};
  if constexpr (kHasExtras) {
    record[1] = float4{extras->su, extras->count, bits_to_float(uint32_t(extras->argmax)), 0};
  }
  const float4* records = exchange_records<kHasExtras>(record);
  // The largest first: then every record is moved once.
  const int count = int(cluster_size()) * warps;
  p = Partial{};
  for (int j = lane; j < count; j += kWarp) {
    p.zmax = fmaxf(p.zmax, records[j * kRecord<kHasExtras>].x);
  }
  p.zmax = warp_max(p.zmax);
  if (kHasExtras) *extras = Extras{};
  const float m = row_maximum(p.zmax, scale);
  for (int j = lane; j < count; j += kWarp) {
    const float4 x = records[j * kRecord<kHasExtras>];
    Partial q{x.x, x.y, x.z, x.w};
    Extras q_extras;
    if (kHasExtras) {
      const float4 e = records[j * kRecord<kHasExtras> + 1];
      q_extras = Extras{e.x, e.y, int(float_to_bits(e.z)), 0};
      if (x.x == p.zmax && q_extras.argmax < extras->argmax) extras->argmax = q_extras.argmax;
    }
    move_to(m, scale, q, kHasExtras ? &q_extras : nullptr);
    add(p, extras, q, kHasExtras ? &q_extras : nullptr);
  }
  warp_add(p, extras);
  if (kHasExtras) extras->argmax = warp_min(extras->argmax);
}

// The part of the span that this thread reads, tile by tile.
template <class Z, Mode kMode, class Scale>
TEMPNET_DEVICE Partial reduce_span(const Span<Z, true>& span, const Scale& scale, Extras* extras) {
  constexpr bool kHasExtras = has_extras<kMode>;
  constexpr int kTile = is_capped<Scale> ? kVectors / 4 : kHasExtras ? kVectors / 2 : kVectors;
  const int vectors = span.vectors();
  Partial p;
  for (int first = threadIdx.x; first < vectors; first += kTile * int(blockDim.x)) {
    const auto column = [&](int k) { return span.column(first + k * int(blockDim.x)); };
    uint32_t words[kTile][kWords];
#pragma unroll
    for (int k = 0; k < kTile; ++k) span.template load<true>(column(k), words[k]);
    Extras q_extras;
    const Partial q =
        reduce_vectors<Z, kMode>(words, scale, span, column, kHasExtras ? &q_extras : nullptr);
    merge_into(p, extras, q, kHasExtras ? &q_extras : nullptr, scale);
  }
  return p;
}

// grad_j = (p_j * factor - uniform) times the slope of the softcap, with p_j = 2^u_j / s, and
// grad_y in the target's column.
template <class Scale>
struct Gradient {
  Scale scale;
  float m, factor, uniform, grad_y;
  int y;
};

// p_y - 1 in fp32, before it is rounded to the gradient's type: it cancels.
template <class Scale>
TEMPNET_DEVICE Gradient<Scale> gradient_of_row(const Scale& scale, float m, float inverse_s,
                                               float z_y, int y, float c, float row_scale,
                                               float label_smoothing, float inverse_v) {
  Gradient<Scale> g;
  g.scale = scale, g.m = m, g.y = y;
  g.factor = row_scale * c * inverse_s;
  g.uniform = row_scale * label_smoothing * inverse_v;
  const Logit<float> own = logit(z_y, scale);
  float p_y = exp2_approx(centred(own.value, factor_of(scale), m)) * inverse_s;
  if (inverse_v == 1 && p_y > 0) p_y = 1;  // of one column, exactly
  g.grad_y = row_scale * ((c * p_y - 1) + label_smoothing * (1 - inverse_v)) * own.slope;
  return g;
}

template <class Z, class Scale>
TEMPNET_DEVICE void to_gradient(const Gradient<Scale>& g, int column, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    float grad[2];
#pragma unroll
    for (int i = 0; i < Word<Z>::kCount; ++i) {
      const Logit<float> z = logit(Word<Z>::get(words[w], i), g.scale);
      const float e = exp2_approx(centred(z.value, factor_of(g.scale), g.m));
      grad[i] = fmaf(e, g.factor, -g.uniform) * z.slope;
    }
    words[w] = Word<Z>::pack(grad[0], grad[Word<Z>::kCount - 1]);
  }
  // Once per vector, and without an index into registers that is known only at run time.
  const int at = g.y - column;
  if (at >= 0 && at < kColumns<Z>) {
    const uint32_t own = Word<Z>::pack(g.grad_y, 0);
#pragma unroll
    for (int j = 0; j < kColumns<Z>; ++j) {
      if (at == j) set_column<Z>(words, j, own);
    }
  }
}

}  // namespace device
}  // namespace tempnet
