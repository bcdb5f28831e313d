// Rotated copies for segment_attention: every tile of keys is read by all tiles of rows that follow it (and every tile
// of rows by all tiles of keys before it), so each row is turned once per pass here instead of once per tile there.
#include "attention.cuh"
#include "attention_host.h"

namespace hmt::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) segment_attention_rotate_kernel(const AttentionRotation p) {
  const bool second = blockIdx.x >= p.part[0].blocks;
  const AttentionRotation::Part& part = p.part[second ? 1 : 0];
  const int64_t block = second ? blockIdx.x - p.part[0].blocks : blockIdx.x;
  const int64_t head = block % part.heads, batch = block / part.heads % p.shape.batch;
  const int64_t first = block / part.heads / p.shape.batch * kBlockRows;
  const int rows = min(static_cast<int>(part.length - first), kBlockRows), dim = static_cast<int>(p.shape.dim);
  const int chunks = dim / Vector<T>::kSize, pitch = dim + Vector<T>::kSize;
  T* tile = reinterpret_cast<T*>(shared_memory());
  const T* from = static_cast<const T*>(part.from.data) + batch * part.from.batch_stride + head * part.from.head_stride;
  T* to = static_cast<T*>(part.to.data) + batch * part.to.batch_stride + head * part.to.head_stride;

  for (int i = threadIdx.x; i < rows * chunks; i += kAttentionThreads) {
    const int row = i / chunks, column = i % chunks * Vector<T>::kSize;
    cp_async16(tile + row * pitch + column, from + (first + row) * part.from.row_stride + column);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  rotate_tile(tile, pitch, rows, p.rotary, static_cast<int>(batch), 1.0f,
              [&](int row) { return part.first_position + first + row; });
  __syncthreads();
  for (int i = threadIdx.x; i < rows * chunks; i += kAttentionThreads) {
    const int row = i / chunks, column = i % chunks * Vector<T>::kSize;
    store_vector(to + (first + row) * part.to.row_stride + column, load_vector(tile + row * pitch + column));
  }
}

AttentionRotation::Part part_of(const AttentionShape& shape, const Heads& from, const Heads& to, int64_t heads,
                                int64_t length) {
  const int64_t tiles = (length + kBlockRows - 1) / kBlockRows;
  return {from, to, heads, length, shape.k_len - length, tiles * heads * shape.batch};
}

void rotate(const AttentionRotation& params, DType dtype, void* stream) {
  const char* error = with_instance(dtype, params.shape, [&](auto instance) {
    using T = typename decltype(instance)::T;
    const size_t shared_bytes = kBlockRows * kPitch<decltype(instance)::kDim> * sizeof(T);
    return launch(segment_attention_rotate_kernel<T>, params.part[0].blocks + params.part[1].blocks, kAttentionThreads,
                  shared_bytes, params, stream);
  });
  if (error) throw launch_error("segment_attention_rotate", params.shape, dtype, error);
}

}  // namespace

void rotate_keys(const AttentionForward& p, DType dtype, void* stream) {
  rotate({p.shape, {part_of(p.shape, p.k, p.rotated_k, p.shape.kv_heads, p.shape.k_len), {}}, p.rotary}, dtype, stream);
}

void rotate_queries_and_keys(const AttentionBackward& p, DType dtype, void* stream) {
  const auto queries = part_of(p.shape, p.q, p.rotated_q, p.shape.q_heads, p.shape.q_len);
  const auto keys = part_of(p.shape, p.k, p.rotated_k, p.shape.kv_heads, p.shape.k_len);
  rotate({p.shape, {queries, keys}, p.rotary}, dtype, stream);
}

}  // namespace hmt::cuda
