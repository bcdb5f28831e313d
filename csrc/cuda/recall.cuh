// What the forward and the backward kernel of memory_recall share: columns, the stream of rows, what a split leaves.
#pragma once

#include <cmath>

#include "block.cuh"
#include "recall.h"

namespace hmt::cuda {

// The first column of this thread's v-th vector: neighbouring threads own neighbouring vectors.
template <typename T>
__device__ __forceinline__ int column(int v) {
  return (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * Vector<T>::kSize;
}

// Calls f(v, column) for every vector of columns that this thread owns.
template <typename T, typename F>
__device__ __forceinline__ void for_each_vector(int dim, F f) {
#pragma unroll
  for (int v = 0; v < kColumns / Vector<T>::kSize; ++v) {
    if (column<T>(v) < dim) f(v, column<T>(v));
  }
}

// This thread's columns of a row as floats; zeros where it owns none.
template <typename T>
__device__ __forceinline__ void load_columns(const T* row, int dim, float (&x)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) x[c] = 0.0f;
  for_each_vector<T>(dim, [&](int v, int first) {
    const Vector<T> vector = load_vector(row + first);
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) x[v * Vector<T>::kSize + e] = to_float(vector.element[e]);
  });
}

template <typename T>
__device__ __forceinline__ void store_columns(T* row, int dim, const float (&x)[kColumns], float factor) {
  for_each_vector<T>(dim, [&](int v, int first) {
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) from_float(x[v * Vector<T>::kSize + e] * factor, vector.element[e]);
    store_vector(row + first, vector);
  });
}

template <typename T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t batch, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

__device__ __forceinline__ int live_slots(const int32_t* num_valid, int64_t batch, int slots) {
  return num_valid == nullptr ? slots : max(0, min(num_valid[batch], slots));
}

// An even share of `count` items.
struct Share {
  int begin, end;
};

__device__ __forceinline__ Share share(int count, int part, int parts) {
  const int size = (count + parts - 1) / parts;
  return {min(size * part, count), min(size * (part + 1), count)};
}

// Streams rows through shared memory, tile by tile, kStages - 1 tiles ahead. A thread copies and reads its own columns
// only, so that a tile needs a wait for the copies but no barrier.
template <typename T>
class RowStream {
 public:
  // ring [kStages, tile_rows, dim] in shared memory
  __device__ __forceinline__ RowStream(T* ring, const T* rows, int64_t stride, Share range, int tile_rows, int dim)
      : ring_(ring), rows_(rows), stride_(stride), range_(range), tile_rows_(tile_rows), dim_(dim) {}

  // Reads `row` instead of the row of slot `slot`.
  __device__ __forceinline__ void replace(int slot, const T* row) {
    replaced_ = slot;
    replacement_ = row;
  }

  __device__ __forceinline__ int tiles() const { return (range_.end - range_.begin + tile_rows_ - 1) / tile_rows_; }
  __device__ __forceinline__ int first_row(int tile) const { return range_.begin + tile * tile_rows_; }
  __device__ __forceinline__ int rows_in(int tile) const { return min(tile_rows_, range_.end - first_row(tile)); }

  // Call once, before the first take.
  __device__ __forceinline__ void start() {
    for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  }

  // The tile, in shared memory; its place is taken again two calls later. Call once for every tile, in order.
  __device__ __forceinline__ const T* take(int tile) {
    fetch(tile + kStages - 1);
    cp_async_wait<kStages - 1>();
    return place(tile);
  }

 private:
  __device__ __forceinline__ T* place(int tile) const {
    return ring_ + static_cast<int64_t>(tile % kStages) * tile_rows_ * dim_;
  }

  __device__ __forceinline__ void fetch(int tile) {
    for (int r = 0; r < tile_rows_; ++r) {
      const int row = first_row(tile) + r;
      if (row >= range_.end) break;
      const T* source = row == replaced_ ? replacement_ : rows_ + row * stride_;
      T* target = place(tile) + static_cast<int64_t>(r) * dim_;
      for_each_vector<T>(dim_, [&](int, int first) { cp_async16(target + first, source + first); });
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  }

  T* ring_;
  const T* rows_;
  int64_t stride_;
  Share range_;
  int tile_rows_, dim_;
  int replaced_ = -1;
  const T* replacement_ = nullptr;
};

// What a split leaves for query q of its group.
template <typename Float>
__device__ __forceinline__ Float* partial_of(const RecallPlan& plan, Float* partials, int split, int q) {
  return partials + (static_cast<int64_t>(split) * plan.group_size + q) * plan.partial_floats;
}

// In the order of the threads, not of the columns: every access is one contiguous line per warp.
__device__ __forceinline__ void store_partial(float* partial, const float (&x)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; c += 4) {
    store_vector(partial + (c * blockDim.x + threadIdx.x * 4), Vector<float>{{x[c], x[c + 1], x[c + 2], x[c + 3]}});
  }
}

// Dynamic shared memory: the ring of rows and two sets of block sums.
template <typename T, int kSums>
class RecallSharedMemory {
 public:
  static size_t bytes(const RecallPlan& plan, int64_t dim) {
    return kStages * plan.tile_rows * dim * sizeof(T) + 2 * (plan.threads / kWarp) * kSums * sizeof(float);
  }

  __device__ __forceinline__ RecallSharedMemory(int tile_rows, int dim) {
    ring = reinterpret_cast<T*>(shared_memory());
    sums_ = reinterpret_cast<float*>(ring + static_cast<int64_t>(kStages) * tile_rows * dim);
  }

  // The two sets in turn: one barrier lies between two uses, so that the set of the last but one is free.
  __device__ __forceinline__ float* next_sums() {
    turn_ ^= 1;
    return sums_ + turn_ * (blockDim.x / kWarp) * kSums;
  }

  T* ring;

 private:
  float* sums_;
  int turn_ = 0;
};

}  // namespace hmt::cuda
