// What the TempNet needs of a chunk's logits on the CPU: the norm of every row, and its maximum.
#include <torch/csrc/stable/library.h>

#include "../temperature_head.h"
#include "../tensors.h"
#include "row_reduce.h"

namespace tempnet {
namespace {

using torch::stable::Tensor;

template <class Z, class T>
struct Args {
  int64_t n, v;
  const Z* logits;  // [n, v], column stride 1
  int64_t stride;
  T* moments;  // [5, n]: shift, sum of (z - shift)^2, of z - shift, count, without -inf; 1 / norm
  bool center;
  T softcap;  // 0 for none
};

template <class T>
struct Moments {
  T squares = 0, sum = 0, count = 0;
};

// Of columns that are not -inf, relative to the shift. kCenter: also what a merge of parts needs.
template <bool kCenter, class Z, class T, class Scale>
TEMPNET_INLINE Moments<T> moments(const Z* z, int64_t count, T shift, const Scale& scale) {
  T squares = 0, sum = 0, kept = 0;
#pragma omp simd reduction(+ : squares, sum, kept)
  for (int64_t j = 0; j < count; ++j) {
    const T x = logit(T(load(z[j])), scale).value;
    const bool is_counted = x != -std::numeric_limits<T>::infinity();
    const T centred = is_counted ? x - shift : T(0);
    squares += centred * centred;
    if (kCenter) {
      sum += centred;
      kept += is_counted ? T(1) : T(0);
    }
  }
  return {squares, sum, kept};
}

template <class Z, class T, bool kCapped>
struct MomentRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const Args<Z, T>& args, int64_t begin, int64_t end) {
    const auto scale = scale_of<kCapped>(args.softcap, T(1));
    for (int64_t i = begin; i < end; ++i) {
      const Z* z = args.logits + i * args.stride;
      T shift = 0;
      if (args.center) {
        shift = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : shift)
        for (int64_t j = 0; j < args.v; ++j) {
          const T x = T(load(z[j]));
          shift = x > shift ? x : shift;  // drops NaN, which reaches the sums
        }
        shift = logit(shift, scale).value;
      }
      Moments<T> total;
      for (int64_t j = 0; j < args.v; j += kSum) {
        const int64_t count = std::min(kSum, args.v - j);
        const Moments<T> part = args.center ? moments<true>(z + j, count, shift, scale)
                                            : moments<false>(z + j, count, shift, scale);
        total.squares += part.squares;
        total.sum += part.sum;
        total.count += part.count;
      }
      T* to = args.moments + i;
      to[0] = shift;
      to[args.n] = total.squares;
      to[2 * args.n] = total.sum;
      to[3 * args.n] = total.count;
      to[4 * args.n] = inverse_norm(total.squares);
    }
  }
};

Tensor row_moments(Tensor logits, bool center, double softcap) {
  const char* const name = "row_moments";
  Tensor result;
  for_dtype(name, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    const int64_t n = logits.size(0), v = logits.size(1);
    if (v > 1 && logits.stride(1) != 1) throw_bad_argument(name, "logits", "of column stride 1");
    const auto dtype = sizeof(T) == 8 ? torch::headeronly::ScalarType::Double
                                      : torch::headeronly::ScalarType::Float;
    result = allocate(logits, {5, n}, dtype);
    const Args<Z, T> args{n,
                          v,
                          static_cast<const Z*>(logits.const_data_ptr()),
                          logits.stride(0),
                          static_cast<T*>(result.mutable_data_ptr()),
                          center,
                          T(softcap)};
    run_capped<MomentRows, Z, T>(args);
  });
  return result;
}

template <class Z, class T>
struct NormalizeArgs {
  int64_t n, v;
  const Z* logits;  // [n, v], column stride 1
  int64_t stride;
  Strided<const T> shift, inverse;
  T* x;  // [n, v]
  T softcap;
};

template <class Z, class T, bool kCapped>
struct NormalizeRows {
  template <bool kFma>
  static TEMPNET_INLINE void run(const NormalizeArgs<Z, T>& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Z* z = args.logits + i * args.stride;
      T* x = args.x + i * args.v;
      const T shift = args.shift[i], inverse = args.inverse[i];
      const auto scale = scale_of<kCapped>(args.softcap, T(1));
      if (inverse < 0) {  // whatever is there
        std::fill(x, x + args.v, T(0));
        continue;
      }
#pragma omp simd
      for (int64_t j = 0; j < args.v; ++j) {
        const T centred = logit(T(load(z[j])), scale).value - shift;
        x[j] = (centred == -std::numeric_limits<T>::infinity() ? T(0) : centred) * inverse;
      }
    }
  }
};

Tensor normalized_rows(Tensor logits, Tensor shift, Tensor inverse, double softcap) {
  const char* const name = "normalized_rows";
  Tensor result;
  for_dtype(name, "logits", logits, [&](auto types) {
    using Z = typename decltype(types)::Storage;
    using T = typename decltype(types)::Accumulator;
    const int64_t n = logits.size(0), v = logits.size(1);
    if (v > 1 && logits.stride(1) != 1) throw_bad_argument(name, "logits", "of column stride 1");
    result = allocate(logits, {n, v}, shift.scalar_type());
    const NormalizeArgs<Z, T> args{n,
                                   v,
                                   static_cast<const Z*>(logits.const_data_ptr()),
                                   logits.stride(0),
                                   strided<T>(shift),
                                   strided<T>(inverse),
                                   static_cast<T*>(result.mutable_data_ptr()),
                                   T(softcap)};
    run_capped<NormalizeRows, Z, T>(args);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempnet, CPU, library) {
  library.impl("row_moments.native", TORCH_BOX(&row_moments));
  library.impl("normalized_rows.native", TORCH_BOX(&normalized_rows));
}

}  // namespace tempnet
