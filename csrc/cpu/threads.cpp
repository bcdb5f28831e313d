#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace hmt::cpu {
namespace {

// The entry point of every OpenMP runtime that gcc's code can run on; PyTorch has loaded one and made it global.
// A second pool of threads would fight with PyTorch's for the cores: after each operator they wait by spinning.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMPParallel openmp_parallel() {
  static const auto address = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return address;
}

// The threads of a pool do not survive a fork, and OpenMP would wait for them.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Loop {
  const std::function<void(int64_t)>& task;
  int64_t num_tasks;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(i);
  }
};

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
  Loop loop{task, num_tasks};
  const auto count = static_cast<unsigned>(std::min<int64_t>(num_threads, num_tasks));
  if (count <= 1 || forked) return loop.run();
  if (const auto openmp = openmp_parallel()) {
    return openmp([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, count, 0);
  }
  std::vector<std::thread> others;
  for (unsigned i = 1; i < count; ++i) others.emplace_back([&loop] { loop.run(); });
  loop.run();
  for (auto& thread : others) thread.join();
}

}  // namespace hmt::cpu
