// The state of a loss per sample of the training set on the CPU: read and written at a batch's ids.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <vector>

#include "../tensors.h"

namespace tempnet {
namespace {

using torch::stable::Tensor;

Tensor read_samples(std::vector<Tensor> tables, Tensor ids) {
  const int64_t b = ids.size(0), stride = ids.stride(0);
  Tensor values = allocate(tables[0], {int64_t(tables.size()), b});
  float* to = static_cast<float*>(values.mutable_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(ids.const_data_ptr());
  for (const Tensor& table : tables) {
    const float* from = static_cast<const float*>(table.const_data_ptr());
    const int64_t samples = table.size(0);
    for (int64_t i = 0; i < b; ++i) {
      const int64_t id = at[i * stride];
      *to++ = id >= 0 && id < samples ? from[id] : std::numeric_limits<float>::infinity();
    }
  }
  return values;
}

void write_samples_(std::vector<Tensor> tables, Tensor ids, Tensor order, Tensor values) {
  const int64_t b = ids.size(0), stride = ids.stride(0), of_table = values.stride(0);
  const int64_t* at = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t* places =
      order.numel() ? static_cast<const int64_t*>(order.const_data_ptr()) : nullptr;
  const float* from = static_cast<const float*>(values.const_data_ptr());
  for (const Tensor& table : tables) {
    float* to = static_cast<float*>(table.mutable_data_ptr());
    const int64_t samples = table.size(0);
    for (int64_t i = 0; i < b; ++i) {  // in order: of equal ids the last one stays
      const int64_t id = at[i * stride];
      const int64_t place = places ? places[i] : i;
      if (id >= 0 && id < samples) to[id] = from[place * values.stride(1)];
    }
    from += of_table;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("read_samples.native", TORCH_BOX(&read_samples));
  library.impl("write_samples_.native", TORCH_BOX(&write_samples_));
}

}  // namespace tempnet
