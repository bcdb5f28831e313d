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

  T* staying = reinterpret_cast<T*>(shared_memory());

  __device__ __forceinline__ T* passing(int i) const {
    return staying + 2 * kStayingTile + i % kStages * 2 * kPassingTile;
  }
  __device__ __forceinline__ float* lse(int i) const {
    return reinterpret_cast<float*>(staying + kTiles) + i % kStages * 2 * kPassing<kDim>;
  }
  __device__ __forceinline__ float* delta(int i) const { return lse(i) + kPassing<kDim>; }
  __device__ __forceinline__ float* results() const { return reinterpret_cast<float*>(staying); }
};

// row_lse and row_delta, for the other two kernels; eight threads for a row.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) segment_attention_delta_kernel(const AttentionBackward p) {
  constexpr int kLanes = 8;
  const int64_t all = blockIdx.x * static_cast<int64_t>(kAttentionThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t unit = all / p.padded_rows;
  const int row = static_cast<int>(all % p.padded_rows), dim = static_cast<int>(p.shape.dim);
  const QueryRows rows(p.shape, p.group, unit / p.shape.kv_heads, unit % p.shape.kv_heads);
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

// scores and dp of the warp's 16 staying rows with all passing rows.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_pair(const T* staying, const T* passing,
                                              float (&scores)[kPassing<kDim> / 8][4],
                                              float (&dp)[kPassing<kDim> / 8][4]) {
  using Shared = BackwardShared<T, kDim>;
  const T* warp_rows = staying + threadIdx.x / kWarp * kWarpRows * kPitch<kDim>;
  multiply_by_rows<kDim, kPassing<kDim>>(scores, passing,
                                         [&](int column, uint32_t (&a)[4]) { load_left<kDim>(a, warp_rows + column); });
  multiply_by_rows<kDim, kPassing<kDim>>(dp, passing + Shared::kPassingTile, [&](int column, uint32_t (&a)[4]) {
    load_left<kDim>(a, warp_rows + Shared::kStayingTile + column);
  });
}

