// memory_recall forward: recalled = softmax(scale * query memory^T) memory with every row of memory read once, and the
// recurrent step, which first puts a new memory into its slot. One launch, a second one where the rows are split.
#include "recall_reduce.cuh"

namespace hmt::cuda {
namespace {

// The softmax-weighted sum of some rows for kQueries queries: this thread's columns, and the rest in every thread.
template <int kQueries>
struct Recalled {
  float out[kQueries][kColumns];  // sum over rows of exp(score - max) * row
  float max[kQueries];
  float sum[kQueries];  // sum over rows of exp(score - max)
  int slot[kQueries];
};

template <typename T, int kQueries>
using ForwardShared = RecallSharedMemory<T, kQueries * kRows>;

// partial[q, r] = this thread's share of query q times row r of a tile.
template <typename T, int kQueries>
__device__ __forceinline__ void score_tile(const T* tile, int rows, int dim, const float (&query)[kQueries][kColumns],
                                           float (&partial)[kQueries * kRows]) {
  for_each_vector<T>(dim, [&](int v, int first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      const Vector<T> m = load_vector(tile + r * dim + first);
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) {
        const float x = to_float(m.element[e]);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) partial[q * kRows + r] += query[q][v * Vector<T>::kSize + e] * x;
      }
    }
  });
}

// out[q] = rescale[q] * out[q] + sum over r of p[q, r] * row r; lane q * kRows + r brings p[q, r] and rescale[q].
template <typename T, int kQueries>
__device__ __forceinline__ void add_tile(const T* tile, int rows, int dim, float lane_p, float lane_rescale,
                                         float (&out)[kQueries][kColumns]) {
  float p[kQueries][kRows];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const float rescale = __shfl_sync(kWholeWarp, lane_rescale, q * kRows);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[q][c] *= rescale;
#pragma unroll
    for (int r = 0; r < kRows; ++r) p[q][r] = __shfl_sync(kWholeWarp, lane_p, q * kRows + r);
  }
  for_each_vector<T>(dim, [&](int v, int first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      const Vector<T> m = load_vector(tile + r * dim + first);
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) {
        const float x = to_float(m.element[e]);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) out[q][v * Vector<T>::kSize + e] += p[q][r] * x;
      }
    }
  });
}

// Online softmax over the rows of a stream. Lane q * kRows + r follows query q over the rows r of all tiles.
template <typename T, int kQueries>
__device__ __forceinline__ void recall_rows(RowStream<T>& stream, int dim, const float (&query)[kQueries][kColumns],
                                            float scale, ForwardShared<T, kQueries>& shared,
                                            Recalled<kQueries>& result) {
  constexpr int kScores = kQueries * kRows;
  const int lane = threadIdx.x % kScores, lane_row = threadIdx.x % kRows;
  float max_score = -INFINITY, sum = 0.0f, best = -INFINITY;
  int slot = -1;
  for (int t = 0; t < stream.tiles(); ++t) {
    const T* tile = stream.take(t);
    const int rows = stream.rows_in(t);
    float partial[kScores] = {};
    score_tile<T, kQueries>(tile, rows, dim, query, partial);
    const BlockSums<kScores> dots(partial, shared.next_sums());
    const float score = lane_row < rows ? dots.total(lane) * scale : -INFINITY;
    const float new_max = fmaxf(max_score, lanes_max<kRows>(score));
    const float rescale = expf(max_score - new_max);  // 0 at the first tile
    const float p = expf(score - new_max);
    max_score = new_max;
    sum = sum * rescale + p;
    if (score > best) {
      best = score;
      slot = stream.first_row(t) + lane_row;
    }
    add_tile<T, kQueries>(tile, rows, dim, p, rescale, result.out);
  }
  sum = lanes_sum<kRows>(sum);
  lanes_strongest<kRows>(best, slot);
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    result.max[q] = __shfl_sync(kWholeWarp, max_score, q * kRows);
    result.sum[q] = __shfl_sync(kWholeWarp, sum, q * kRows);
    result.slot[q] = __shfl_sync(kWholeWarp, slot, q * kRows);
  }
}

template <int kQueries>
__device__ __forceinline__ void publish_recalled(const RecallPlan& plan, float* partials, int split,
                                                 const Recalled<kQueries>& result) {
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    float* partial = partial_of(plan, partials, split, q);
    store_partial(partial, result.out[q]);
    if (threadIdx.x == 0) {
      const float slot = __int_as_float(result.slot[q]);
      store_vector(partial + kColumns * blockDim.x, Vector<float>{{result.max[q], result.sum[q], slot, 0.0f}});
    }
  }
}

template <typename T, int kQueries>
__device__ __forceinline__ void write_recalled(const RecallForward& p, int64_t batch, int first_query,
                                               const Recalled<kQueries>& result) {
  const int queries = static_cast<int>(p.shape.queries), dim = static_cast<int>(p.shape.dim);
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int row = first_query + q;
    if (row >= queries) continue;
    const bool empty = result.slot[q] < 0 && result.sum[q] == 0.0f;
    const float factor = empty ? 0.0f : 1.0f / result.sum[q];
    store_columns(row_of<T>(p.recalled, batch, row), dim, result.out[q], factor);
    if (p.recalled_copy.data) store_columns(row_of<T>(p.recalled_copy, batch, row), dim, result.out[q], factor);
    if (threadIdx.x == 0) {
      p.lse[batch * queries + row] = empty ? -INFINITY : result.max[q] + logf(result.sum[q]);
      p.slot[batch * queries + row] = result.slot[q];
    }
  }
}

