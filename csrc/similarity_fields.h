// The rows of what the operators on a tile of similarities read and write;
// tempnet_kernels/core/fields.py has the same order.
#pragma once

namespace tempnet {

// Of the states, [kStateFields, M] and [kStateFields, N]: those of online_softmax.h, the number of
// pairs that count, and (rows only) the positive's similarity.
enum StateField { kStateM, kStateS, kStateSx, kStateCount, kStatePositive, kStateFields };

// Of the gradient's parameters, [3, M] and [3, N]: w = q 2^(z a - m).
enum WeightField { kWeightA, kWeightM, kWeightQ, kWeightFields };

}  // namespace tempnet
