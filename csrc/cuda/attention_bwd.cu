// segment_attention backward: with p = softmax and ds = p (do v^T - delta), dv = p^T do, dk = scale ds^T q, dq = scale
// ds k. dk and dv by tiles of keys, dq by tiles of rows: each is summed by one block in a fixed order, without atomics.
#include "attention.cuh"
#include "attention_host.h"

namespace hmt::cuda {
namespace {

// Rows of a tile that passes by a block; 64 rows of 128 features would need more shared memory than every card has.
template <int kDim>
constexpr int kPassing = kDim > 64 ? 32 : 64;

// Dynamic shared memory: the pair of tiles that stays with the block (keys and values, or queries and do), a ring of
// pairs that pass by, with lse and delta if they are rows. At the end it holds the results.
template <typename T, int kDim>
struct BackwardShared {
  static constexpr int kStages = 2;
  static constexpr int kStayingTile = kBlockRows * kPitch<kDim>, kPassingTile = kPassing<kDim> * kPitch<kDim>;
  static constexpr int kTiles = 2 * kStayingTile + 2 * kStages * kPassingTile;
  static constexpr size_t kBytes = kTiles * sizeof(T) + 2 * kStages * kPassing<kDim> * sizeof(float);
  static_assert(kBytes <= kMaxSharedBytes, "every card has this much");
  static_assert(kBlockRows * kPitch<kDim> * sizeof(float) <= kBytes, "the results fit");

  __device__ __forceinline__ T* staying() const { return reinterpret_cast<T*>(shared_memory()); }
  __device__ __forceinline__ T* second_staying() const { return staying() + kStayingTile; }
  __device__ __forceinline__ T* passing(int i) const {
    return staying() + 2 * kStayingTile + i % kStages * 2 * kPassingTile;
  }
  __device__ __forceinline__ T* second_passing(int i) const { return passing(i) + kPassingTile; }
  __device__ __forceinline__ float* lse(int i) const {
    return reinterpret_cast<float*>(staying() + kTiles) + i % kStages * 2 * kPassing<kDim>;
  }
  __device__ __forceinline__ float* delta(int i) const { return lse(i) + kPassing<kDim>; }
  __device__ __forceinline__ float* results() const { return reinterpret_cast<float*>(staying()); }
};

// row_lse and row_delta, for the other two kernels; eight threads for a row.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) segment_attention_delta_kernel(const AttentionBackward p) {
  constexpr int kLanes = 8;
  const int64_t all = blockIdx.x * static_cast<int64_t>(kAttentionThreads / kLanes) + threadIdx.x / kLanes;
  const int unit = static_cast<int>(all / p.padded_rows);
  const int row = static_cast<int>(all % p.padded_rows), dim = static_cast<int>(p.shape.dim);
  const int kv_heads = static_cast<int>(p.shape.kv_heads);
  const QueryRows rows(p.shape, p.group, unit / kv_heads, unit % kv_heads);
  const bool present = row < rows.count;
  float dot = 0.0f;
  if (present) {
    const T* out = rows.at<const T>(p.o, row);
    const T* d_out = rows.at<const T>(p.d_o, row);
    for (int column = threadIdx.x % kLanes * Vector<T>::kSize; column < dim; column += kLanes * Vector<T>::kSize) {
      const Vector<T> x = load_vector(out + column), y = load_vector(d_out + column);
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) dot += to_float(x.element[e]) * to_float(y.element[e]);
    }
  }
  dot = lanes_sum<kLanes>(dot);
  if (threadIdx.x % kLanes > 0) return;
  const int64_t index = present ? rows.index(p.shape, row) : 0;
  const float lse = present ? p.lse[index] : -INFINITY;
  const bool empty = lse == -INFINITY;  // nothing is seen: p is zero, and a gradient of lse may be anything
  p.row_lse[all] = empty ? INFINITY : lse * kLog2E;
  p.row_delta[all] = empty ? 0.0f : dot - (p.d_lse ? p.d_lse[index] : 0.0f);
}

// scores and dp of the warp's 16 staying rows with all passing rows of the i-th tile.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_pair(const BackwardShared<T, kDim>& shared, int i,
                                              Fragments<1, kPassing<kDim>>& scores, Fragments<1, kPassing<kDim>>& dp) {
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * kWarpRows;
  multiply_by_rows<kDim, kPassing<kDim>, 1>(scores, shared.passing(i), [&](int, int column, uint32_t (&a)[4]) {
    load_left<kDim>(a, shared.staying() + warp_row * kPitch<kDim> + column);
  });
  multiply_by_rows<kDim, kPassing<kDim>, 1>(dp, shared.second_passing(i), [&](int, int column, uint32_t (&a)[4]) {
    load_left<kDim>(a, shared.second_staying() + warp_row * kPitch<kDim> + column);
  });
}

