// One source for every SIMD level: a row loop written in plain C++ is inlined into a wrapper per
// level, and the level is chosen at run time. Loops over columns are marked `#pragma omp simd`; the
// compiler does the rest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../softcap.h"

namespace tempnet {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

SimdLevel simd_level();  // of this processor, unless a test has lowered it

#if defined(__x86_64__) && defined(__GNUC__)
#define TEMPNET_X86_LEVELS 1
// AVX-512 in 512-bit vectors: the compiler's default of 256 halves the throughput of the
// exponentials.
#define TEMPNET_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define TEMPNET_AVX2 __attribute__((target("arch=x86-64-v3")))

template <class Rows, class Args>
TEMPNET_AVX512 void run_avx512(const Args& args, int64_t begin, int64_t end) {
  Rows::template run<true>(args, begin, end);
}

template <class Rows, class Args>
TEMPNET_AVX2 void run_avx2(const Args& args, int64_t begin, int64_t end) {
  Rows::template run<true>(args, begin, end);
}
#endif

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kBaselineFma = true;
#else
constexpr bool kBaselineFma = false;
#endif

// Rows::run<kFma>(args, begin, end) must be TEMPNET_INLINE, and so must everything it calls.
template <class Rows, class Args>
void run_rows(const Args& args, int64_t begin, int64_t end) {
#ifdef TEMPNET_X86_LEVELS
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return run_avx512<Rows>(args, begin, end);
    case SimdLevel::kAvx2:
      return run_avx2<Rows>(args, begin, end);
    case SimdLevel::kBaseline:
      break;
  }
#endif
  Rows::template run<kBaselineFma>(args, begin, end);
}

// z * a - m with one rounding. Without the instruction std::fma is a library call per element; the
// product of two floats is exact in double.
template <bool kFma>
TEMPNET_INLINE float centred(float z, float a, float m) {
  return kFma ? std::fma(z, a, -m) : float(double(z) * double(a) - double(m));
}
template <bool kFma>
TEMPNET_INLINE double centred(double z, double a, double m) {
  return std::fma(z, a, -m);
}

template <class To, class From>
TEMPNET_INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Ask for `count` elements ahead of their use. An address past the end is no fault.
template <class T>
TEMPNET_INLINE void prefetch(const T* data, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < count; j += kLine) __builtin_prefetch(data + j);
}

// Storage types. Conversions by integer arithmetic: they vectorise at every level.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

TEMPNET_INLINE float load(float x) { return x; }
TEMPNET_INLINE double load(double x) { return x; }
TEMPNET_INLINE float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
TEMPNET_INLINE float load(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // 2^112 moves the exponent's bias, subnormals included; inf and NaN need the exponent's remaining
  // bits.
  const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(finite) | special | (uint32_t(x.bits & 0x8000u) << 16));
}

template <class Z>
TEMPNET_INLINE Z store(float x);
template <class Z>
TEMPNET_INLINE Z store(double x) {
  return x;
}
template <>
TEMPNET_INLINE float store<float>(float x) {
  return x;
}
// Round to nearest even. A NaN is made quiet first: rounding its bits up could give inf.
template <>
TEMPNET_INLINE BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0u)};
}
template <>
TEMPNET_INLINE Half store<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 0.5 leaves the subnormal half's integer in the low bits, rounded to nearest even by the
  // addition.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(half | ((bits >> 16) & 0x8000u))};
}

// 2^u for u in [-127, 1/2], relative error 8e-8, exactly 1 at 0 and exactly 0 at -127. NaN stays
// NaN.
TEMPNET_INLINE float exp2_clamped(float u) {
  const float shifted = u + 0x1.8p23f;  // rounds u to an integer, left in the low bits
  const float f = u - (shifted - 0x1.8p23f);
  float p = 0.00015353362f;
  p = p * f + 0.0013398875f;
  p = p * f + 0.009618437f;
  p = p * f + 0.055503324f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
}
TEMPNET_INLINE double exp2_clamped(double u) { return std::exp2(u); }

// The smallest exponent that exp2_clamped takes, where the weight is exactly 0: so a clamped u,
// unlike -inf, also has weight * u = 0. The comparison keeps NaN.
TEMPNET_INLINE float clamp_exponent(float u) { return u < -127.0f ? -127.0f : u; }
TEMPNET_INLINE double clamp_exponent(double u) { return u < -2000.0 ? -2000.0 : u; }

// tanh(x), with a relative error below 3e-7, and its derivative, below 4e-6 (5e-7 for |x| <= 2):
// far out, where it vanishes, the rounding of the exponent counts, and 1 - tanh(x)^2 would be lost.
TEMPNET_INLINE Logit<float> tanh_of(float x) {
  const float y = std::fabs(x), s = y * y;
  const float e = exp2_clamped(clamp_exponent(y * Tanh::kRate)), r = 1 / (1 + e);
  const float p = ((Tanh::k9 * s + Tanh::k7) * s + Tanh::k5) * s + Tanh::k3;
  const float t = y < Tanh::kEnd ? y + y * (p * s) : 1 - 2 * e * r;
  return {std::copysign(t, x), 4 * e * r * r};
}
TEMPNET_INLINE Logit<double> tanh_of(double x) {
  const double t = std::tanh(x);
  return {t, 1 - t * t};
}

TEMPNET_INLINE Logit<float> logit(float z, float) { return {z, 1}; }
TEMPNET_INLINE Logit<double> logit(double z, double) { return {z, 1}; }
template <class T>
TEMPNET_INLINE Logit<T> logit(T z, const Capped<T>& scale) {
  const Logit<T> t = tanh_of(z / scale.c);
  return {scale.c * t.value, t.slope};
}

}  // namespace tempnet
