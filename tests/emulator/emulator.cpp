#include "emulator.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace tempnet {
namespace emulator {

Fiber* current = nullptr;
Settings settings;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kLanes = 32;
constexpr uint8_t kPoison = 0xff;  // NaN in every floating-point type
constexpr uint8_t kCanary = 0xa5;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("cuda emulator: " + what);
}

// Pages between two that must not be touched.
class GuardedPages {
 public:
  explicit GuardedPages(size_t bytes) : page_(sysconf(_SC_PAGESIZE)) {
    bytes_ = (bytes + page_ - 1) / page_ * page_;
    void* p = mmap(nullptr, bytes_ + 2 * page_, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("mmap failed");
    base_ = static_cast<uint8_t*>(p) + page_;
    if (bytes_) mprotect(base_, bytes_, PROT_READ | PROT_WRITE);
  }
  GuardedPages(const GuardedPages&) = delete;
  ~GuardedPages() { munmap(base_ - page_, bytes_ + 2 * page_); }
  uint8_t* begin() const { return base_; }
  uint8_t* end() const { return base_ + bytes_; }

 private:
  size_t page_, bytes_;
  uint8_t* base_;
};

struct Barrier {
  int expected = 0, arrived = 0, line = 0;
  uint32_t generation = 0;
};

struct Mbarrier {  // in the 8 bytes of shared memory that the hardware's has
  int32_t bytes;
  uint8_t pending, arrivals;
  uint16_t phase;
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier has 8 bytes");

void complete_if_done(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
  }
}

}  // namespace

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kLanes];
};

struct Cta {
  Cta(int threads, int shared_bytes)
      : pages(shared_bytes), size((shared_bytes + 127) / 128 * 128), warps(threads / kLanes) {
    if (threads % kLanes) fail("the threads of a CTA must be whole warps");
    arena = pages.end() - std::min<size_t>(size, pages.end() - pages.begin());
    std::memset(pages.begin(), kCanary, pages.end() - pages.begin());
    std::memset(arena, kPoison, shared_bytes);
    used = shared_bytes;
    barrier.expected = threads;
    for (Warp& warp : warps) warp.barrier.expected = kLanes;
  }
  void check_canaries() const {
    for (const uint8_t* p = pages.begin(); p < pages.end(); ++p) {
      if ((p < arena || p >= arena + used) && *p != kCanary) {
        fail("out-of-bounds write of shared memory at offset " + std::to_string(p - arena) +
             " of " + std::to_string(used) + " bytes");
      }
    }
  }
  GuardedPages pages;
  size_t size, used;
  uint8_t* arena;
  Barrier barrier;
  std::vector<Warp> warps;
  uint32_t rank = 0;
};

namespace {

struct Copy {
  uint8_t* to;
  const uint8_t* from;         // null: the bytes are in `value`
  std::vector<uint8_t> value;  // taken when the store was made
  uint32_t bytes;
  Mbarrier* barrier;
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  Barrier barrier;
  std::deque<Copy> copies;
};
Cluster* cluster = nullptr;
std::string error;  // found inside a fiber

void (*entry_call)(const void*);
const void* entry_closure;

#ifdef __x86_64__
void* scheduler_stack_pointer;
// Saves the callee's registers on the stack it leaves, takes them from the stack it enters.
extern "C" void tempnet_emulator_switch(void** leave, void* enter);
asm(R"(
.text
.globl tempnet_emulator_switch
.type tempnet_emulator_switch, @function
tempnet_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tempnet_emulator_switch, .-tempnet_emulator_switch
)");
void leave_fiber(Fiber* fiber) {
  tempnet_emulator_switch(&fiber->stack_pointer, scheduler_stack_pointer);
}
void enter_fiber(Fiber* fiber) {
  tempnet_emulator_switch(&scheduler_stack_pointer, fiber->stack_pointer);
}
#else
ucontext_t scheduler_context;
void leave_fiber(Fiber* fiber) {
  swapcontext(static_cast<ucontext_t*>(fiber->stack_pointer), &scheduler_context);
}
void enter_fiber(Fiber* fiber) {
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(fiber->stack_pointer));
}
#endif

void fiber_main() {
  entry_call(entry_closure);
  current->done = true;
  leave_fiber(current);
  std::abort();
}

