// The SIMD level of the CPU kernels, by name; for people and tests.
#pragma once

#include <string>

#include "../export.h"

namespace tempnet {

// In use: "baseline", "avx2" or "avx512".
TEMPNET_EXPORT std::string cpu_capability();

// std::invalid_argument for what this processor has not.
TEMPNET_EXPORT void set_cpu_capability(const std::string& name);

}  // namespace tempnet
