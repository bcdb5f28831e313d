// memory_recall on a GPU: what the host hands to the kernels. Plain C++, shared with the bindings.
#pragma once

#include "recall_plan.h"

namespace hmt::cuda {

// A [B, rows, D] tensor: rows start at multiples of 16 bytes and are contiguous; strides count elements.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
};

struct RecallForward {
  RecallShape shape;
  RecallPlan plan;
  Rows query, memory, recalled;
  Rows recalled_copy;         // a second place for the result, or null
  const int32_t* num_valid;   // [B], or null for N
  float* lse;                 // [B, Q]
  int32_t* slot;              // [B, Q]
  Rows new_memory;            // [B, 1, D]: takes the place of slot slot_index[b], in memory too; or null
  const int32_t* slot_index;  // [B]; outside [0, N) nothing is replaced
  float* workspace;
  float softmax_scale;
};

struct RecallBackward {
  RecallShape shape;
  RecallPlan plan;
  Rows query, memory, recalled, d_recalled;
  const int32_t* num_valid;  // [B], or null for N
  const float* lse;          // [B, Q]
  const float* d_lse;        // [B, Q], or null for zero
  Rows d_query, d_memory;
  float* d_memory_sum;  // [B, N, D], contiguous like d_memory, where several groups of queries add up; null with one
  float* workspace;
  float softmax_scale;
};

// Launch on `stream`; throw std::runtime_error with the kernel's name and shapes if the launch fails.
void memory_recall_fwd(const RecallForward& params, DType dtype, void* stream);
void memory_recall_bwd(const RecallBackward& params, DType dtype, void* stream);

}  // namespace hmt::cuda
