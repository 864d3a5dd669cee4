// What the temperature networks' kernels have in common on the CPU and on a GPU. No torch.
#pragma once

#include <cstdint>

#include "online_softmax.h"

namespace tempnet {

constexpr double kNormMin = 1e-12;  // of a row or a prototype that is divided by its norm

// Of a row of zeros 0, so that the rounding of what is multiplied by it is not divided by the least
// norm.
template <class T>
TEMPNET_INLINE T inverse_norm(T squares) {
  const T norm = std::sqrt(squares);
  return squares == T(0) ? T(0) : T(1) / (norm < T(kNormMin) ? T(kNormMin) : norm);
}

// Blocks of rows whose sums are returned; tempnet_kernels/core/tempnet.py has the same.
inline int64_t rows_of_block(int64_t n) { return 8 * (n / 2049 + 1); }
inline int64_t row_blocks(int64_t n) {
  const int64_t rows = rows_of_block(n);
  return (n + rows - 1) / rows;
}

// A block's sums over its rows, after the k of grad_h: offsets of HeadSums.
template <class K>
TEMPNET_INLINE K weight_sums(K k) {
  return k;
}
template <class K>
TEMPNET_INLINE K scaler_sum(K k) {
  return 2 * k;
}
template <class K>
TEMPNET_INLINE K bias_sum(K k) {
  return 2 * k + 1;
}
template <class K>
TEMPNET_INLINE K along_sums(K k) {
  return 2 * k + 2;
}

// The mask of tempnet_kernels/core/dropout.py: an element is kept where the hash of (key, id,
// column) is at least the threshold.
TEMPNET_INLINE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
TEMPNET_INLINE uint32_t row_hash(uint64_t mixed_key, int64_t id) {
  return uint32_t(mix(mixed_key ^ uint64_t(id)));
}
TEMPNET_INLINE uint32_t column_hash(int64_t column) { return uint32_t(mix(uint64_t(column))); }
TEMPNET_INLINE bool is_kept(uint32_t row, uint32_t column, uint32_t threshold) {
  uint32_t bits = row + column;
  bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
  bits = (bits ^ (bits >> 13)) * 0xc2b2ae35u;
  bits ^= bits >> 16;
  return (bits ^ 0x80000000u) >= threshold;
}
inline uint32_t dropout_threshold(double probability) { return uint32_t(probability * 0x1p32); }

}  // namespace tempnet
