// The state of a loss per sample of the training set on a GPU. No torch: tests/emulator/ compiles
// this file with g++ and runs it on a CPU.
#pragma once

#include "row_reduce.cuh"

namespace tempnet {
namespace device {
namespace samples {

constexpr int kThreads = 128;
constexpr int kMostTables = 8;

struct Params {
  int count;
  float* tables[kMostTables];
  int64_t sizes[kMostTables];
  int64_t b;
  const int64_t* ids;    // [b]; of a write, sorted
  const int64_t* order;  // [b] of a write: the place in the batch of every id
  float* values;         // [count, b]
  int64_t id_stride, table_stride, value_stride;  // of the ids and of the values
};

TEMPNET_KERNEL(kThreads, 1)
read_kernel(TEMPNET_PARAM Params params) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.b) return;
  const int64_t id = params.ids[i * params.id_stride];
  const int t = blockIdx.y;
  const bool inside = id >= 0 && id < params.sizes[t];
  params.values[t * params.table_stride + i * params.value_stride] =
      inside ? params.tables[t][id] : INFINITY;
}

// Of equal ids, neighbours here, the last of the batch writes.
TEMPNET_KERNEL(kThreads, 1)
write_kernel(TEMPNET_PARAM Params params) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.b) return;
  const int64_t id = params.ids[i * params.id_stride];
  if (i + 1 < params.b && params.ids[(i + 1) * params.id_stride] == id) return;
  const int t = blockIdx.y;
  if (id < 0 || id >= params.sizes[t]) return;
  params.tables[t][id] =
      params.values[t * params.table_stride + params.order[i] * params.value_stride];
}

inline void launch_samples(const Params& params, bool write, Stream stream) {
  if (params.b == 0) return;
  const dim3 grid(unsigned((params.b + kThreads - 1) / kThreads), unsigned(params.count));
  launch(write ? write_kernel : read_kernel, grid, kThreads, 1, 0, stream, params);
}

}  // namespace samples
}  // namespace device
}  // namespace tempnet
