// The elementwise half of the contrastive loss on a GPU: the operators under the CUDA key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../tensors.h"
#include "dro_contrastive.cuh"
#include "on_device.h"

namespace tempnet {
namespace {

using namespace device;
using namespace device::contrastive;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "dro_contrastive";

Tile tile_of(const Tensor& similarity, int64_t row_begin, int64_t column_begin,
             const Tensor& positive, const Tensor& ids, const Tensor& mask, int64_t m, int64_t n,
             bool include_positive) {
  if (similarity.scalar_type() != ScalarType::Float) {
    throw_bad_argument(kName, "similarity", "float32 on a GPU");
  }
  Tile tile{};
  tile.row_begin = row_begin;
  tile.column_begin = column_begin;
  tile.m = m;
  tile.n = n;
  tile.rows = static_cast<int>(similarity.size(0));
  tile.columns = static_cast<int>(similarity.size(1));
  tile.similarity = static_cast<const float*>(similarity.const_data_ptr());
  tile.stride = similarity.stride(0);
  tile.positive = static_cast<const int64_t*>(positive.const_data_ptr());
  tile.ids = ids.numel() ? static_cast<const int32_t*>(ids.const_data_ptr()) : nullptr;
  tile.mask = mask.numel() ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr;
  tile.mask_stride = mask.stride(0);
  tile.include_positive = include_positive;
  return tile;
}

void similarity_stats_(Tensor rows, Tensor columns, Tensor similarity, int64_t row_begin,
                       int64_t column_begin, Tensor row_a, Tensor column_a, Tensor positive,
                       Tensor ids, Tensor mask, bool include_positive) {
  const OnDevice on(kName, similarity);
  StatsParams params{};
  params.tile = tile_of(similarity, row_begin, column_begin, positive, ids, mask, rows.size(1),
                        columns.size(1), include_positive);
  params.tile.aligned = aligned_groups<float>(params.tile, nullptr, 0);
  params.row_a = static_cast<const float*>(row_a.const_data_ptr());
  params.column_a = static_cast<const float*>(column_a.const_data_ptr());
  params.rows = static_cast<float*>(rows.mutable_data_ptr());
  params.columns = static_cast<float*>(columns.mutable_data_ptr());
  plan_stats(params, on.multiprocessors);
  Tensor parts = allocate(rows, {part_floats(params)});
  launch_stats(params, static_cast<float*>(parts.mutable_data_ptr()), on.stream);
}

void similarity_weights_(Tensor weights, Tensor similarity, int64_t row_begin, int64_t column_begin,
                         Tensor rows, Tensor columns, Tensor positive, Tensor ids, Tensor mask,
                         bool include_positive) {
  const OnDevice on(kName, similarity);
  WeightsParams params{};
  params.tile = tile_of(similarity, row_begin, column_begin, positive, ids, mask, rows.size(1),
                        columns.size(1), include_positive);
  params.rows = static_cast<const float*>(rows.const_data_ptr());
  params.columns = static_cast<const float*>(columns.const_data_ptr());
  params.weights = weights.mutable_data_ptr();
  params.stride = weights.stride(0);
  for_dtype(kName, "weights", weights, [&](auto zero) {
    using Z = decltype(zero);
    params.tile.aligned =
        aligned_groups(params.tile, static_cast<const Z*>(params.weights), params.stride);
    launch_weights<Z>(params, on.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("similarity_stats_.native", TORCH_BOX(&similarity_stats_));
  library.impl("similarity_weights_.native", TORCH_BOX(&similarity_weights_));
}

}  // namespace tempnet
