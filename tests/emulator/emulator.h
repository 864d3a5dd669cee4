// Runs the CUDA sources on a CPU: the host version of csrc/cuda/device.cuh.
//
// A fiber per CUDA thread. A fiber runs until it waits (barrier, shuffle, mbarrier) or ends; the
// fibers of a cluster take turns on one operating-system thread, forward, reversed or in random
// order. Asynchronous copies happen when no fiber can run, as late as they may: a missing wait
// reads poison. Not emulated: time, memory order between proxies, partial-mask shuffles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#define TEMPNET_DEVICE inline
#define TEMPNET_KERNEL(threads, ctas_per_sm) void
#define TEMPNET_PARAM const

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace tempnet {
namespace emulator {

struct Cta;
struct Warp;

struct Fiber {
  void* stack_pointer;
  dim3 thread, block, block_size, grid_size;
  Cta* cta;
  Warp* warp;
  int lane;
  uint32_t shuffles;
  uint32_t cluster_generation;  // when it arrived at the cluster barrier
  bool done;
  // While waiting: whether the fiber can go on, and what for.
  bool (*ready)(const void* what, uint32_t value);
  const void* what;
  uint32_t value;
  const char* reason;
};

extern Fiber* current;

enum class Order { kForward, kReversed, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint32_t seed = 0;
};
extern Settings settings;

uint8_t* shared_memory();
void sync_threads(int line);
void cluster_arrive();
void cluster_wait();
uint32_t cluster_rank();
uint32_t cluster_size();
// Every lane of the warp gives 8 bytes and takes those of the lane `from`.
uint64_t shuffle(uint64_t value, int from);
void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
void store_remote(void* to, uint32_t rank, const void* value, uint32_t bytes, uint64_t* barrier);

void run_grid(void (*call)(const void*), const void* closure, dim3 grid, int threads, int cluster,
              int shared_bytes);

}  // namespace emulator

namespace device {

using Stream = int;

inline uint8_t* shared_memory() { return emulator::shared_memory(); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float multiply(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t float_to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
template <class T>
void forget(T&) {}

inline uint32_t round_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline float widen_bf16(uint32_t x) { return bits_to_float(x << 16); }
inline uint32_t round_f16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float unpack_f16(uint32_t x) {
  const uint16_t bits = static_cast<uint16_t>(x);
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline uint32_t max_bf16x2(uint32_t x, uint32_t y) {
  const float low = std::fmax(widen_bf16(x & 0xffff), widen_bf16(y & 0xffff));
  const float high = std::fmax(widen_bf16(x >> 16), widen_bf16(y >> 16));
  return round_bf16(low) | round_bf16(high) << 16;
}
inline uint32_t max_f16x2(uint32_t x, uint32_t y) {
  const float low = std::fmax(unpack_f16(x), unpack_f16(y));
  const float high = std::fmax(unpack_f16(x >> 16), unpack_f16(y >> 16));
  return round_f16(low) | round_f16(high) << 16;
}
inline uint32_t pack_bf16x2(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}
inline uint32_t pack_f16x2(float low, float high) { return round_f16(low) | round_f16(high) << 16; }

template <class T>
T shuffle_xor(T x, int mask) {
  static_assert(sizeof(T) <= 8, "shuffle_xor: at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = emulator::shuffle(bits, emulator::current->lane ^ mask);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

inline uint4 load_stream(const uint4* p) { return *p; }
inline void store_stream(uint4* p, const uint4& v) { *p = v; }

using emulator::bulk_load;
using emulator::cluster_rank;
using emulator::cluster_size;
using emulator::cluster_wait;
using emulator::mbarrier_arrive_expect;
using emulator::mbarrier_init;
using emulator::mbarrier_wait;
inline void mbarrier_init_fence() {}
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void store_remote(float4* to, uint32_t rank, const float4& value, uint64_t* barrier) {
  emulator::store_remote(to, rank, &value, sizeof value, barrier);
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int cluster, int shared_bytes, Stream,
            const Params& params) {
  struct Closure {
    void (*kernel)(Params);
    const Params& params;
  } closure{kernel, params};
  const auto call = [](const void* p) {
    const Closure* c = static_cast<const Closure*>(p);
    c->kernel(c->params);
  };
  emulator::run_grid(call, &closure, grid, threads, cluster, shared_bytes);
}

template <class T>
T min(T x, T y) {
  return x < y ? x : y;
}

}  // namespace device
}  // namespace tempnet

#define threadIdx (::tempnet::emulator::current->thread)
#define blockIdx (::tempnet::emulator::current->block)
#define blockDim (::tempnet::emulator::current->block_size)
#define gridDim (::tempnet::emulator::current->grid_size)
#define __syncthreads() ::tempnet::emulator::sync_threads(__LINE__)
