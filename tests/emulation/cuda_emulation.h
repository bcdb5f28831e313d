// Runs CUDA C++ kernels on the CPU for tests, without a GPU or a CUDA toolkit: the same source, compiled by the host's
// compiler with -DHMT_CUDA_EMULATION.
//
// A CUDA thread is a fiber. Blocks start in random order, a few at a time, and a seed decides which fiber goes on
// whenever one waits. What a GPU leaves open is made visible:
//   - shared memory holds NaN at first, has exactly the size that was asked for, and may not be declared statically;
//   - an asynchronous copy makes its target NaN at once and lands at the wait for its group;
//   - a barrier or a shuffle that some thread of the block or warp never reaches is reported with the wait that hangs.
// Not modelled: atomics, and any order between the blocks of a launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_emulation_fibers.h"
#include "cuda_emulation_types.h"

namespace emulation {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s\n", message);
  std::abort();
}

// Set from a test.
struct Options {
  uint64_t seed = 0;
  bool fail_next_launch = false;
};

inline Options& options() {
  static Options instance;
  return instance;
}

// The next number below `limit` of a sequence that starts anew with every launch.
inline uint64_t& random_state() {
  static uint64_t state;
  return state;
}

inline size_t random_below(size_t limit) {
  uint64_t x = random_state() += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<size_t>((x ^ (x >> 31)) % limit);
}

struct Thread;

// What the lanes of a warp bring to ldmatrix and to mma.
struct Matrices {
  const unsigned char* row[32];
  float a[16][16], b[16][8];
};

// Opens when `expected` threads have come.
class Barrier {
 public:
  explicit Barrier(int expected) : expected_(expected) {}
  void wait(Thread* self);

 private:
  int expected_, arrived_ = 0;
  std::vector<Thread*> waiting_;
  char rounds_[2];  // for ThreadSanitizer: who is late in one must not know of the next
  int round_ = 0;
};

struct Warp {
  Barrier barrier{32};
  uint64_t value[2][32];  // of a shuffle; two sets in turn, so that one barrier is enough
  Matrices matrices[2];
};

struct Block {
  Block(unsigned id, unsigned blocks, unsigned threads, size_t shared_bytes);
  ~Block() { std::free(shared); }

  uint3 index, grid, size;
  unsigned char* shared;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  size_t running;
};

struct Copy {
  void* target;
  const void* source;
};

struct Thread {
  Block* block;
  Warp* warp;
  uint3 index;
  unsigned shuffles = 0, matrix_instructions = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  Fiber fiber;
  const char* waits_at = "";
};

inline Block::Block(unsigned id, unsigned blocks, unsigned count, size_t shared_bytes)
    : index{id, 0, 0},
      grid{blocks, 1, 1},
      size{count, 1, 1},
      shared(static_cast<unsigned char*>(std::malloc(shared_bytes))),
      barrier(static_cast<int>(count)),
      running(count) {
  std::memset(shared, 0xff, shared_bytes);
  for (unsigned i = 0; i < count; i += 32) warps.push_back(std::make_unique<Warp>());
  for (unsigned i = 0; i < count; ++i) {
    threads.push_back(std::make_unique<Thread>());
    threads.back()->block = this;
    threads.back()->warp = warps[i / 32].get();
    threads.back()->index = {i, 0, 0};
  }
}

