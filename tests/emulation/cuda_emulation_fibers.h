// Fibers on ucontext, with the switches announced to AddressSanitizer.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
  Fiber* came_from = nullptr;
};

constexpr size_t kStackBytes = 256 << 10;

using Stack = std::unique_ptr<unsigned char[]>;

inline std::vector<Stack>& free_stacks() {
  static std::vector<Stack> stacks;
  return stacks;
}

inline void start_fiber(Fiber& fiber, void (*entry)()) {
  if (free_stacks().empty()) free_stacks().push_back(Stack(new unsigned char[kStackBytes]));
  fiber.stack = free_stacks().back().release();
  fiber.stack_size = kStackBytes;
  free_stacks().pop_back();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

inline void end_fiber(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  free_stacks().push_back(Stack(static_cast<unsigned char*>(fiber.stack)));
}

// The first thing on a fiber, and the first thing after a switch back to it.
inline void enter_fiber([[maybe_unused]] Fiber& fiber) {
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

inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool finished) {
  to.came_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
  swapcontext(&from.context, &to.context);
  enter_fiber(from);
}

}  // namespace emulation
