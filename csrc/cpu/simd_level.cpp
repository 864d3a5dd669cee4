// The SIMD level that run_rows of vectorize.h takes: this processor's, unless a test has lowered
// it.
#include "simd_level.h"

#include <stdexcept>

#include "vectorize.h"

namespace tempnet {
namespace {

SimdLevel detect_simd_level() {
#ifdef TEMPNET_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return SimdLevel::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kBaseline;
}

SimdLevel level = detect_simd_level();

const char* const kLevelNames[] = {"baseline", "avx2", "avx512"};

}  // namespace

SimdLevel simd_level() { return level; }

std::string cpu_capability() { return kLevelNames[static_cast<int>(level)]; }

void set_cpu_capability(const std::string& name) {
  const int highest = static_cast<int>(detect_simd_level());
  for (int i = 0; i <= highest; ++i) {
    if (name == kLevelNames[i]) {
      level = static_cast<SimdLevel>(i);
      return;
    }
  }
  throw std::invalid_argument(
      "set_cpu_capability: name must be a level of this processor, up to '" +
      std::string(kLevelNames[highest]) + "', got '" + name + "'");
}

}  // namespace tempnet