// Writes factor * product through shared memory, turned back where it is a gradient of what was rotated.
template <typename T, int kDim, typename Position, typename RowAt>
__device__ __forceinline__ void write_gradient(float* staging, const float (&product)[kDim / 8][4], float factor,
                                               int rows, const Rotary& rotary, int64_t batch, Position position,
                                               RowAt row_at) {
  __syncthreads();
  stage_product<kDim>(staging, product, {factor, factor});
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
  const int heads = static_cast<int>(p.shape.kv_heads), keys = static_cast<int>(p.shape.k_len);
  const int64_t head = blockIdx.x % heads, batch = blockIdx.x / heads % p.shape.batch;
  // The first keys are seen by the most rows: they come first.
  const int first_key = static_cast<int>(blockIdx.x / heads / p.shape.batch) * kBlockRows;
  const int last_key = min(first_key + kBlockRows, keys) - 1;
  const QueryRows rows(p.shape, p.group, batch, head);
  const Visibility visible(p.mask, batch, keys);
  const Heads& q = p.rotary.half > 0 ? p.rotated_q : p.q;
  const Heads& k = p.rotary.half > 0 ? p.rotated_k : p.k;
  const float* row_lse = p.row_lse + (batch * heads + head) * p.padded_rows;
  const float* row_delta = p.row_delta + (batch * heads + head) * p.padded_rows;
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
      T* tile = shared.passing(i);
      load_tile<kRowTile, kDim>(tile, first, rows.count, [&](int row) { return rows.at<const T>(q, row); });
      load_tile<kRowTile, kDim>(tile + BackwardShared<T, kDim>::kPassingTile, first, rows.count,
                                [&](int row) { return rows.at<const T>(p.d_o, row); });
      const int part = threadIdx.x * 4;
      if (part < kRowTile) {
        cp_async16(shared.lse(i) + part, row_lse + first + part);
        cp_async16(shared.delta(i) + part, row_delta + first + part);
      }
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  load_tile<kBlockRows, kDim>(shared.staying, first_key, keys,
                              [&](int key) { return key_row<const T>(k, batch, head, key); });
  load_tile<kBlockRows, kDim>(shared.staying + BackwardShared<T, kDim>::kStayingTile, first_key, keys,
                              [&](int key) { return key_row<const T>(p.v, batch, head, key); });
  fetch(0);

  const float scale = p.softmax_scale * kLog2E;
  const int thread_key = first_key + threadIdx.x / kWarp * kWarpRows;
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  for (int i = 0; i < tiles; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    fetch(i + 1);
    float weights[kRowTile / 8][4] = {}, ds[kRowTile / 8][4] = {};
    multiply_pair<T, kDim>(shared.staying, shared.passing(i), weights, ds);
    const int first = (first_tile + i) * kRowTile, last = min(first + kRowTile, rows.count) - 1;
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[j][e] = exp2_fast(weights[j][e] * scale - shared.lse(i)[fragment_column(j, e)]);
      }
    }
    if (!visible.all(rows.position(first), rows.position(last), first_key, first_key + kBlockRows - 1)) {
#pragma unroll
      for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int position = rows.position(first + fragment_column(j, e));
          if (!visible.sees(position, thread_key + fragment_row(e))) weights[j][e] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[j][e] = weights[j][e] * (ds[j][e] - shared.delta(i)[fragment_column(j, e)]);
    }
    multiply_by_columns<kDim, kRowTile>(dv, weights, shared.passing(i) + BackwardShared<T, kDim>::kPassingTile);
    multiply_by_columns<kDim, kRowTile>(dk, ds, shared.passing(i));
  }
  cp_async_wait<0>();
  const int count = last_key - first_key + 1;
  const auto position = [&](int row) { return first_key + row; };
  write_gradient<T, kDim>(shared.results(), dk, p.softmax_scale, count, p.rotary, batch, position,
                          [&](int row) { return key_row<T>(p.dk, batch, head, first_key + row); });
  write_gradient<T, kDim>(shared.results(), dv, 1.0f, count, Rotary(), batch, position,
                          [&](int row) { return key_row<T>(p.dv, batch, head, first_key + row); });
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    segment_attention_bwd_queries_kernel(const AttentionBackward p) {
  constexpr int kKeyTile = kPassing<kDim>;
  const int heads = static_cast<int>(p.shape.kv_heads), keys = static_cast<int>(p.shape.k_len);
  const int64_t head = blockIdx.x % heads, batch = blockIdx.x / heads % p.shape.batch;
  // The last rows see the most keys: they come first.
  const int tile = static_cast<int>(gridDim.x / heads / p.shape.batch - 1 - blockIdx.x / heads / p.shape.batch);
  const QueryRows rows(p.shape, p.group, batch, head);
  const int first_row = tile * kBlockRows, last_row = min(first_row + kBlockRows, rows.count) - 1;
  const int first_position = rows.position(first_row), last_position = rows.position(last_row);
  const Visibility visible(p.mask, batch, keys);
  const KeyTiles<kKeyTile> tiles(visible, first_position, last_position, keys);
  const Heads& q = p.rotary.half > 0 ? p.rotated_q : p.q;
  const Heads& k = p.rotary.half > 0 ? p.rotated_k : p.k;
  const BackwardShared<T, kDim> shared;

  const auto fetch = [&](int i) {
    if (i < tiles.count) {
      const int first_key = tiles.first_key(i);
      T* tile = shared.passing(i);
      load_tile<kKeyTile, kDim>(tile, first_key, keys, [&](int key) { return key_row<const T>(k, batch, head, key); });
      load_tile<kKeyTile, kDim>(tile + BackwardShared<T, kDim>::kPassingTile, first_key, keys,
                                [&](int key) { return key_row<const T>(p.v, batch, head, key); });
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  load_tile<kBlockRows, kDim>(shared.staying, first_row, rows.count, [&](int row) { return rows.at<const T>(q, row); });
  load_tile<kBlockRows, kDim>(shared.staying + BackwardShared<T, kDim>::kStayingTile, first_row, rows.count,
                              [&](int row) { return rows.at<const T>(p.d_o, row); });
  fetch(0);

  const float scale = p.softmax_scale * kLog2E;
  float lse[2], delta[2];
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + static_cast<int>(threadIdx.x) / kWarp * kWarpRows + fragment_row(2 * r);
    const int64_t index = (batch * heads + head) * p.padded_rows + row;
    lse[r] = p.row_lse[index];
    delta[r] = p.row_delta[index];
    position[r] = rows.position(row);
  }
  float dq[kDim / 8][4] = {};
  for (int i = 0; i < tiles.count; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    fetch(i + 1);
    float weights[kKeyTile / 8][4] = {}, ds[kKeyTile / 8][4] = {};
    multiply_pair<T, kDim>(shared.staying, shared.passing(i), weights, ds);
    const int first_key = tiles.first_key(i);
#pragma unroll
    for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[j][e] = exp2_fast(weights[j][e] * scale - lse[e / 2]);
    }
    if (!visible.all(first_position, last_position, first_key, first_key + kKeyTile - 1)) {
#pragma unroll
      for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!visible.sees(position[e / 2], first_key + fragment_column(j, e))) weights[j][e] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[j][e] = weights[j][e] * (ds[j][e] - delta[e / 2]);
    }
    multiply_by_columns<kDim, kKeyTile>(dq, ds, shared.passing(i));
  }
  cp_async_wait<0>();
  write_gradient<T, kDim>(
      shared.results(), dq, p.softmax_scale, last_row - first_row + 1, p.rotary, batch,
      [&](int row) { return rows.position(first_row + row); },
      [&](int row) { return rows.at<T>(p.dq, first_row + row); });
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
