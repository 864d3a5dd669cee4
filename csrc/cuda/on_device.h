// What the operators on a GPU share: where their kernels are launched, and for which type.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "../checks.h"
#include "row_reduce.cuh"

namespace tempnet {

// The tensor's device for the lifetime of this, and its current stream.
struct OnDevice {
  OnDevice(const char* function, const torch::stable::Tensor& tensor)
      : guard(tensor.get_device_index()) {
    const int index = tensor.get_device_index();
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream(index, &current) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error(std::string(function) + ": no current CUDA stream");
    }
    stream = static_cast<device::Stream>(current);
    device::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
                  "cudaDeviceGetAttribute");
  }
  torch::stable::accelerator::DeviceGuard guard;
  device::Stream stream;
  int multiprocessors;
};

inline void check_float32(const char* function, const char* argument,
                          const torch::stable::Tensor& tensor) {
  if (tensor.scalar_type() != torch::headeronly::ScalarType::Float) {
    throw_bad_argument(function, argument, "float32 on a GPU");
  }
}

// f(zero of the element type)
template <class F>
void for_dtype(const char* function, const char* argument, const torch::stable::Tensor& tensor,
               F f) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(device::BFloat16{});
    case ScalarType::Half:
      return f(device::Half{});
    default:
      throw_bad_argument(function, argument, "float32, bfloat16 or float16 on a GPU");
  }
}

}  // namespace tempnet
