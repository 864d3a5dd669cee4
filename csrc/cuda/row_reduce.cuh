// Rows of logits on a GPU: 16-byte vectors packed in registers, their state of online_softmax.h,
// and its merge over the threads of a warp, a CTA and a cluster.
#pragma once

#include "../online_softmax.h"
#include "device.cuh"

namespace tempnet {
namespace device {

constexpr int kWarp = 32;
constexpr int kNoColumn = 0x7fffffff;

inline int divide_up(int x, int y) { return (x + y - 1) / y; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// A 32-bit word of packed logits. kCount of them; kMinusInfinity fills a word.
template <class Z>
struct Word;

template <>
struct Word<float> {
  static constexpr int kCount = 1;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static TEMPNET_DEVICE float get(uint32_t word, int) { return bits_to_float(word); }
  static TEMPNET_DEVICE uint32_t max(uint32_t x, uint32_t y) {
    return float_to_bits(fmaxf(bits_to_float(x), bits_to_float(y)));
  }
  static TEMPNET_DEVICE uint32_t pack(float low, float) { return float_to_bits(low); }
};

template <>
struct Word<BFloat16> {
  static constexpr int kCount = 2;
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static TEMPNET_DEVICE float get(uint32_t word, int i) {
    return bits_to_float(i ? word & 0xffff0000u : word << 16);
  }
  static TEMPNET_DEVICE uint32_t max(uint32_t x, uint32_t y) { return max_bf16x2(x, y); }
  static TEMPNET_DEVICE uint32_t pack(float low, float high) { return pack_bf16x2(low, high); }
};

template <>
struct Word<Half> {
  static constexpr int kCount = 2;
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static TEMPNET_DEVICE float get(uint32_t word, int i) {
    return unpack_f16(i ? word >> 16 : word & 0xffffu);
  }
  static TEMPNET_DEVICE uint32_t max(uint32_t x, uint32_t y) { return max_f16x2(x, y); }
  static TEMPNET_DEVICE uint32_t pack(float low, float high) { return pack_f16x2(low, high); }
};

constexpr int kWords = 4;  // per 16-byte vector
template <class Z>
constexpr int kColumns = kWords * Word<Z>::kCount;

template <class Z>
constexpr int kBits = 32 / Word<Z>::kCount;

// Column j of a vector := the low bits of `bits`; j is known at compile time.
template <class Z>
TEMPNET_DEVICE void set_column(uint32_t (&words)[kWords], int j, uint32_t bits) {
  const int shift = j % Word<Z>::kCount * kBits<Z>;
  const uint32_t mask = uint32_t((uint64_t(1) << kBits<Z>)-1) << shift;
  uint32_t& word = words[j / Word<Z>::kCount];
  word = (word & ~mask) | ((bits << shift) & mask);
}

template <class Z>
TEMPNET_DEVICE float to_float(Z z);
template <>
TEMPNET_DEVICE float to_float(float z) {
  return z;
}
template <>
TEMPNET_DEVICE float to_float(BFloat16 z) {
  return bits_to_float(uint32_t(z.bits) << 16);
}
template <>
TEMPNET_DEVICE float to_float(Half z) {
  return unpack_f16(z.bits);
}

template <class Z>
TEMPNET_DEVICE uint32_t raw_bits(Z z) {
  return z.bits;
}
template <>
TEMPNET_DEVICE uint32_t raw_bits(float z) {
  return float_to_bits(z);
}
template <class Z>
TEMPNET_DEVICE Z from_bits(uint32_t bits) {
  return Z{static_cast<uint16_t>(bits)};
}
template <>
TEMPNET_DEVICE float from_bits(uint32_t bits) {
  return bits_to_float(bits);
}

// Columns [begin, end) of a row as 16-byte vectors. Without kEdges, begin is on 16 bytes and the
// columns are whole vectors. With kEdges, vectors are counted from the last 16-byte boundary at or
// before begin, and of the first and the last some columns belong to somebody else.
template <class Z, bool kEdges>
struct Span {
  const Z* row;
  int first, begin, end;

  TEMPNET_DEVICE Span(const Z* row, int begin, int end)
      : row(row), first(begin), begin(begin), end(end) {
    if (kEdges) first -= int(reinterpret_cast<uintptr_t>(row + begin) % 16 / sizeof(Z));
  }
  TEMPNET_DEVICE int column(int vector) const { return first + vector * kColumns<Z>; }
  TEMPNET_DEVICE int vectors() const { return (end - first + kColumns<Z> - 1) / kColumns<Z>; }
  TEMPNET_DEVICE bool whole(int column) const {
    return kEdges ? column >= begin && column + kColumns<Z> <= end : column < end;
  }
  TEMPNET_DEVICE bool holds(int column) const { return column >= begin && column < end; }

  // -inf in the columns that do not belong to the span. kKeep: it is read again.
  template <bool kKeep>
  TEMPNET_DEVICE void load(int column, uint32_t (&words)[kWords]) const {
    if (whole(column)) {
      const uint4* from = reinterpret_cast<const uint4*>(row + column);
      const uint4 v = kKeep ? *from : load_stream(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      return;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = Word<Z>::kMinusInfinity;
    if constexpr (kEdges) {
#pragma unroll
      for (int j = 0; j < kColumns<Z>; ++j) {
        if (holds(column + j)) set_column<Z>(words, j, raw_bits(row[column + j]));
      }
    }
  }

  // Whether the vectors begin on 16 bytes in another row as well.
  TEMPNET_DEVICE bool aligned_in(const Z* other) const {
    return !kEdges || reinterpret_cast<uintptr_t>(other + first) % 16 == 0;
  }

  TEMPNET_DEVICE void store(Z* to, bool aligned, int column,
                            const uint32_t (&words)[kWords]) const {
    if (aligned && whole(column)) {
      store_stream(reinterpret_cast<uint4*>(to + column),
                   uint4{words[0], words[1], words[2], words[3]});
    } else if constexpr (kEdges) {
#pragma unroll
      for (int j = 0; j < kColumns<Z>; ++j) {
        if (holds(column + j)) {
          to[column + j] =
              from_bits<Z>(words[j / Word<Z>::kCount] >> (j % Word<Z>::kCount * kBits<Z>));
        }
      }
    }
  }
};

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

TEMPNET_DEVICE float row_maximum(float zmax, float a) {
  return fmaxf(multiply(zmax, a), Constants<float>::kEmpty);
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
TEMPNET_DEVICE void move_to(float m, float a, Partial& p, Extras* extras) {
  const float d = row_maximum(p.zmax, a) - m;
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

TEMPNET_DEVICE void merge_into(Partial& p, Extras* p_extras, Partial q, Extras* q_extras, float a) {
  const float zmax = fmaxf(p.zmax, q.zmax), m = row_maximum(zmax, a);
  if (p_extras) {
    const int x = p.zmax == zmax ? p_extras->argmax : kNoColumn;
    const int y = q.zmax == zmax ? q_extras->argmax : kNoColumn;
    p_extras->argmax = x < y ? x : y;
  }
  move_to(m, a, p, p_extras);
  move_to(m, a, q, q_extras);
  p.zmax = zmax;
  add(p, p_extras, q, q_extras);
}

// The union of the parts of a warp's lanes, in every lane.
TEMPNET_DEVICE void warp_merge(Partial& p, Extras* extras, float a) {
  const float zmax = warp_max(p.zmax);
  if (extras) extras->argmax = warp_min(p.zmax == zmax ? extras->argmax : kNoColumn);
  move_to(row_maximum(zmax, a), a, p, extras);
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
template <class Z, Mode kMode, bool kEdges, int kVectors, class Column>
TEMPNET_DEVICE Partial reduce_vectors(const uint32_t (&words)[kVectors][kWords], float a,
                                      const Span<Z, kEdges>& span, Column column, Extras* extras) {
  Partial p;
  int where = 0;
  p.zmax = packed_maximum<Z, has_extras<kMode>>(words, where);
  const float m = row_maximum(p.zmax, a);
  // Independent sums hide the latency of the additions.
  float s[2] = {0, 0}, sx[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const bool whole = span.whole(column(k));
#pragma unroll
    for (int j = 0; j < kColumns<Z>; ++j) {
      const float z = Word<Z>::get(words[k][j / Word<Z>::kCount], j % Word<Z>::kCount);
      const float u = centred(z, a, m);
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
      if (z == p.zmax) extras->argmax = first + j;
    }
  }
  return p;
}

// grad_j = p_j * factor - uniform with p_j = 2^u_j / s, and grad_y in the target's column.
struct Gradient {
  float a, m, factor, uniform, grad_y;
  int y;
};

// p_y - 1 in fp32, before it is rounded to the gradient's type: it cancels.
TEMPNET_DEVICE Gradient gradient_of_row(float a, float m, float inverse_s, float z_y, int y,
                                        float c, float scale, float label_smoothing,
                                        float inverse_v) {
  Gradient g;
  g.a = a, g.m = m, g.y = y;
  g.factor = scale * c * inverse_s;
  g.uniform = scale * label_smoothing * inverse_v;
  const float p_y = exp2_approx(centred(z_y, a, m)) * inverse_s;
  g.grad_y = scale * ((c * p_y - 1) + label_smoothing * (1 - inverse_v));
  return g;
}

template <class Z>
TEMPNET_DEVICE void to_gradient(const Gradient& g, int column, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    float grad[2];
#pragma unroll
    for (int i = 0; i < Word<Z>::kCount; ++i) {
      const float e = exp2_approx(centred(Word<Z>::get(words[w], i), g.a, g.m));
      grad[i] = fmaf(e, g.factor, -g.uniform);
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