inline std::vector<unsigned> random_order(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

inline Thread* current_thread = nullptr;

// Threads that can go on, and the fiber that starts and ends blocks.
struct Scheduler {
  std::vector<Thread*> ready;
  Fiber main;
  const std::function<void()>* body;

  void go_on(Fiber& from) {
    if (ready.empty()) return switch_fiber(from, main);
    const size_t i = random_below(ready.size());
    std::swap(ready[i], ready.back());
    current_thread = ready.back();
    ready.pop_back();
    switch_fiber(from, current_thread->fiber);
  }
};

inline Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

inline void Barrier::wait(Thread* self) {
  Unwatched books;
  char* round = &rounds_[round_];
  happens_before(round);
  if (++arrived_ == expected_) {
    std::vector<Thread*>& ready = scheduler().ready;
    ready.insert(ready.end(), waiting_.begin(), waiting_.end());
    waiting_.clear();
    arrived_ = 0;
    round_ ^= 1;
  } else {
    waiting_.push_back(self);
    scheduler().go_on(self->fiber);
  }
  happens_after(round);
}

inline void thread_entry() {
  enter_fiber(current_thread->fiber);
  (*scheduler().body)();
  Thread* self = current_thread;
  {
    Unwatched books;
    --self->block->running;
    self->waits_at = "its end";
  }
  leave_fiber(self->fiber, scheduler().main);
}

// Blocks run one to four at a time.
inline void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  Scheduler& s = scheduler();
  enter_main(s.main);
  s.body = &body;
  const std::vector<unsigned> order = random_order(blocks);
  const size_t limit = 1 + random_below(4);
  std::vector<std::unique_ptr<Block>> resident;
  size_t started = 0;
  while (started < blocks || !resident.empty()) {
    while (started < blocks && resident.size() < limit) {
      resident.push_back(std::make_unique<Block>(order[started++], blocks, threads, shared_bytes));
      for (auto& thread : resident.back()->threads) {
        start_fiber(thread->fiber, thread_entry);
        s.ready.push_back(thread.get());
      }
    }
    if (s.ready.empty()) {
      std::fprintf(stderr, "emulation: block %u hangs; its threads wait at\n", resident[0]->index.x);
      for (auto& thread : resident[0]->threads) std::fprintf(stderr, " %u: %s\n", thread->index.x, thread->waits_at);
      fail("a barrier or a shuffle was not reached by every thread");
    }
    {
      Unwatched books;
      s.go_on(s.main);
    }
    for (size_t i = resident.size(); i-- > 0;) {
      if (resident[i]->running > 0) continue;
      for (auto& thread : resident[i]->threads) end_fiber(thread->fiber);
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

inline void wait_at(Barrier& barrier, const char* name) {
  Thread* self = current_thread;
  self->waits_at = name;
  barrier.wait(self);
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  if (mask != 0xffffffffu) fail("shuffles are emulated for whole warps only");
  Thread* self = current_thread;
  uint64_t* values = self->warp->value[self->shuffles++ % 2];
  std::memcpy(&values[self->index.x % 32], &value, sizeof(T));
  wait_at(self->warp->barrier, "a shuffle");
  std::memcpy(&value, &values[source_lane % 32], sizeof(T));
  return value;
}

}  // namespace emulation

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emulation::current_thread->index)
#define blockIdx (emulation::current_thread->block->index)
#define blockDim (emulation::current_thread->block->size)
#define gridDim (emulation::current_thread->block->grid)

inline void __syncthreads() {
  emulation::wait_at(emulation::current_thread->block->barrier, "__syncthreads");
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::shuffle(mask, value, static_cast<unsigned>(lane));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::shuffle(mask, value, emulation::current_thread->index.x % 32 ^ static_cast<unsigned>(bits));
}

namespace hmt::cuda {

inline unsigned char* shared_memory() {
  return emulation::current_thread->block->shared;
}

inline void cp_async16(void* target, const void* source) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || reinterpret_cast<uintptr_t>(source) % 16) {
    emulation::fail("cp.async needs addresses that are multiples of 16");
  }
  std::memset(target, 0xff, 16);
  emulation::current_thread->open_group.push_back({target, source});
}

inline void cp_async_commit() {
  emulation::Thread* self = emulation::current_thread;
  self->groups.push_back(std::move(self->open_group));
  self->open_group.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulation::current_thread->groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.target, copy.source, 16);
  }
}

}  // namespace hmt::cuda

#include "cuda_emulation_mma.h"

namespace hmt::cuda {

template <typename Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, const Params& params,
                   void*) {
  if (emulation::options().fail_next_launch) {
    emulation::options().fail_next_launch = false;
    return "a failure that the test asked for";
  }
  if (blocks < 1 || blocks > INT32_MAX) return "the number of blocks is out of range";
  if (threads < 32 || threads > 1024 || threads % 32) return "the block is not made of 1 to 32 whole warps";
  if (shared_bytes > kMaxSharedBytes) return "the block needs more shared memory than every card has";
  emulation::random_state() = emulation::options().seed;
  emulation::run_grid(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
                      [&] { kernel(params); });
  return nullptr;
}

}  // namespace hmt::cuda
