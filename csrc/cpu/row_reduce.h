// What the operators on rows of logits share on the CPU: the state of online_softmax.h of a block
// of columns, and loops over rows for every dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>

#include "../checks.h"
#include "vectorize.h"

namespace tempnet {

// Columns per block: 16 KiB of fp32 stay in the first-level cache between the block's two passes.
constexpr int64_t kBlock = 4096;
// Columns summed before the sum is added to the block's: without it the error grows with the row.
constexpr int64_t kSum = 512;

template <class T>
struct Strided {
  T* data;
  int64_t stride;
  T& operator[](int64_t i) const { return data[i * stride]; }
};

template <class T>
struct Block {
  RowState<T> state;
  T zmax;
  T su;  // sum_j u_j
};

template <class T>
TEMPNET_INLINE const T* widen(const T* z, T*, int64_t) {
  return z;
}
template <class Z, class T>
TEMPNET_INLINE const T* widen(const Z* z, T* scratch, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) scratch[j] = load(z[j]);
  return scratch;
}

// scale: a, or a Capped. zmax is that of the logits given.
template <bool kFma, class Z, class Scale>
TEMPNET_INLINE auto reduce_block(const Z* logits, int64_t count, const Scale& scale) {
  using T = decltype(factor_of(scale));
  const T a = factor_of(scale);
  // 16-bit logits are converted once: the compiler does not vectorise a reduction over mixed
  // widths.
  T scratch[kBlock];
  const T* z = widen(logits, scratch, count);
  T zmax = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : zmax)
  for (int64_t j = 0; j < count; ++j) {
    zmax = z[j] > zmax ? z[j] : zmax;  // drops NaN, which reaches s below
  }
  const T m = std::max(logit(zmax, scale).value * a, Constants<T>::kEmpty);
  Block<T> block{{m, 0, 0}, zmax, 0};
  for (int64_t begin = 0; begin < count; begin += kSum) {
    const int64_t end = std::min(count, begin + kSum);
    T s = 0, sx = 0, su = 0;
#pragma omp simd reduction(+ : s, sx, su)
    for (int64_t j = begin; j < end; ++j) {
      const T u = centred<kFma>(logit(z[j], scale).value, a, m);
      const T clamped = clamp_exponent(u);
      const T e = exp2_clamped(clamped);
      s += e;
      sx += e * clamped;
      su += u;
    }
    prefetch(logits + kBlock + begin, kSum);
    block.state.s += s;
    block.state.sx += sx;
    block.su += su;
  }
  return block;
}

template <bool kFma, class T>
TEMPNET_INLINE T weight(T z, T a, T m) {
  return exp2_clamped(clamp_exponent(centred<kFma>(z, a, m)));
}

template <class Z, class T>
struct Types {
  using Storage = Z;
  using Accumulator = T;
};

template <class F>
void for_dtype(const char* function, const char* argument, const torch::stable::Tensor& tensor,
               F f) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(Types<float, float>{});
    case ScalarType::Double:
      return f(Types<double, double>{});
    case ScalarType::BFloat16:
      return f(Types<BFloat16, float>{});
    case ScalarType::Half:
      return f(Types<Half, float>{});
    default:
      throw_bad_argument(function, argument, "float32, float64, bfloat16 or float16");
  }
}

// f(zero of the accumulation type)
template <class F>
void for_accumulator(const char* function, const char* argument,
                     const torch::stable::Tensor& tensor, F f) {
  using torch::headeronly::ScalarType;
  if (tensor.scalar_type() == ScalarType::Float) return f(float{});
  if (tensor.scalar_type() == ScalarType::Double) return f(double{});
  throw_bad_argument(function, argument, "float32 or float64");
}

template <class T>
Strided<const T> strided(const torch::stable::Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
}

// A column of class indices.
struct Target {
  const void* data;
  int64_t stride;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
};

inline Target target_of(const torch::stable::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0),
          tensor.scalar_type() == torch::headeronly::ScalarType::Long};
}

// Rows::run over rows of v columns on all threads.
template <class Rows, class Args>
void run_parallel(const Args& args, int64_t n, int64_t v) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, v));
  torch::stable::parallel_for(
      0, n, grain, [&](int64_t begin, int64_t end) { run_rows<Rows>(args, begin, end); });
}

// Rows<Z, T, kCapped>::run, with args.softcap or without.
template <template <class, class, bool> class Rows, class Z, class T, class Args>
void run_capped(const Args& args) {
  if (args.softcap > 0) {
    run_parallel<Rows<Z, T, true>>(args, args.n, args.v);
  } else {
    run_parallel<Rows<Z, T, false>>(args, args.n, args.v);
  }
}

}  // namespace tempnet
