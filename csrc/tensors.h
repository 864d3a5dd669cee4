// The arguments of an operator as its kernels take them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>

namespace tempnet {

// On the device of ``like`` and, where no other is given, in its dtype. torch::stable::new_empty
// boxes its arguments for the dispatcher, which takes longer than the allocation.
inline torch::stable::Tensor allocate_strided(const torch::stable::Tensor& like,
                                              std::initializer_list<int64_t> sizes,
                                              const int64_t* strides,
                                              std::optional<torch::headeronly::ScalarType> dtype) {
  int32_t code, device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, code, device, index, &made));
  return torch::stable::Tensor(made);
}
// The tests set the variable: an element that a kernel does not write is NaN then, or -1.
inline bool fills_allocations() {
  static const bool fills = std::getenv("TEMPNET_FILL_ALLOCATIONS") != nullptr;
  return fills;
}
inline torch::stable::Tensor allocate(
    const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
    std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 4> strides;
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides.at(i) = next;
    next *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  torch::stable::Tensor made = allocate_strided(like, sizes, strides.data(), dtype);
  if (fills_allocations() && made.is_cpu()) {
    std::memset(made.mutable_data_ptr(), 0xff, made.numel() * made.element_size());
  }
  return made;
}
// [n] of one number.
inline torch::stable::Tensor allocate_equal(const torch::stable::Tensor& like, int64_t n,
                                            torch::headeronly::ScalarType dtype) {
  const int64_t stride = 0;
  return allocate_strided(like, {n}, &stride, dtype);
}

// torch's own is a call of the dispatcher each time.
inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<torch::stable::Tensor> dense(
    const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional<torch::stable::Tensor>(dense(*tensor)) : std::nullopt;
}

// nullptr of an empty tensor.
template <class T>
const T* data(const torch::stable::Tensor& tensor) {
  return tensor.numel() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
template <class T>
T* mutable_data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
// nullptr without a tensor.
template <class T>
const T* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace tempnet