void prepare(Fiber& fiber, uint8_t* stack) {
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // a function begins 8 bytes off a 16-byte boundary
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  ucontext_t* context = new (stack) ucontext_t;  // at the far end of the stack
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t) + 64;
  context->uc_stack.ss_size = kStack - sizeof(ucontext_t) - 64;
  context->uc_link = nullptr;
  makecontext(context, fiber_main, 0);
  fiber.stack_pointer = context;
#endif
}

void fail_in_fiber(const std::string& what) {
  error = what;
  leave_fiber(current);
}

void wait_until(bool (*ready)(const void*, uint32_t), const void* what, uint32_t value,
                const char* reason) {
  if (ready(what, value)) return;
  Fiber* fiber = current;
  fiber->ready = ready;
  fiber->what = what;
  fiber->value = value;
  fiber->reason = reason;
  leave_fiber(fiber);
  fiber->ready = nullptr;
}

bool has_moved_on(const void* barrier, uint32_t generation) {
  return static_cast<const Barrier*>(barrier)->generation != generation;
}

void arrive_and_wait(Barrier& barrier, int line, const char* reason) {
  if (barrier.arrived == 0) {
    barrier.line = line;
  } else if (barrier.line != line) {
    fail_in_fiber("divergent " + std::string(reason) + ": threads wait at lines " +
                  std::to_string(barrier.line) + " and " + std::to_string(line));
  }
  const uint32_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_until(has_moved_on, &barrier, generation, reason);
}

Mbarrier& in_arena(uint64_t* barrier) { return *reinterpret_cast<Mbarrier*>(barrier); }

// The same place in another CTA's shared memory.
uint8_t* map_to(const void* p, uint32_t rank) {
  const size_t offset = static_cast<const uint8_t*>(p) - current->cta->arena;
  if (rank >= cluster->ctas.size() || offset >= current->cta->used) {
    fail_in_fiber("address out of the cluster's shared memory");
  }
  return cluster->ctas[rank]->arena + offset;
}

void deliver(const Copy& copy) {
  std::memcpy(copy.to, copy.from ? copy.from : copy.value.data(), copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  complete_if_done(*copy.barrier);
}

void report_fault(int, siginfo_t*, void*) {
  const char message[] = "cuda emulator: access out of bounds (guard page or wild pointer)\n";
  if (write(2, message, sizeof message - 1) < 0) _exit(87);
  _exit(86);
}

struct FaultHandler {
  FaultHandler() : stack(SIGSTKSZ) {
    stack_t alternate{};
    alternate.ss_sp = stack.data();
    alternate.ss_size = stack.size();
    sigaltstack(&alternate, &old_stack);
    struct sigaction action{};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_action);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_action, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
  std::vector<uint8_t> stack;
  stack_t old_stack;
  struct sigaction old_action;
};

std::string deadlock(const std::vector<Fiber>& fibers) {
  size_t done = 0, waiting = 0;
  const char* reason = "";
  for (const Fiber& fiber : fibers) {
    done += fiber.done;
    if (fiber.ready) {
      ++waiting;
      reason = fiber.reason;
    }
  }
  return "deadlock: " + std::to_string(waiting) + " threads wait at a " + reason + ", " +
         std::to_string(done) + " have ended";
}

void run_cluster(std::vector<Fiber>& fibers, std::mt19937& random) {
  std::vector<size_t> order(fibers.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = settings.order == Order::kReversed ? order.size() - 1 - i : i;
  }
  size_t alive = fibers.size();
  while (alive) {
    if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (size_t i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.ready && !fiber.ready(fiber.what, fiber.value))) continue;
      current = &fiber;
      enter_fiber(&fiber);
      progress = true;
      if (!error.empty()) fail(error);
      alive -= fiber.done;
    }
    if (progress) continue;
    if (cluster->copies.empty()) fail(deadlock(fibers));
    const size_t i = settings.order == Order::kForward ? 0 : random() % cluster->copies.size();
    deliver(cluster->copies[i]);
    cluster->copies.erase(cluster->copies.begin() + i);
  }
  if (!cluster->copies.empty()) fail("a copy was not waited for before the kernel ended");
  for (const auto& cta : cluster->ctas) cta->check_canaries();
}

}  // namespace

