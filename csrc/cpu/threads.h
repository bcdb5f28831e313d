// Parallel loops on the threads that PyTorch already has.
#pragma once

#include <cstdint>
#include <functional>

namespace hmt::cpu {

// Calls task(0), ..., task(num_tasks - 1), each once, on up to num_threads threads.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace hmt::cpu
