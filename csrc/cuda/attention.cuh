// What the kernels of segment_attention share: rows and keys, what is visible, and the rotary embedding.
#pragma once

#include "attention.h"
#include "attention_tile.cuh"

namespace hmt::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

// The rows of the query heads of one key head, of one batch row.
struct QueryRows {
  Group group;
  int batch, head;     // of keys
  int count;           // of rows
  int first_position;  // of query 0

  __device__ __forceinline__ QueryRows(const AttentionShape& shape, const Group& group, int batch, int head)
      : group(group),
        batch(batch),
        head(head),
        count(static_cast<int>(shape.q_len) * group.size),
        first_position(static_cast<int>(shape.k_len - shape.q_len)) {}

  __device__ __forceinline__ int query(int row) const {
    return group.size == 1 ? row : static_cast<int>((static_cast<uint64_t>(row) * group.reciprocal) >> 32);
  }
  __device__ __forceinline__ int position(int row) const { return first_position + query(row); }

  template <typename T>
  __device__ __forceinline__ T* at(const Heads& heads, int row) const {
    const int i = query(row);
    const int q_head = head * group.size + row - i * group.size;
    return static_cast<T*>(heads.data) + batch * heads.batch_stride + q_head * heads.head_stride + i * heads.row_stride;
  }
  // The index into [B, Hq, Tq].
  __device__ __forceinline__ int64_t index(const AttentionShape& shape, int row) const {
    const int i = query(row);
    const int q_head = head * group.size + row - i * group.size;
    return (batch * shape.q_heads + q_head) * shape.q_len + i;
  }
};

// The rows of a block that takes kRows of one key head. The last rows see the most keys: they come first.
template <int kRows>
struct RowBlock : QueryRows {
  int first_row, last_row;

  __device__ __forceinline__ RowBlock(const AttentionShape& shape, const Group& group, int block)
      : QueryRows(shape, group, block / static_cast<int>(shape.kv_heads) % static_cast<int>(shape.batch),
                  block % static_cast<int>(shape.kv_heads)) {
    const int units = static_cast<int>(shape.kv_heads * shape.batch);
    first_row = (static_cast<int>(gridDim.x) / units - 1 - block / units) * kRows;
    last_row = min(first_row + kRows, count) - 1;
  }

  __device__ __forceinline__ int rows() const { return last_row - first_row + 1; }
};

// The keys or the values of one head.
template <typename T>
struct KeyRows {
  T* first;
  int64_t stride;

  __device__ __forceinline__ KeyRows(const Heads& heads, int batch, int head)
      : first(static_cast<T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride),
        stride(heads.row_stride) {}

  __device__ __forceinline__ T* at(int row) const { return first + row * stride; }
};

// Starts to copy keys (or values) from `row` on into a tile of kRows.
template <int kRows, int kDim, typename T>
__device__ __forceinline__ void load_keys(T* tile, const KeyRows<const T>& keys, int row, int end) {
  constexpr int kStep = kAttentionThreads / kRowThreads<kDim>;
  const int64_t step = kStep * keys.stride;
  const T* next = keys.at(row + static_cast<int>(threadIdx.x) / kRowThreads<kDim>);
  load_tile<kRows, kDim>(tile, end - row, [&](int) {
    const T* address = next;
    next += step;  // instead of a product for every row: registers are scarce
    return address;
  });
}

// The same for rows of queries.
template <int kRows, int kDim, typename T>
__device__ __forceinline__ void load_queries(T* tile, const QueryRows& rows, const Heads& heads, int row) {
  load_tile<kRows, kDim>(tile, rows.count - row, [&](int i) { return rows.at<const T>(heads, row + i); });
}

// Which keys a position sees, in one batch row.
struct Visibility {
  int window, hole_begin = 0, hole_end = 0;

