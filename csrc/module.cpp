// The pybind11 module tempnet_kernels._C. Importing it registers the CPU kernels.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/vectorize.h"

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

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["torch_target_version"] = TEMPNET_TORCH_TARGET;
  info["cplusplus"] = __cplusplus;
  return info;
}

}  // namespace

SimdLevel simd_level() { return level; }

}  // namespace tempnet

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &tempnet::build_info, "How this library was built.");
  module.def("cpu_capability", &tempnet::cpu_capability,
             "The SIMD level in use: 'baseline', 'avx2' or 'avx512'.");
  module.def("set_cpu_capability", &tempnet::set_cpu_capability,
             "Use a lower SIMD level than the processor's, to test it.");
}
