// Rows of numbers on a GPU as 16-byte vectors, packed in registers.
#pragma once

#include "../online_softmax.h"
#include "device.cuh"

namespace tempnet {
namespace device {

constexpr int kWarp = 32;
constexpr int kNoColumn = 0x7fffffff;

inline int divide_up(int x, int y) { return (x + y - 1) / y; }

// A slice of whole 128-byte lines.
inline int lines(int columns, int itemsize) {
  return divide_up(columns * itemsize, 128) * (128 / itemsize);
}

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

  // The same columns of another row; 0 in those that do not belong to the span.
  TEMPNET_DEVICE void load_from(const Z* other, bool aligned, int column,
                                uint32_t (&words)[kWords]) const {
    if (aligned && whole(column)) {
      const uint4 v = *reinterpret_cast<const uint4*>(other + column);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      return;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = 0;
    if constexpr (kEdges) {
#pragma unroll
      for (int j = 0; j < kColumns<Z>; ++j) {
        if (holds(column + j)) set_column<Z>(words, j, raw_bits(other[column + j]));
      }
    }
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

template <class Z>
bool aligned_rows(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * int64_t(sizeof(Z)) % 16 == 0;
}

template <class Z>
TEMPNET_DEVICE void fill(Z* row, int begin, int end, float value) {
  const uint32_t word = Word<Z>::pack(value, value);
  const uint32_t words[kWords] = {word, word, word, word};
  const Span<Z, true> span(row, begin, end);
  const int vectors = span.vectors();
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    span.store(row, true, span.column(k), words);
  }
}

// Several vectors at a time, so that their loads are in flight together.
constexpr int kBatch = 4;

template <int kBatch = device::kBatch, class Z, class F>
TEMPNET_DEVICE void transform_span(const Span<Z, true>& span, Z* row, F f) {
  const int vectors = span.vectors();
  const bool aligned = span.aligned_in(row);
  for (int first = threadIdx.x; first < vectors; first += kBatch * int(blockDim.x)) {
    uint32_t words[kBatch][kWords];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      span.template load<false>(span.column(first + k * int(blockDim.x)), words[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int column = span.column(first + k * int(blockDim.x));
      if (column >= span.end) break;
      f(column, words[k]);
      span.store(row, aligned, column, words[k]);
    }
  }
}

}  // namespace device
}  // namespace tempnet