template <typename T, int kQueries>
__global__ void __launch_bounds__(max_threads(kQueries), 1) memory_recall_fwd_kernel(const RecallForward p) {
  const RecallPlan& plan = p.plan;
  // Neighbouring blocks take other queries over the same rows, which they then find in the L2 cache.
  const int group = blockIdx.x % plan.groups, split = blockIdx.x / plan.groups % plan.splits;
  const int64_t batch = blockIdx.x / plan.groups / plan.splits, unit = batch * plan.groups + group;
  const int dim = static_cast<int>(p.shape.dim), slots = static_cast<int>(p.shape.slots);
  ForwardShared<T, kQueries> shared(plan.tile_rows, dim);

  const Share rows = share(live_slots(p.num_valid, batch, slots), split, plan.splits);
  RowStream<T> stream(shared.ring, row_of<T>(p.memory, batch, 0), p.memory.row_stride, rows, plan.tile_rows, dim);
  const T* new_row = p.new_memory.data ? row_of<T>(p.new_memory, batch, 0) : nullptr;
  const int new_slot = new_row ? p.slot_index[batch] : -1;
  stream.replace(new_slot, new_row);  // so that no block waits for the one that writes the row
  stream.start();                     // the copies are under way while the queries are read
  if (split == 0 && new_slot >= 0 && new_slot < slots) {
    T* row = row_of<T>(p.memory, batch, new_slot);
    for_each_vector<T>(dim, [&](int, int first) { store_vector(row + first, load_vector(new_row + first)); });
  }

  float query[kQueries][kColumns] = {};
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int row = group * kQueries + q;
    if (row < p.shape.queries) load_columns(row_of<T>(p.query, batch, row), dim, query[q]);
  }
  Recalled<kQueries> result = {};
  recall_rows<T, kQueries>(stream, dim, query, p.softmax_scale, shared, result);

  if (plan.splits > 1) {
    publish_recalled(plan, p.workspace + unit * plan.unit_floats, split, result);
  } else {
    write_recalled<T, kQueries>(p, batch, group * kQueries, result);
  }
}

template <typename T>
__global__ void __launch_bounds__(kReduceWarps* kWarp) memory_recall_reduce_fwd_kernel(const RecallForward p) {
  const RecallPlan& plan = p.plan;
  const Reduction at = this_reduction(p);
  if (at.row >= p.shape.queries) return;
  const int lane = threadIdx.x % kWarp;
  float best = -INFINITY, sum = 0.0f;
  int slot = -1;
  for (int split = lane; split < plan.splits; split += kWarp) {
    const Vector<float> stats = stats_of(plan, at, split);
    if (stats.element[0] > best) {
      best = stats.element[0];
      slot = __float_as_int(stats.element[2]);
    }
  }
  const float max = lanes_max<kWarp>(best);
  const auto weight = [&](const Vector<float>& stats) {
    return stats.element[0] == -INFINITY ? 0.0f : expf(stats.element[0] - max);
  };
  for (int split = lane; split < plan.splits; split += kWarp) {
    const Vector<float> stats = stats_of(plan, at, split);
    sum += weight(stats) * stats.element[1];
  }
  sum = lanes_sum<kWarp>(sum);
  lanes_strongest<kWarp>(best, slot);

  Vector<float> out = reduce_columns(plan, at, [&](int split) { return weight(stats_of(plan, at, split)); });
  const int column = column_at<T>(plan, at.position);
  const bool empty = slot < 0 && sum == 0.0f;
  const float factor = empty ? 0.0f : 1.0f / sum;
  if (threadIdx.x < kWarp && column < p.shape.dim) {
#pragma unroll
    for (int i = 0; i < kReduceColumns; ++i) out.element[i] *= factor;
    store_four(row_of<T>(p.recalled, at.batch, at.row) + column, out);
    if (p.recalled_copy.data) store_four(row_of<T>(p.recalled_copy, at.batch, at.row) + column, out);
  }
  if (threadIdx.x == 0 && at.chunk == 0) {
    p.lse[at.batch * p.shape.queries + at.row] = empty ? -INFINITY : max + logf(sum);
    p.slot[at.batch * p.shape.queries + at.row] = slot;
  }
}

template <typename T, int kQueries>
const char* launch_forward(const RecallForward& p, void* stream) {
  const size_t shared_bytes = ForwardShared<T, kQueries>::bytes(p.plan, p.shape.dim);
  return launch_both(memory_recall_fwd_kernel<T, kQueries>, memory_recall_reduce_fwd_kernel<T>,
                     p.plan.units * p.plan.splits, shared_bytes, p, stream);
}

}  // namespace

void memory_recall_fwd(const RecallForward& params, DType dtype, void* stream) {
  const char* error = with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    return params.plan.group_size == 1 ? launch_forward<T, 1>(params, stream)
                                       : launch_forward<T, kForwardGroup>(params, stream);
  });
  if (error) throw launch_error("memory_recall_fwd", params.shape, dtype, error);
}

}  // namespace hmt::cuda
