// The moments of rows of logits on a GPU: the operator under the CUDA key.
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "linear_dro_cross_entropy.cuh"
#include "on_device.h"

namespace tempnet {
namespace {

using namespace device;
using torch::stable::Tensor;

constexpr int64_t kMaxColumns = int64_t(1) << 28;  // byte offsets in a row stay in 32 bits
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;

template <class Params>
Params params_of(const char* function, const Tensor& logits) {
  Params params{};
  params.n = logits.size(0);
  if (params.n > kMaxRows) throw_bad_argument(function, "logits", "of fewer than 2^31 rows");
  if (logits.size(1) > kMaxColumns) {
    throw_bad_argument(function, "logits", "of at most 2^28 columns");
  }
  params.v = static_cast<int>(logits.size(1));
  if (params.v > 1 && logits.stride(1) != 1) {
    throw_bad_argument(function, "logits", "of column stride 1");
  }
  params.logits = logits.const_data_ptr();
  params.stride = logits.stride(0);
  return params;
}

Tensor row_moments(Tensor logits, bool center, double softcap) {
  const char* const name = "row_moments";
  const OnDevice on(name, logits);
  auto params = params_of<linear::Params>(name, logits);
  params.softcap = float(softcap);
  Tensor moments = allocate(logits, {5, params.n}, torch::headeronly::ScalarType::Float);
  params.moments = static_cast<float*>(moments.mutable_data_ptr());
  for_dtype(name, "logits", logits,
            [&](auto zero) { linear::launch_moments<decltype(zero)>(params, center, on.stream); });
  return moments;
}

Tensor normalized_rows(Tensor logits, Tensor shift, Tensor inverse, double softcap) {
  const char* const name = "normalized_rows";
  const OnDevice on(name, logits);
  auto params = params_of<linear::NormalizeParams>(name, logits);
  shift = dense(shift), inverse = dense(inverse);
  Tensor x = allocate(shift, {params.n, params.v});
  params.shift = data<float>(shift);
  params.inverse = data<float>(inverse);
  params.softcap = float(softcap);
  params.x = static_cast<float*>(x.mutable_data_ptr());
  for_dtype(name, "logits", logits,
            [&](auto zero) { linear::launch_normalize<decltype(zero)>(params, on.stream); });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CUDA, library) {
  library.impl("row_moments.native", TORCH_BOX(&row_moments));
  library.impl("normalized_rows.native", TORCH_BOX(&normalized_rows));
}

}  // namespace tempnet
