// segment_attention forward: one block for 128 rows of the queries of a key head, in one pass over the keys they see.
#include "attention.cuh"
#include "attention_host.h"

namespace hmt::cuda {
namespace {

constexpr int kTiles = 2;  // of 16 rows for each warp: what it loads of the keys and values serves both
constexpr int kForwardRows = kAttentionWarps * kTiles * kWarpRows;
constexpr int kForwardStages = 2;

// Keys of a tile: with 64 of them, the scores of wide heads would leave too few registers.
template <int kDim>
constexpr int kForwardKeys = kDim > 64 ? 32 : 64;

template <int kDim>
using Scores = Fragments<kTiles, kForwardKeys<kDim>>;

// Dynamic shared memory: the queries, and a ring of tiles of keys and of values; at the end it holds the results.
template <typename T, int kDim>
struct ForwardShared {
  static constexpr int kTile = kForwardKeys<kDim> * kPitch<kDim>;
  static constexpr size_t kBytes = (kForwardRows * kPitch<kDim> + 2 * kForwardStages * kTile) * sizeof(T);
  static_assert(kBytes <= kMaxSharedBytes, "every card has this much");
  static_assert(kForwardRows * kPitch<kDim> * sizeof(float) <= kBytes, "the results fit");

  T* q = reinterpret_cast<T*>(shared_memory());

  __device__ __forceinline__ T* k(int i) const {
    return q + kForwardRows * kPitch<kDim> + i % kForwardStages * 2 * kTile;
  }
  __device__ __forceinline__ T* v(int i) const { return k(i) + kTile; }
  __device__ __forceinline__ float* results() const { return reinterpret_cast<float*>(q); }
};

// The softmax of a thread's rows so far: the largest score and, over this thread's keys, the sum.
struct RowSoftmax {
  float max[kTiles][2], sum[kTiles][2];
};

// Scores become weights 2^(scale (score - max)), and what was summed before is rescaled to the new maximum.
template <int kDim>
__device__ __forceinline__ void add_scores(Scores<kDim>& scores, float scale, RowSoftmax& softmax,
                                           Fragments<kTiles, kDim>& out) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max_score = softmax.max[m][r];
#pragma unroll
      for (int j = 0; j < kForwardKeys<kDim> / 8; ++j) {
        max_score = fmaxf(max_score, fmaxf(scores[m][j][2 * r], scores[m][j][2 * r + 1]));
      }
      max_score = lanes_max<4>(max_score);
      const float base = max_score == -INFINITY ? 0.0f : max_score * scale;  // no key seen yet: all weights are 0
      const float rescale = exp2_fast(softmax.max[m][r] * scale - base);
      softmax.max[m][r] = max_score;
      softmax.sum[m][r] *= rescale;
#pragma unroll
      for (int j = 0; j < kForwardKeys<kDim> / 8; ++j) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          scores[m][j][e] = exp2_fast(scores[m][j][e] * scale - base);
          softmax.sum[m][r] += scores[m][j][e];
        }
      }
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        out[m][j][2 * r] *= rescale;
        out[m][j][2 * r + 1] *= rescale;
      }
    }
  }
}

template <int kDim>
__device__ __forceinline__ void hide_scores(Scores<kDim>& scores, const Visibility& visible, const QueryRows& rows,
                                            int first_row, int first_key) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = rows.position(first_row + m * kWarpRows + fragment_row(2 * r));
