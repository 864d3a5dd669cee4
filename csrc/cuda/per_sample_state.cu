// The state of a loss per sample of the training set on a GPU: the operators under the CUDA key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../tensors.h"
#include "on_device.h"
#include "per_sample_state.cuh"
namespace tempnet {
namespace {

using namespace device;
using torch::stable::Tensor;

constexpr const char* kName = "RobustContrastiveLoss";

samples::Params params_of(const std::vector<Tensor>& tables, const Tensor& ids,
                          const Tensor& values) {
  samples::Params params{};
  params.count = static_cast<int>(tables.size());
  if (params.count > samples::kMostTables) throw_bad_argument(kName, "tables", "at most eight");
  for (int t = 0; t < params.count; ++t) {
    params.tables[t] = static_cast<float*>(tables[t].mutable_data_ptr());
    params.sizes[t] = tables[t].size(0);
  }
  params.b = ids.size(0);
  params.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  params.id_stride = ids.stride(0);
  params.values = static_cast<float*>(values.mutable_data_ptr());
  params.table_stride = values.stride(0);
  params.value_stride = values.stride(1);
  return params;
}

Tensor read_samples(std::vector<Tensor> tables, Tensor ids) {
  const OnDevice on(kName, ids);
  Tensor values = allocate(tables[0], {int64_t(tables.size()), ids.size(0)});
  launch_samples(params_of(tables, ids, values), false, on.stream);
  return values;
}

void write_samples_(std::vector<Tensor> tables, Tensor ids, Tensor order, Tensor values) {
  const OnDevice on(kName, ids);
  samples::Params params = params_of(tables, ids, values);
  if (order.numel() != params.b) throw_bad_argument(kName, "order", "given on a GPU");
  params.order = static_cast<const int64_t*>(order.const_data_ptr());
  launch_samples(params, true, on.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("read_samples.native", TORCH_BOX(&read_samples));
  library.impl("write_samples_.native", TORCH_BOX(&write_samples_));
}

}  // namespace tempnet