  __device__ __forceinline__ Visibility(const AttentionMask& mask, int batch, int keys) : window(mask.window) {
    if (mask.pad_span == nullptr) return;
    const int begin = max(mask.pad_span[2 * batch], 0), end = min(mask.pad_span[2 * batch + 1], keys);
    if (begin < end) hole_begin = begin, hole_end = end;
  }

  __device__ __forceinline__ bool sees(int position, int key) const {
    return key <= position && key > position - window && (key < hole_begin || key >= hole_end);
  }
  // Whether every one of the positions sees every one of the keys; all limits are included.
  __device__ __forceinline__ bool all(int first_position, int last_position, int first_key, int last_key) const {
    return last_key <= first_position && first_key > last_position - window &&
           (last_key < hole_begin || first_key >= hole_end);
  }
};

// The tiles of keys that some position of a range sees, in order: those within the hole are left out.
template <int kKeys>
class KeyTiles {
 public:
  __device__ __forceinline__ KeyTiles(const Visibility& visible, int first_position, int last_position, int keys) {
    first_ = max(first_position - visible.window + 1, 0) / kKeys;
    const int end = last_position / kKeys + 1;
    const int hole_first = max((visible.hole_begin + kKeys - 1) / kKeys, first_);
    // the last tile may be short
    const int hole_end = min(visible.hole_end == keys ? end : visible.hole_end / kKeys, end);
    gap_ = max(hole_end - hole_first, 0);
    before_gap_ = hole_first - first_;
    count = end - first_ - gap_;
  }
  __device__ __forceinline__ int first_key(int i) const { return (first_ + i + (i < before_gap_ ? 0 : gap_)) * kKeys; }

  int count;

 private:
  int first_, before_gap_, gap_;
};

// Eight neighbouring elements, of which the first `count` are there.
template <typename X>
__device__ __forceinline__ void load_features(const X* from, int count, bool aligned, float (&x)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e += Vector<X>::kSize) {
    if (!aligned) break;
    const Vector<X> vector = load_vector(from + e);
#pragma unroll
    for (int i = 0; i < Vector<X>::kSize; ++i) x[e + i] = to_float(vector.element[i]);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (!aligned) x[e] = e < count ? to_float(from[e]) : 0.0f;
  }
}

template <typename X>
__device__ __forceinline__ void store_features(X* to, int count, bool aligned, const float (&x)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e += Vector<X>::kSize) {
    if (!aligned) break;
    Vector<X> vector;
#pragma unroll
    for (int i = 0; i < Vector<X>::kSize; ++i) from_float(x[e + i], vector.element[i]);
    store_vector(to + e, vector);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (!aligned && e < count) from_float(x[e], to[e]);
  }
}

// Turns the first `rows` rows of a tile in shared memory in place; direction is 1, or -1 to turn them back.
// position(row) is the row of the tables.
template <typename X, typename Position>
__device__ __forceinline__ void rotate_tile(X* tile, int pitch, int rows, const Rotary& rotary, int batch,
                                            float direction, Position position) {
  const int half = rotary.half, chunks = (half + 7) / 8;
  const bool aligned = half % 8 == 0;
  for (int i = threadIdx.x; i < rows * chunks; i += kAttentionThreads) {
    const int row = i / chunks, column = i % chunks * 8, count = half - column;
    const int64_t angles = batch * rotary.batch_stride + position(row) * rotary.row_stride + column;
    float cos[8], sin[8], x[8], y[8], turned_x[8], turned_y[8];
    load_features(rotary.cos + angles, 8, true, cos);
    load_features(rotary.sin + angles, 8, true, sin);
    X* first = tile + row * pitch + column;
    load_features(first, count, aligned, x);
    load_features(first + half, count, aligned, y);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      turned_x[e] = x[e] * cos[e] - y[e] * sin[e] * direction;
      turned_y[e] = y[e] * cos[e] + x[e] * sin[e] * direction;
    }
    store_features(first, count, aligned, turned_x);
    store_features(first + half, count, aligned, turned_y);
  }
}

}  // namespace hmt::cuda