#pragma unroll
      for (int j = 0; j < kForwardKeys<kDim> / 8; ++j) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          if (!visible.sees(position, first_key + fragment_column(j, e))) scores[m][j][e] = -INFINITY;
        }
      }
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void write_results(const AttentionForward& p, const RowSoftmax& softmax, float scale,
                                              const Fragments<kTiles, kDim>& out, int warp_row, float* staging) {
  const RowBlock<kForwardRows> block(p.shape, p.group, not_hoisted(blockIdx.x));
  float factor[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = lanes_sum<4>(softmax.sum[m][r]);
      const bool empty = sum == 0.0f;  // no key is seen, or none with a score above -inf
      factor[m][r] = empty ? 0.0f : 1.0f / sum;
      const int row = block.first_row + warp_row + m * kWarpRows + fragment_row(2 * r);
      if (threadIdx.x % 4 == 0 && row <= block.last_row) {
        p.lse[block.index(p.shape, row)] = empty ? -INFINITY : softmax.max[m][r] * scale * kLn2 + logf(sum);
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  stage_product<kDim, kTiles>(staging, out, factor);
  __syncthreads();
  store_staged<kDim, T>(staging, block.rows(), [&](int row) { return block.at<T>(p.o, block.first_row + row); });
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2) segment_attention_fwd_kernel(const AttentionForward p) {
  constexpr int kKeys = kForwardKeys<kDim>;
  const RowBlock<kForwardRows> block(p.shape, p.group, blockIdx.x);
  const int first_position = block.position(block.first_row), last_position = block.position(block.last_row);
  const int keys = static_cast<int>(p.shape.k_len);
  const Visibility visible(p.mask, block.batch, keys);
  const KeyTiles<kKeys> tiles(visible, first_position, last_position, keys);
  const KeyRows<const T> k(p.rotary.half > 0 ? p.rotated_k : p.k, block.batch, block.head);
  const KeyRows<const T> v(p.v, block.batch, block.head);
  const ForwardShared<T, kDim> shared;

  const auto fetch = [&](int i) {
    if (i < tiles.count) {
      const int first_key = tiles.first_key(i);
      load_keys<kKeys, kDim>(shared.k(i), k, first_key, keys);
      load_keys<kKeys, kDim>(shared.v(i), v, first_key, keys);
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  load_queries<kForwardRows, kDim>(shared.q, block, p.q, block.first_row);
  cp_async_commit();
  fetch(0);
  // exp2 wants a positive factor: the sign of softmax_scale goes to the queries, and zero becomes next to nothing.
  const float scale = fmaxf(fabsf(p.softmax_scale) * kLog2E, 1e-30f);
  if (p.rotary.half > 0 || p.softmax_scale < 0.0f) {
    cp_async_wait<1>();
    __syncthreads();
  }
  if (p.softmax_scale < 0.0f) {
    negate_tile<kForwardRows, kDim>(shared.q);
    __syncthreads();
  }
  if (p.rotary.half > 0) {
    rotate_tile(shared.q, kPitch<kDim>, block.rows(), p.rotary, block.batch, 1.0f,
                [&](int row) { return block.position(block.first_row + row); });
  }

  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * kTiles * kWarpRows;
  const bool has_rows = block.first_row + warp_row <= block.last_row;
  RowSoftmax softmax = {{{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, {}};
  Fragments<kTiles, kDim> out = {};
  for (int i = 0; i < tiles.count; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    fetch(i + 1);
    if (!has_rows) continue;
    Scores<kDim> scores = {};
    multiply_by_rows<kDim, kKeys, kTiles>(scores, shared.k(i), [&](int m, int column, uint32_t (&a)[4]) {
      load_left<kDim>(a, shared.q + (warp_row + m * kWarpRows) * kPitch<kDim> + column);
    });
    const int first_key = tiles.first_key(i);
    if (!visible.all(first_position, last_position, first_key, first_key + kKeys - 1)) {
      hide_scores<kDim>(scores, visible, block, block.first_row + warp_row, first_key);
    }
    add_scores<kDim>(scores, scale, softmax, out);
    multiply_by_columns<kDim, kKeys, kTiles>(out, scores, shared.v(i));
  }
  write_results<T, kDim>(p, softmax, scale, out, warp_row, shared.results());
}

}  // namespace

void segment_attention_fwd(const AttentionForward& params, DType dtype, void* stream) {
  const AttentionShape& shape = params.shape;
  if (params.rotary.half > 0) rotate_keys(params, dtype, stream);
  const char* error = with_instance(dtype, shape, [&](auto instance) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    const int64_t rows = shape.q_len * params.group.size, tiles = (rows + kForwardRows - 1) / kForwardRows;
    return launch(segment_attention_fwd_kernel<T, kDim>, tiles * shape.kv_heads * shape.batch, kAttentionThreads,
                  ForwardShared<T, kDim>::kBytes, params, stream);
  });
  if (error) throw launch_error("segment_attention_fwd", shape, dtype, error);
}

}  // namespace hmt::cuda
