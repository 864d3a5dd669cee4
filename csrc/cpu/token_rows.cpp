// What surrounds the token loss on the CPU: the weight of every row, and the sum of the rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../tensors.h"
#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums in double: they are of N numbers, and do not depend on N's order of magnitude then.
template <class T>
void row_scale_of(const Target& target, int64_t n, const Tensor* weight, const Tensor* normalizer,
                  double divisor, int64_t ignore_index, bool mean, T* scale, T* total) {
  const auto kept = [&](int64_t i) { return target[i] != ignore_index; };
  const Strided<const T> weights = weight ? strided<T>(*weight) : Strided<const T>{nullptr, 0};
  double sum = 0;
  if (normalizer) {
    sum = static_cast<const T*>(normalizer->const_data_ptr())[0];
  } else if (divisor >= 0) {
    sum = divisor;
  } else if (mean) {
    for (int64_t i = 0; i < n; ++i) sum += !kept(i) ? 0.0 : weight ? double(weights[i]) : 1.0;
  }
  *total = T(sum);
  const T inverse = !mean ? T(1) : *total == 0 ? T(0) : 1 / *total;
  if (!weight) {
    if (n) *scale = inverse;
    return;
  }
  // The weight of an ignored row may be anything, NaN too.
  for (int64_t i = 0; i < n; ++i) scale[i] = kept(i) ? weights[i] * inverse : T(0);
}

std::tuple<Tensor, Tensor> row_scale(Tensor target, std::optional<Tensor> weight,
                                     std::optional<Tensor> normalizer, double divisor,
                                     int64_t ignore_index, bool mean, bool wide) {
  const int64_t n = target.size(0);
  const auto dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor scale = weight ? allocate(target, {n}, dtype) : allocate_equal(target, n, dtype);
  Tensor total = allocate(target, {1}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    row_scale_of<T>(target_of(target), n, weight ? &*weight : nullptr,
                    normalizer ? &*normalizer : nullptr, divisor, ignore_index, mean,
                    static_cast<T*>(scale.mutable_data_ptr()),
                    static_cast<T*>(total.mutable_data_ptr()));
  };
  wide ? run(double{}) : run(float{});
  return {scale, total};
}

Tensor sum_rows(Tensor rows, std::optional<Tensor> total) {
  const bool wide = rows.scalar_type() == ScalarType::Double;
  Tensor sum = allocate(rows, {});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Strided<const T> values = strided<T>(rows);
    double s = 0;
    for (int64_t i = 0; i < rows.size(0); ++i) s += values[i];
    const bool none = total && static_cast<const T*>(total->const_data_ptr())[0] == 0;
    static_cast<T*>(sum.mutable_data_ptr())[0] = none ? std::numeric_limits<T>::quiet_NaN() : T(s);
  };
  wide ? run(double{}) : run(float{});
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("row_scale.native", TORCH_BOX(&row_scale));
  library.impl("sum_rows.native", TORCH_BOX(&sum_rows));
}

}  // namespace tempnet
