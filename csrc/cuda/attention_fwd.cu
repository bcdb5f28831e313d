// segment_attention forward: one block for 64 rows of the queries of a key head, in one pass over the keys they see.
#include "attention.cuh"
#include "attention_host.h"

namespace hmt::cuda {
namespace {

constexpr int kForwardKeys = 64;  // of a tile
constexpr int kForwardStages = 2;

// Dynamic shared memory: a ring of tiles of keys and of values. Before the second of them comes its place holds the
// queries, which a thread then has in registers; at the end the ring holds the results.
template <typename T, int kDim>
struct ForwardShared {
  static constexpr int kTile = kForwardKeys * kPitch<kDim>;
  static constexpr size_t kBytes = 2 * kForwardStages * kTile * sizeof(T);
  static_assert(kBytes <= kMaxSharedBytes, "every card has this much");
  static_assert(kBlockRows == kForwardKeys && 2 * sizeof(T) == sizeof(float), "queries and results fit");

  __device__ __forceinline__ T* k(int tile) const {
    return reinterpret_cast<T*>(shared_memory()) + tile % kForwardStages * 2 * kTile;
  }
  __device__ __forceinline__ T* v(int tile) const { return k(tile) + kTile; }
  __device__ __forceinline__ T* q() const { return k(1); }
  __device__ __forceinline__ float* results() const { return reinterpret_cast<float*>(k(0)); }
};

// The softmax of a thread's two rows so far: the largest score and, over this thread's keys, the sum.
struct RowSoftmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

// Scores become weights 2^(scale (score - max)), and what was summed before is rescaled to the new maximum.
template <int kDim>
__device__ __forceinline__ void add_scores(float (&scores)[kForwardKeys / 8][4], float scale, RowSoftmax& softmax,
                                           float (&out)[kDim / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max_score = softmax.max[r];
#pragma unroll
    for (int j = 0; j < kForwardKeys / 8; ++j)
      max_score = fmaxf(max_score, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    max_score = lanes_max<4>(max_score);
    const float base = max_score == -INFINITY ? 0.0f : max_score * scale;  // no key seen yet: all weights are 0
    const float rescale = exp2_fast(softmax.max[r] * scale - base);
    softmax.max[r] = max_score;
    softmax.sum[r] *= rescale;
#pragma unroll
    for (int j = 0; j < kForwardKeys / 8; ++j) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        scores[j][e] = exp2_fast(scores[j][e] * scale - base);
        softmax.sum[r] += scores[j][e];
      }
    }
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      out[j][2 * r] *= rescale;
      out[j][2 * r + 1] *= rescale;
    }
  }
}