// Writes factor * product through shared memory, turned back where it is a gradient of what was rotated.
template <typename T, int kDim, typename Position, typename RowAt>
__device__ __forceinline__ void write_gradient(float* staging, const Fragments<1, kDim>& product, float factor,
                                               int rows, const Rotary& rotary, int batch, Position position,
                                               RowAt row_at) {
  __syncthreads();
  stage_product<kDim, 1>(staging, product, {{factor, factor}});
  __syncthreads();
  if (rotary.half > 0) {
    rotate_tile(staging, kPitch<kDim>, rows, rotary, batch, -1.0f, position);
    __syncthreads();
  }
  store_staged<kDim, T>(staging, rows, row_at);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2) segment_attention_bwd_keys_kernel(const AttentionBackward p) {
  constexpr int kRowTile = kPassing<kDim>;
  const int heads = static_cast<int>(p.shape.kv_heads), batches = static_cast<int>(p.shape.batch);
  const int keys = static_cast<int>(p.shape.k_len);
  const int head = blockIdx.x % heads, batch = blockIdx.x / heads % batches;
  // The first keys are seen by the most rows: they come first.
  const int first_key = static_cast<int>(blockIdx.x / heads / batches) * kBlockRows;
  const int last_key = min(first_key + kBlockRows, keys) - 1;
  const QueryRows rows(p.shape, p.group, batch, head);
  const Visibility visible(p.mask, batch, keys);
  const Heads& q = p.rotary.half > 0 ? p.rotated_q : p.q;
  const KeyRows<const T> k(p.rotary.half > 0 ? p.rotated_k : p.k, batch, head), v(p.v, batch, head);
  const float* row_lse = p.row_lse + (int64_t{batch} * heads + head) * p.padded_rows;
  const float* row_delta = p.row_delta + (int64_t{batch} * heads + head) * p.padded_rows;
  const BackwardShared<T, kDim> shared;

  // The rows from which some key of the block is seen.
  const bool hidden = first_key >= visible.hole_begin && last_key < visible.hole_end;
  const int first_query = max(first_key - rows.first_position, 0);
  const int end_position = visible.window < keys - last_key ? last_key + visible.window : keys;
  const int end_row = hidden ? 0 : max(end_position - rows.first_position, 0) * p.group.size;
  const int first_tile = first_query * p.group.size / kRowTile;
  const int tiles = max((end_row + kRowTile - 1) / kRowTile - first_tile, 0);

  const auto fetch = [&](int i) {
    if (i < tiles) {
      const int first = (first_tile + i) * kRowTile;
      load_queries<kRowTile, kDim>(shared.passing(i), rows, q, first);
      load_queries<kRowTile, kDim>(shared.second_passing(i), rows, p.d_o, first);
      const int part = threadIdx.x * 4;
      if (part < kRowTile) {
        cp_async16(shared.lse(i) + part, row_lse + first + part);
        cp_async16(shared.delta(i) + part, row_delta + first + part);
      }
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  load_keys<kBlockRows, kDim>(shared.staying(), k, first_key, keys);
  load_keys<kBlockRows, kDim>(shared.second_staying(), v, first_key, keys);
  fetch(0);

  const float scale = p.softmax_scale * kLog2E;
  const int thread_key = first_key + threadIdx.x / kWarp * kWarpRows;
  Fragments<1, kDim> dk = {}, dv = {};
  for (int i = 0; i < tiles; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    fetch(i + 1);
    Fragments<1, kRowTile> weights = {}, ds = {};
    multiply_pair(shared, i, weights, ds);
    const int first = (first_tile + i) * kRowTile, last = min(first + kRowTile, rows.count) - 1;
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[0][j][e] = exp2_fast(weights[0][j][e] * scale - shared.lse(i)[fragment_column(j, e)]);
      }
    }
    if (!visible.all(rows.position(first), rows.position(last), first_key, first_key + kBlockRows - 1)) {
#pragma unroll
      for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int position = rows.position(first + fragment_column(j, e));
          if (!visible.sees(position, thread_key + fragment_row(e))) weights[0][j][e] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        ds[0][j][e] = weights[0][j][e] * (ds[0][j][e] - shared.delta(i)[fragment_column(j, e)]);
    }
    multiply_by_columns<kDim, kRowTile, 1>(dv, weights, shared.second_passing(i));
    multiply_by_columns<kDim, kRowTile, 1>(dk, ds, shared.passing(i));
  }
  cp_async_wait<0>();
  const KeyRows<T> d_keys(p.dk, batch, head), d_values(p.dv, batch, head);
  const int count = last_key - first_key + 1;
  const auto position = [&](int row) { return first_key + row; };
  write_gradient<T, kDim>(shared.results(), dk, p.softmax_scale, count, p.rotary, batch, position,
                          [&](int row) { return d_keys.at(first_key + row); });
  write_gradient<T, kDim>(shared.results(), dv, 1.0f, count, Rotary(), batch, position,
                          [&](int row) { return d_values.at(first_key + row); });
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    segment_attention_bwd_queries_kernel(const AttentionBackward p) {
  constexpr int kKeyTile = kPassing<kDim>;
  const int keys = static_cast<int>(p.shape.k_len);
  const RowBlock<kBlockRows> block(p.shape, p.group, blockIdx.x);
  const int first_position = block.position(block.first_row), last_position = block.position(block.last_row);
  const Visibility visible(p.mask, block.batch, keys);
  const KeyTiles<kKeyTile> tiles(visible, first_position, last_position, keys);
  const Heads& q = p.rotary.half > 0 ? p.rotated_q : p.q;
  const KeyRows<const T> k(p.rotary.half > 0 ? p.rotated_k : p.k, block.batch, block.head);
  const KeyRows<const T> v(p.v, block.batch, block.head);
  const BackwardShared<T, kDim> shared;

  const auto fetch = [&](int i) {
    if (i < tiles.count) {
      const int first_key = tiles.first_key(i);
      load_keys<kKeyTile, kDim>(shared.passing(i), k, first_key, keys);
      load_keys<kKeyTile, kDim>(shared.second_passing(i), v, first_key, keys);
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  load_queries<kBlockRows, kDim>(shared.staying(), block, q, block.first_row);
  load_queries<kBlockRows, kDim>(shared.second_staying(), block, p.d_o, block.first_row);
  fetch(0);

  const float scale = p.softmax_scale * kLog2E;
  float lse[2], delta[2];
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = block.first_row + static_cast<int>(threadIdx.x) / kWarp * kWarpRows + fragment_row(2 * r);
    const int64_t index = (block.batch * p.shape.kv_heads + block.head) * p.padded_rows + row;
    lse[r] = p.row_lse[index];
    delta[r] = p.row_delta[index];
    position[r] = block.position(row);
  }
  Fragments<1, kDim> dq = {};
  for (int i = 0; i < tiles.count; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    fetch(i + 1);
    Fragments<1, kKeyTile> weights = {}, ds = {};
    multiply_pair(shared, i, weights, ds);
    const int first_key = tiles.first_key(i);
#pragma unroll
    for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[0][j][e] = exp2_fast(weights[0][j][e] * scale - lse[e / 2]);
    }
    if (!visible.all(first_position, last_position, first_key, first_key + kKeyTile - 1)) {
#pragma unroll
      for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!visible.sees(position[e / 2], first_key + fragment_column(j, e))) weights[0][j][e] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[0][j][e] = weights[0][j][e] * (ds[0][j][e] - delta[e / 2]);
    }
    multiply_by_columns<kDim, kKeyTile, 1>(dq, ds, shared.passing(i));
  }
  cp_async_wait<0>();
  write_gradient<T, kDim>(
      shared.results(), dq, p.softmax_scale, block.rows(), p.rotary, block.batch,
      [&](int row) { return block.position(block.first_row + row); },
      [&](int row) { return block.at<T>(p.dq, block.first_row + row); });
}

}  // namespace

