// How a forward would be launched; for people and tests. Implemented beside the kernels.
#pragma once

#include <cstdint>
#include <string>

#include "../export.h"

namespace tempnet {

struct LaunchPlan {
  std::string kernel;
  int cluster, threads, vectors, slice, shared_bytes;
  int registers;  // of the kernel that makes the gradient; -1 without a GPU
};

// dtype: "float32", "bfloat16" or "float16". arch: 80 for compute capability 8.0.
TEMPNET_EXPORT LaunchPlan launch_plan(int64_t n, int64_t v, const std::string& dtype, int arch);

}  // namespace tempnet
