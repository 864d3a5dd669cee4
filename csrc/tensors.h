// The arguments of an operator as its kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace tempnet {

// torch's own is a call of the dispatcher each time.
inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<torch::stable::Tensor> dense(
    const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional<torch::stable::Tensor>(dense(*tensor)) : std::nullopt;
}

template <class T>
const T* data(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
// nullptr without a tensor.
template <class T>
const T* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace tempnet
