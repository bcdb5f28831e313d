// What differs between a GPU and the CPU emulation of the tests: asynchronous copies, shared memory, launches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hmt::cuda {
constexpr size_t kMaxSharedBytes = 99 << 10;  // of a block, on the smallest card (compute capability 8.6)
}

#ifdef HMT_CUDA_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace hmt::cuda {

// The caller's bytes of dynamic shared memory; kernels use no other shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Starts to copy 16 bytes from global to shared memory; they land at the wait for their group.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Launches on the caller's stream; returns the error's text, or null. Safe while a CUDA graph is being captured.
template <typename Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, const Params& params,
                   void* stream) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMaxSharedBytes));
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                             arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the error is reported here: the next launch must not find it again
  return cudaGetErrorString(error);
}

}  // namespace hmt::cuda

#endif