__device__ __forceinline__ void hide_scores(float (&scores)[kForwardKeys / 8][4], const Visibility& visible,
                                            const int (&position)[2], int first_key) {
#pragma unroll
  for (int j = 0; j < kForwardKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!visible.sees(position[e / 2], first_key + fragment_column(j, e))) scores[j][e] = -INFINITY;
    }
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2) segment_attention_fwd_kernel(const AttentionForward p) {
  const int heads = static_cast<int>(p.shape.kv_heads), keys = static_cast<int>(p.shape.k_len);
  const int64_t head = blockIdx.x % heads, batch = blockIdx.x / heads % p.shape.batch;
  // The last rows see the most keys: they come first.
  const int tile = static_cast<int>(gridDim.x / heads / p.shape.batch - 1 - blockIdx.x / heads / p.shape.batch);
  const QueryRows rows(p.shape, p.group, batch, head);
  const int first_row = tile * kBlockRows, last_row = min(first_row + kBlockRows, rows.count) - 1;
  const int first_position = rows.position(first_row), last_position = rows.position(last_row);
  const Visibility visible(p.mask, batch, keys);
  const KeyTiles<kForwardKeys> tiles(visible, first_position, last_position, keys);
  const Heads& k = p.rotary.half > 0 ? p.rotated_k : p.k;
  const ForwardShared<T, kDim> shared;

  const auto fetch = [&](int i) {
    if (i < tiles.count) {
      const int first_key = tiles.first_key(i);
      load_tile<kForwardKeys, kDim>(shared.k(i), first_key, keys,
                                    [&](int key) { return key_row<const T>(k, batch, head, key); });
      load_tile<kForwardKeys, kDim>(shared.v(i), first_key, keys,
                                    [&](int key) { return key_row<const T>(p.v, batch, head, key); });
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  load_tile<kBlockRows, kDim>(shared.q(), first_row, rows.count, [&](int row) { return rows.at<const T>(p.q, row); });
  cp_async_commit();
  fetch(0);
  cp_async_wait<1>();
  __syncthreads();
  if (p.rotary.half > 0) {
    rotate_tile(shared.q(), kPitch<kDim>, last_row - first_row + 1, p.rotary, batch, 1.0f,
                [&](int row) { return rows.position(first_row + row); });
    __syncthreads();
  }

  const int warp_row = threadIdx.x / kWarp * kWarpRows;
  const int thread_row[2] = {first_row + warp_row + fragment_row(0), first_row + warp_row + fragment_row(2)};
  const int position[2] = {rows.position(thread_row[0]), rows.position(thread_row[1])};
  // exp2 wants a positive factor: the sign of softmax_scale goes to the queries, and zero becomes next to nothing.
  const float scale = fmaxf(fabsf(p.softmax_scale) * kLog2E, 1e-30f);
  const uint32_t sign = p.softmax_scale < 0.0f ? 0x80008000u : 0u;
  uint32_t query[kDim / 16][4];
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    load_left<kDim>(query[i], shared.q() + warp_row * kPitch<kDim> + i * 16);
#pragma unroll
    for (int e = 0; e < 4; ++e) query[i][e] ^= sign;
  }

  RowSoftmax softmax;
  float out[kDim / 8][4] = {};
  for (int i = 0; i < tiles.count; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    fetch(i + 1);
    float scores[kForwardKeys / 8][4] = {};
    multiply_by_rows<kDim, kForwardKeys>(scores, shared.k(i), [&](int column, uint32_t (&a)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = query[column / 16][e];
    });
    const int first_key = tiles.first_key(i);
    if (!visible.all(first_position, last_position, first_key, first_key + kForwardKeys - 1)) {
      hide_scores(scores, visible, position, first_key);
    }
    add_scores<kDim>(scores, scale, softmax, out);
    multiply_by_columns<kDim, kForwardKeys>(out, scores, shared.v(i));
  }

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = lanes_sum<4>(softmax.sum[r]);
    factor[r] = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (threadIdx.x % 4 == 0 && thread_row[r] < rows.count) {
      p.lse[rows.index(p.shape, thread_row[r])] = sum > 0.0f ? softmax.max[r] * scale * kLn2 + logf(sum) : -INFINITY;
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  stage_product<kDim>(shared.results(), out, factor);
  __syncthreads();
  store_staged<kDim, T>(shared.results(), last_row - first_row + 1,
                        [&](int row) { return rows.at<T>(p.o, first_row + row); });
}

}  // namespace

void segment_attention_fwd(const AttentionForward& params, DType dtype, void* stream) {
  const AttentionShape& shape = params.shape;
  if (params.rotary.half > 0) rotate_keys(params, dtype, stream);
  const char* error = with_instance(dtype, shape, [&](auto instance) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    const int64_t blocks = padded_rows(shape) / kBlockRows * shape.kv_heads * shape.batch;
    return launch(segment_attention_fwd_kernel<T, kDim>, blocks, kAttentionThreads, ForwardShared<T, kDim>::kBytes,
                  params, stream);
  });
  if (error) throw launch_error("segment_attention_fwd", shape, dtype, error);
}

}  // namespace hmt::cuda
