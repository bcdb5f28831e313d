// The second launch of a recall whose rows are split over blocks: each block adds up a few columns of one query over
// all splits, always in the same order.
#pragma once

#include "recall.cuh"
#include "recall_host.h"

namespace hmt::cuda {

constexpr int kReduceWarps = 8;  // of a block; each adds up every eighth split

// What a block of the reduction works on.
struct Reduction {
  const float* partials;  // of its unit
  int64_t batch;
  int query, row;  // in its group, and of the tensor
  int chunk;
  int position;  // of this lane's four columns in a partial result
};

template <typename Params>
__device__ __forceinline__ Reduction this_reduction(const Params& p) {
  const RecallPlan& plan = p.plan;
  const int chunks = plan.reduce_chunks, chunk = static_cast<int>(blockIdx.x % chunks);
  const int64_t unit = blockIdx.x / chunks / plan.group_size;
  const int query = static_cast<int>(blockIdx.x / chunks % plan.group_size);
  const int row = static_cast<int>(unit % plan.groups) * plan.group_size + query;
  const int position = chunk * kWarp + static_cast<int>(threadIdx.x % kWarp);
  return {p.workspace + unit * plan.unit_floats, unit / plan.groups, query, row, chunk, position};
}

// The first of the four columns at a position: the inverse of store_partial.
template <typename T>
__device__ __forceinline__ int column_at(const RecallPlan& plan, int position) {
  const int first = position / plan.threads * kReduceColumns, thread = position % plan.threads;
  return (first / Vector<T>::kSize * plan.threads + thread) * Vector<T>::kSize + first % Vector<T>::kSize;
}

__device__ __forceinline__ Vector<float> stats_of(const RecallPlan& plan, const Reduction& at, int split) {
  return load_vector(partial_of(plan, at.partials, split, at.query) + kColumns * plan.threads);
}

// The sum over splits of weight(split) times this lane's four columns; complete in the first warp.
template <typename Weight>
__device__ __forceinline__ Vector<float> reduce_columns(const RecallPlan& plan, const Reduction& at, Weight weight) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Vector<float> sum = {};
#pragma unroll 4
  for (int split = warp; split < plan.splits; split += kReduceWarps) {
    const float factor = weight(split);
    const Vector<float> part =
        load_vector(partial_of(plan, at.partials, split, at.query) + at.position * kReduceColumns);
#pragma unroll
    for (int i = 0; i < kReduceColumns; ++i) sum.element[i] += factor * part.element[i];
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  store_vector(shared + threadIdx.x * kReduceColumns, sum);
  __syncthreads();
  for (int other = 1; other < kReduceWarps; ++other) {
    const Vector<float> part = load_vector(shared + (other * kWarp + lane) * kReduceColumns);
#pragma unroll
    for (int i = 0; i < kReduceColumns; ++i) sum.element[i] += part.element[i];
  }
  return sum;
}

template <typename T>
struct alignas(kReduceColumns * sizeof(T)) Four {
  T element[kReduceColumns];
};

template <typename T>
__device__ __forceinline__ void store_four(T* pointer, const Vector<float>& x) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < kReduceColumns; ++i) from_float(x.element[i], four.element[i]);
  *reinterpret_cast<Four<T>*>(pointer) = four;
}

// The first launch and, where it has splits, the second.
template <typename Params>
const char* launch_both(void (*kernel)(Params), void (*reduction)(Params), int64_t blocks, size_t shared_bytes,
                        const Params& p, void* stream) {
  const char* error = launch(kernel, blocks, p.plan.threads, shared_bytes, p, stream);
  if (error || p.plan.splits == 1) return error;
  const int64_t reductions = p.plan.units * p.plan.group_size * p.plan.reduce_chunks;
  const size_t sums_bytes = kReduceWarps * kWarp * kReduceColumns * sizeof(float);
  return launch(reduction, reductions, kReduceWarps * kWarp, sums_bytes, p, stream);
}

}  // namespace hmt::cuda
