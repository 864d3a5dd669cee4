// What the kernels use beyond C++: inline PTX, shared memory, launches. Under TEMPNET_EMULATED the
// same names come from tests/emulator/, which runs the kernels on a CPU.
//
// Shared memory has one origin, shared_memory(): a __shared__ variable has no counterpart in the
// other CTAs of a cluster that the emulator could find.
#pragma once

#include <cstdint>

#ifdef TEMPNET_EMULATED
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define TEMPNET_DEVICE __device__ __forceinline__
#define TEMPNET_KERNEL(threads, ctas_per_sm) __global__ void __launch_bounds__(threads, ctas_per_sm)
// Clusters and mbarriers with transaction counts are of compute capability 9.0.
#define TEMPNET_HAS_CLUSTERS (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
#define TEMPNET_PARAM const __grid_constant__

namespace tempnet {
namespace device {

TEMPNET_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t arena[];
  return arena;
}

TEMPNET_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

TEMPNET_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

TEMPNET_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A product that the compiler must not contract: its rounding is part of the algebra.
TEMPNET_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }

// Two 16-bit numbers in a word. The maxima drop NaN.
TEMPNET_DEVICE uint32_t max_bf16x2(uint32_t x, uint32_t y) {
  uint32_t r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}
TEMPNET_DEVICE uint32_t max_f16x2(uint32_t x, uint32_t y) {
  uint32_t r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}
TEMPNET_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
TEMPNET_DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
TEMPNET_DEVICE float unpack_f16(uint32_t half) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(static_cast<uint16_t>(half)));
  return r;
}
TEMPNET_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
TEMPNET_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// Forget what is known of a word: without it the compiler keeps the row's fp32 values alive from
// one pass over its packed registers to the next, and spills.
template <class T>
TEMPNET_DEVICE void forget(T& x) {
  asm volatile("" : "+r"(x));
}

template <class T>
TEMPNET_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Data that this launch reads or writes once.
TEMPNET_DEVICE uint4 load_stream(const uint4* p) { return __ldcs(p); }
TEMPNET_DEVICE void store_stream(uint4* p, const uint4& v) { __stcs(p, v); }

#if TEMPNET_HAS_CLUSTERS
TEMPNET_DEVICE uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
TEMPNET_DEVICE uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
// Orders no memory but what mbarrier_init_fence does.
TEMPNET_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
TEMPNET_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
TEMPNET_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the CTAs that pass the next cluster barrier.
TEMPNET_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
TEMPNET_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of that parity is complete.
TEMPNET_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "\t@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Stores to the same place of another CTA's shared memory, some time; completes 16 bytes on that
// CTA's barrier.
TEMPNET_DEVICE void store_remote(float4* to, uint32_t rank, const float4& value,
                                 uint64_t* barrier) {
  asm volatile(
      "{\n\t.reg .b32 to, bar;\n"
      "\tmapa.shared::cluster.u32 to, %0, %2;\n"
      "\tmapa.shared::cluster.u32 bar, %1, %2;\n"
      "\tst.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, "
      "[bar];\n\t}" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z),
      "f"(value.w)
      : "memory");
}
#else
TEMPNET_DEVICE uint32_t cluster_rank() { return 0; }
TEMPNET_DEVICE uint32_t cluster_size() { return 1; }
TEMPNET_DEVICE void cluster_arrive_relaxed() {}
TEMPNET_DEVICE void cluster_wait() {}
TEMPNET_DEVICE void mbarrier_init(uint64_t*, uint32_t) {}
TEMPNET_DEVICE void mbarrier_init_fence() {}
TEMPNET_DEVICE void mbarrier_arrive_expect(uint64_t*, uint32_t) {}
TEMPNET_DEVICE void mbarrier_wait(uint64_t*, uint32_t) {}
TEMPNET_DEVICE void store_remote(float4*, uint32_t, const float4&, uint64_t*) {}
#endif

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or torch finds it after its next launch, and raises again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

using Stream = cudaStream_t;

// On the current device.
template <class Kernel>
cudaFuncAttributes attributes_of(Kernel kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes;
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int cluster, int shared_bytes,
            Stream stream, const Params& params) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, params), "cudaLaunchKernelEx");
}

}  // namespace device
}  // namespace tempnet
#endif
