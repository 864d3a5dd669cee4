// What surrounds the token loss on a GPU: the operators under the CUDA key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../tensors.h"
#include "on_device.h"
#include "token_rows.cuh"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace device::token_rows;

std::tuple<Tensor, Tensor> row_scale(Tensor target, std::optional<Tensor> weight,
                                     std::optional<Tensor> normalizer, double divisor,
                                     int64_t ignore_index, bool mean, bool wide) {
  if (wide) throw_bad_argument("row_scale", "the accumulation dtype", "float32 on a GPU");
  const OnDevice on("row_scale", target);
  ScaleParams params{};
  params.n = target.size(0);
  params.target = target.const_data_ptr();
  params.target_stride = target.stride(0);
  params.wide_target = target.scalar_type() == ScalarType::Long;
  params.weighted = weight.has_value();
  if (weight) {
    params.weight = static_cast<const float*>(weight->const_data_ptr());
    params.weight_stride = weight->stride(0);
  }
  if (normalizer) params.normalizer = static_cast<const float*>(normalizer->const_data_ptr());
  params.divisor = float(divisor);
  params.ignore_index = ignore_index;
  params.mean = mean;
  Tensor scale = weight ? allocate(target, {params.n}, ScalarType::Float)
                        : allocate_equal(target, params.n, ScalarType::Float);
  Tensor total = allocate(target, {1}, ScalarType::Float);
  params.scale = static_cast<float*>(scale.mutable_data_ptr());
  params.total = static_cast<float*>(total.mutable_data_ptr());
  launch_scale(params, on.stream);
  return {scale, total};
}

Tensor sum_rows(Tensor rows, std::optional<Tensor> total) {
  check_float32("sum_rows", "rows", rows);
  const OnDevice on("sum_rows", rows);
  Tensor sum = allocate(rows, {});
  const float* guard = total ? static_cast<const float*>(total->const_data_ptr()) : nullptr;
  launch_sum({rows.size(0), static_cast<const float*>(rows.const_data_ptr()), rows.stride(0), guard,
              static_cast<float*>(sum.mutable_data_ptr())},
             on.stream);
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("row_scale.native", TORCH_BOX(&row_scale));
  library.impl("sum_rows.native", TORCH_BOX(&sum_rows));
}

}  // namespace tempnet
