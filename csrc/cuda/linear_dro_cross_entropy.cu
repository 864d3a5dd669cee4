// The moments of rows of logits on a GPU: the operator under the CUDA key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "linear_dro_cross_entropy.cuh"
#include "on_device.h"

namespace tempnet {
namespace {

using namespace device;
using torch::stable::Tensor;

constexpr const char* kName = "row_moments";
constexpr int64_t kMaxColumns = int64_t(1) << 28;  // byte offsets in a row stay in 32 bits
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;

Tensor row_moments(Tensor logits, bool center, double softcap) {
  const OnDevice on(kName, logits);
  linear::Params params{};
  params.n = logits.size(0);
  if (params.n > kMaxRows) throw_bad_argument(kName, "logits", "of fewer than 2^31 rows");
  if (logits.size(1) > kMaxColumns) throw_bad_argument(kName, "logits", "of at most 2^28 columns");
  params.v = static_cast<int>(logits.size(1));
  if (params.v > 1 && logits.stride(1) != 1) {
    throw_bad_argument(kName, "logits", "of column stride 1");
  }
  params.logits = logits.const_data_ptr();
  params.stride = logits.stride(0);
  params.softcap = float(softcap);
  Tensor moments =
      torch::stable::new_empty(logits, {4, params.n}, torch::headeronly::ScalarType::Float);
  params.moments = static_cast<float*>(moments.mutable_data_ptr());
  for_dtype(kName, "logits", logits,
            [&](auto zero) { linear::launch_moments<decltype(zero)>(params, center, on.stream); });
  return moments;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("row_moments.native", TORCH_BOX(&row_moments));
}

}  // namespace tempnet