uint8_t* shared_memory() { return current->cta->arena; }
void sync_threads(int line) { arrive_and_wait(current->cta->barrier, line, "__syncthreads"); }
void cluster_arrive() {
  Barrier& barrier = cluster->barrier;
  current->cluster_generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}
void cluster_wait() {
  wait_until(has_moved_on, &cluster->barrier, current->cluster_generation, "cluster barrier");
}
uint32_t cluster_rank() { return current->cta->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>(cluster->ctas.size()); }

uint64_t shuffle(uint64_t value, int from) {
  Warp& warp = *current->warp;
  uint64_t (&slots)[kLanes] = warp.slots[current->shuffles++ & 1];
  slots[current->lane] = value;
  arrive_and_wait(warp.barrier, 0, "shuffle");
  return slots[from];
}

void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  in_arena(barrier) = Mbarrier{0, uint8_t(arrivals), uint8_t(arrivals), 0};
}

void mbarrier_arrive_expect(uint64_t* p, uint32_t bytes) {
  Mbarrier& barrier = in_arena(p);
  barrier.bytes += bytes;
  if (barrier.pending == 0) fail_in_fiber("more arrivals at an mbarrier than it was made for");
  --barrier.pending;
  complete_if_done(barrier);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  wait_until(
      [](const void* b, uint32_t p) { return (static_cast<const Mbarrier*>(b)->phase & 1u) != p; },
      barrier, parity, "mbarrier");
}

void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  uint8_t* begin = static_cast<uint8_t*>(to);
  const Cta& cta = *current->cta;
  if (begin < cta.arena || begin + bytes > cta.arena + cta.used) {
    fail_in_fiber("bulk copy out of shared memory");
  }
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 ||
      reinterpret_cast<uintptr_t>(from) % 16) {
    fail_in_fiber("bulk copy of addresses or a size that are not multiples of 16");
  }
  // From here on the copy may happen: who still reads the place, or reads it too early, sees it.
  std::memset(begin, kPoison, bytes);
  cluster->copies.push_back(
      {begin, static_cast<const uint8_t*>(from), {}, bytes, &in_arena(barrier)});
}

void store_remote(void* to, uint32_t rank, const void* value, uint32_t bytes, uint64_t* barrier) {
  const uint8_t* p = static_cast<const uint8_t*>(value);
  Copy copy{map_to(to, rank), nullptr, {p, p + bytes}, bytes, nullptr};
  copy.barrier = reinterpret_cast<Mbarrier*>(map_to(barrier, rank));
  cluster->copies.push_back(std::move(copy));
}

void run_grid(void (*call)(const void*), const void* closure, dim3 grid, int threads,
              int cluster_ctas, int shared_bytes) {
  if (current) fail("a kernel was launched from a kernel");
  if (grid.x % cluster_ctas) fail("the grid is not a multiple of the cluster");
  FaultHandler handler;
  GuardedPages stacks(kStack * threads * cluster_ctas);
  std::mt19937 random(settings.seed);
  entry_call = call;
  entry_closure = closure;
  error.clear();
  struct Reset {
    ~Reset() {
      current = nullptr;
      cluster = nullptr;
    }
  } reset;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster_ctas) {
      Cluster clusters;
      cluster = &clusters;
      clusters.barrier.expected = threads * cluster_ctas;
      std::vector<Fiber> fibers(size_t(threads) * cluster_ctas);
      for (int c = 0; c < cluster_ctas; ++c) {
        clusters.ctas.push_back(std::make_unique<Cta>(threads, shared_bytes));
        Cta* cta = clusters.ctas.back().get();
        cta->rank = c;
        for (int t = 0; t < threads; ++t) {
          Fiber& fiber = fibers[size_t(c) * threads + t];
          fiber = Fiber{};
          fiber.thread = dim3(t, 0, 0);
          fiber.block = dim3(x + c, y, 0);
          fiber.block_size = dim3(threads);
          fiber.grid_size = grid;
          fiber.cta = cta;
          fiber.warp = &cta->warps[t / kLanes];
          fiber.lane = t % kLanes;
          prepare(fiber, stacks.begin() + kStack * (size_t(c) * threads + t));
        }
      }
      run_cluster(fibers, random);
    }
  }
}

}  // namespace emulator
}  // namespace tempnet