void segment_attention_bwd(const AttentionBackward& params, DType dtype, void* stream) {
  const AttentionShape& shape = params.shape;
  if (params.rotary.half > 0) rotate_queries_and_keys(params, dtype, stream);
  const int64_t units = shape.batch * shape.kv_heads;
  const int64_t row_tiles = params.padded_rows / kBlockRows, key_tiles = (shape.k_len + kBlockRows - 1) / kBlockRows;
  const char* error = with_instance(dtype, shape, [&](auto instance) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    constexpr size_t kBytes = BackwardShared<T, kDim>::kBytes;
    constexpr int kDeltaRows = kAttentionThreads / 8;
    const char* failure = launch(segment_attention_delta_kernel<T>, units * params.padded_rows / kDeltaRows,
                                 kAttentionThreads, 0, params, stream);
    if (!failure) {
      failure = launch(segment_attention_bwd_keys_kernel<T, kDim>, units * key_tiles, kAttentionThreads, kBytes, params,
                       stream);
    }
    if (!failure) {
      failure = launch(segment_attention_bwd_queries_kernel<T, kDim>, units * row_tiles, kAttentionThreads, kBytes,
                       params, stream);
    }
    return failure;
  });
  if (error) throw launch_error("segment_attention_bwd", shape, dtype, error);
}

}  // namespace hmt::cuda
