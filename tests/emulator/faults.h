// Small kernels, right and with a planted fault, that the emulator must tell apart.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/device.cuh"

namespace tempnet {
namespace faults {

using namespace device;

constexpr int kThreads = 64;

struct Params {
  const float* from;
  float* to;
  int count;
  bool fault;
};

// Reverses 64 numbers through shared memory. The fault: no barrier between write and read.
inline void reverse_kernel(const Params params) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = params.from[threadIdx.x];
  if (!params.fault) __syncthreads();
  params.to[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// The fault: half of the threads wait at another barrier.
inline void divergent_kernel(const Params params) {
  if (params.fault && threadIdx.x >= kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  params.to[threadIdx.x] = 1;
}

// The fault: a thread leaves before a barrier.
inline void early_exit_kernel(const Params params) {
  if (params.fault && threadIdx.x == 5) return;
  __syncthreads();
  params.to[threadIdx.x] = 1;
}

// A bulk copy to shared memory and from there out. The fault: no wait.
inline void copy_kernel(const Params params) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + kThreads);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect(barrier, kThreads * sizeof(float));
    bulk_load(shared, params.from, kThreads * sizeof(float), barrier);
  }
  __syncthreads();
  if (!params.fault) mbarrier_wait(barrier, 0);
  params.to[threadIdx.x] = shared[threadIdx.x];
  __syncthreads();
  if (params.fault) mbarrier_wait(barrier, 0);
}

// Writes `count` numbers to shared memory for 64.
inline void overrun_kernel(const Params params) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = threadIdx.x; i < params.count; i += kThreads) shared[i] = float(i);
}

inline std::vector<float> run(void (*kernel)(Params), bool fault, int count) {
  std::vector<uint4> aligned(kThreads / 4);
  float* from = reinterpret_cast<float*>(aligned.data());
  for (int i = 0; i < kThreads; ++i) from[i] = float(i);
  std::vector<float> to(kThreads);
  launch(kernel, dim3(1), kThreads, 1, kThreads * 4 + 8, 0, Params{from, to.data(), count, fault});
  return to;
}

inline std::vector<float> reverse_blocks(bool fault) { return run(reverse_kernel, fault, 0); }
inline std::vector<float> divergent_barrier(bool fault) { return run(divergent_kernel, fault, 0); }
inline std::vector<float> early_exit(bool fault) { return run(early_exit_kernel, fault, 0); }
inline std::vector<float> copy_through_shared(bool fault) { return run(copy_kernel, fault, 0); }
inline std::vector<float> overrun(int count) { return run(overrun_kernel, false, count); }

}  // namespace faults
}  // namespace tempnet
