// Fibers: ucontext enters one, and what switches between them needs no system call, as its swapcontext would.
//
// AddressSanitizer is told of the switches; for ThreadSanitizer each fiber is a thread, ordered with others by
// happens_after alone.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace emulation {

struct Fiber {
  ucontext_t context;  // where it begins
  void* place[5];      // where it was left
  bool left = false;
  void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;   // of AddressSanitizer
  void* tsan_thread = nullptr;  // of ThreadSanitizer
  Fiber* came_from = nullptr;
};

constexpr size_t kStackBytes = 256 << 10;

// What fibers that have ended leave to later ones.
struct Remains {
  std::unique_ptr<unsigned char[]> stack;
  void* tsan_thread;
};

inline std::vector<Remains>& remains() {
  static std::vector<Remains> instance;
  return instance;
}

// All that was done before `happens_before(x)` is known after `happens_after(x)`, to ThreadSanitizer.
inline void happens_before([[maybe_unused]] void* x) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(x);
#endif
}

inline void happens_after([[maybe_unused]] void* x) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(x);
#endif
}

// The emulation's own books, which fibers share without any order, are none of ThreadSanitizer's business.
struct Unwatched {
  Unwatched() {
#ifdef __SANITIZE_THREAD__
    __tsan_ignore_thread_begin();
#endif
  }
  ~Unwatched() {
#ifdef __SANITIZE_THREAD__
    __tsan_ignore_thread_end();
#endif
  }
};

// The program's own fiber, from which all others are started.
inline void enter_main([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_THREAD__
  Unwatched books;
  fiber.tsan_thread = __tsan_get_current_fiber();
#endif
}

inline void start_fiber(Fiber& fiber, void (*entry)()) {
  if (remains().empty()) {
    remains().push_back({std::unique_ptr<unsigned char[]>(new unsigned char[kStackBytes]), nullptr});
#ifdef __SANITIZE_THREAD__
    remains().back().tsan_thread = __tsan_create_fiber(0);
#endif
  }
  fiber.stack = remains().back().stack.release();
  fiber.stack_size = kStackBytes;
  fiber.tsan_thread = remains().back().tsan_thread;
  remains().pop_back();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  happens_before(&fiber);
}

inline void end_fiber(Fiber& fiber) {
  happens_after(&fiber);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  remains().push_back({std::unique_ptr<unsigned char[]>(static_cast<unsigned char*>(fiber.stack)), fiber.tsan_thread});
}

// After a switch back to a fiber.
inline void return_to_fiber([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom, &size);
  if (fiber.came_from->stack == nullptr) {  // the program's own stack
    fiber.came_from->stack = const_cast<void*>(bottom);
    fiber.came_from->stack_size = size;
  }
#endif
}

// The first thing on a fiber.
inline void enter_fiber(Fiber& fiber) {
  return_to_fiber(fiber);
  happens_after(&fiber);
}

__attribute__((noinline, no_sanitize("address"), no_sanitize("thread"))) inline void jump(Fiber& from, Fiber& to) {
  from.left = true;
  if (__builtin_setjmp(from.place) != 0) return;
  if (to.left) __builtin_longjmp(to.place, 1);
  setcontext(&to.context);
}

inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool finished = false) {
#ifdef __SANITIZE_ADDRESS__
  to.came_from = &from;
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.tsan_thread, __tsan_switch_to_fiber_no_sync);
#endif
  jump(from, to);
  return_to_fiber(from);
}

// The last thing on a fiber.
inline void leave_fiber(Fiber& fiber, Fiber& main) {
  happens_before(&fiber);
  switch_fiber(fiber, main, true);
}

}  // namespace emulation
