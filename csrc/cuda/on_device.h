// Where an operator's kernels are launched.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "device.cuh"

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

}  // namespace tempnet
