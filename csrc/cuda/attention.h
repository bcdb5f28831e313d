// segment_attention on a GPU: what the host hands to the kernels. Plain C++, shared with the bindings.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace hmt::cuda {

struct AttentionShape {
  int64_t batch, q_heads, kv_heads, q_len, k_len, dim;  // q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D]
};

// A [B, H, T, D] tensor: rows start at multiples of 16 bytes and are contiguous; strides count elements.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// Rotary embedding: feature r < half turns with feature r + half by the angle in column r of the tables, by position.
struct Rotary {
  const float* cos = nullptr;  // [1 or B, Tk, columns]; rows start at multiples of 16 bytes and have at least
  const float* sin = nullptr;  // `half`, rounded up to a multiple of 8, columns
  int64_t batch_stride = 0, row_stride = 0;
  int half = 0;  // 0: no rotary embedding
};

// What is hidden from a row beside the keys after it.
struct AttentionMask {
  const int32_t* pad_span = nullptr;  // [B, 2], or null: no hole
  int32_t window = INT32_MAX;
};

// The query heads that share a key head are taken together, as rows: row r is query r / group of head r % group. With
// this, the quotient is (r * reciprocal) >> 32, exact for r < 2^32 / group.
struct Group {
  int size = 1;
  uint32_t reciprocal = 0;
};

struct AttentionForward {
  AttentionShape shape;
  Group group;
  Heads q, k, v, o;
  float* lse;     // [B, Hq, Tq]
  Rotary rotary;  // of q
  AttentionMask mask;
  float softmax_scale;
  Heads rotated_k;  // [B, Hkv, Tk, D] of scratch with rotary embedding, else unused
};

struct AttentionBackward {
  AttentionShape shape;
  Group group;
  Heads q, k, v, o, d_o, dq, dk, dv;
  const float* lse;    // [B, Hq, Tq]
  const float* d_lse;  // [B, Hq, Tq], or null for zero
  Rotary rotary;
  AttentionMask mask;
  float softmax_scale;
  Heads rotated_q, rotated_k;  // scratch with rotary embedding, else unused
  float* row_lse;              // of scratch, [B, Hkv, padded_rows]: lse * log2(e), infinite where p must be zero
  float* row_delta;            // of scratch, the same shape: do . o - dlse
  int64_t padded_rows;
};

constexpr int kBlockRows = 64;  // of queries or of keys, that stay with a block

inline Group make_group(const AttentionShape& shape) {
  const int64_t size = shape.q_heads / shape.kv_heads;
  return {static_cast<int>(size), static_cast<uint32_t>(size > 1 ? (int64_t{1} << 32) / size + 1 : 0)};
}

// Scratch for every row of a key head, in whole tiles.
inline int64_t padded_rows(const AttentionShape& shape) {
  const int64_t rows = shape.q_len * (shape.q_heads / shape.kv_heads);
  return (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
}

// Rotated copies of tensors [B, H, T, D] whose row t stands at position first_position + t.
struct AttentionRotation {
  struct Part {
    Heads from, to;
    int64_t heads, length, first_position, blocks;
  };
  AttentionShape shape;
  Part part[2];  // the second one may be empty
  Rotary rotary;
};

// Launch on `stream`; throw std::runtime_error with the kernel's name and shapes if a launch fails.
void segment_attention_fwd(const AttentionForward& params, DType dtype, void* stream);
void segment_attention_bwd(const AttentionBackward& params, DType dtype, void* stream);
void rotate_keys(const AttentionForward& params, DType dtype, void* stream);
void rotate_queries_and_keys(const AttentionBackward& params, DType dtype, void* stream);

}  // namespace hmt::cuda
