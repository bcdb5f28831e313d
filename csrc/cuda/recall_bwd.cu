// memory_recall backward with one read and one write of memory per group of queries: with p = softmax, delta = do . o -
// dlse and ds = scale * p * (do . M - delta), dM = p^T do + ds^T u and du = ds M. One launch, a second one for
// du where the rows are split.
#include "recall_reduce.cuh"

namespace hmt::cuda {
namespace {

// What a group of queries brings and gets, in this thread's columns. Lane q * kRows + r has the scalars of query q.
template <int kQueries>
struct Gradients {
  float query[kQueries][kColumns];
  float d_out[kQueries][kColumns];
  float d_query[kQueries][kColumns];
  float lane_lse, lane_d_lse;
  float lane_dot;                           // do . o, with o as it was rounded
  float sum_p[kQueries], sum_dp[kQueries];  // of p and of p * (do . M) over rows: together the exact do . o
};

template <typename T, int kQueries>
using BackwardShared = RecallSharedMemory<T, 2 * kQueries * kRows>;

template <typename T, int kQueries>
__device__ __forceinline__ void load_group(const RecallBackward& p, int64_t batch, int first_query, float* sums,
                                           Gradients<kQueries>& g) {
  const int queries = static_cast<int>(p.shape.queries), dim = static_cast<int>(p.shape.dim);
  float dots[kQueries] = {};
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int row = min(first_query + q, queries - 1);
    float out[kColumns];
    load_columns(row_of<T>(p.query, batch, row), dim, g.query[q]);
    load_columns(row_of<T>(p.d_recalled, batch, row), dim, g.d_out[q]);
    load_columns(row_of<T>(p.recalled, batch, row), dim, out);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      dots[q] += g.d_out[q][c] * out[c];
      g.d_query[q][c] = 0.0f;
    }
  }
  const BlockSums<kQueries> block_dots(dots, sums);
  const int lane_query = threadIdx.x % (kQueries * kRows) / kRows, row = first_query + lane_query;
  const bool present = row < queries;  // the last group may be short: an lse of infinity makes its p zero
  const int64_t at = batch * queries + row;
  g.lane_lse = present ? p.lse[at] : INFINITY;
  g.lane_d_lse = present && p.d_lse ? p.d_lse[at] : 0.0f;
  g.lane_dot = block_dots.total(lane_query);
}

// partial[0, q, r] = this thread's share of u_q . M_r, partial[1, q, r] of do_q . M_r.
template <typename T, int kQueries>
__device__ __forceinline__ void dot_tile(const T* tile, int rows, int dim, const Gradients<kQueries>& g,
                                         float (&partial)[2 * kQueries * kRows]) {
  for_each_vector<T>(dim, [&](int v, int first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      const Vector<T> m = load_vector(tile + r * dim + first);
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) {
        const int c = v * Vector<T>::kSize + e;
        const float x = to_float(m.element[e]);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          partial[q * kRows + r] += g.query[q][c] * x;
          partial[(kQueries + q) * kRows + r] += g.d_out[q][c] * x;
        }
      }
    }
  });
}

// Where the gradients of the rows of memory go, [rows, dim]: with several groups of queries, by way of a sum in
// float32.
template <typename T>
struct RowGradients {
  T* d_memory;
  float* sum;
  bool first_group, last_group;
};

template <typename T>
__device__ __forceinline__ void store_row_gradient(const RowGradients<T>& to, int64_t offset,
                                                   float (&x)[Vector<T>::kSize]) {
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; e += 4) {
    if (to.first_group) break;
    const Vector<float> sum = load_vector(to.sum + offset + e);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[e + i] += sum.element[i];
  }
  if (to.last_group) {
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) from_float(x[e], vector.element[e]);
    store_vector(to.d_memory + offset, vector);
    return;
  }
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; e += 4) {
    store_vector(to.sum + offset + e, Vector<float>{{x[e], x[e + 1], x[e + 2], x[e + 3]}});
  }
}

// dM_r = sum over q of p[q, r] do_q + ds[q, r] u_q, du_q += ds[q, r] M_r; lane q * kRows + r brings p and ds.
template <typename T, int kQueries>
__device__ __forceinline__ void add_tile(const T* tile, int first_row, int rows, int dim, float lane_p, float lane_ds,
                                         const RowGradients<T>& to, Gradients<kQueries>& g) {
#pragma unroll 2
  for (int r = 0; r < rows; ++r) {
    float p[kQueries], ds[kQueries];
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      p[q] = __shfl_sync(kWholeWarp, lane_p, q * kRows + r);
      ds[q] = __shfl_sync(kWholeWarp, lane_ds, q * kRows + r);
    }
    for_each_vector<T>(dim, [&](int v, int first) {
      const Vector<T> m = load_vector(tile + r * dim + first);
      float d_row[Vector<T>::kSize] = {};
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) {
        const int c = v * Vector<T>::kSize + e;
        const float x = to_float(m.element[e]);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          d_row[e] += p[q] * g.d_out[q][c] + ds[q] * g.query[q][c];
          g.d_query[q][c] += ds[q] * x;
        }
      }
      store_row_gradient(to, static_cast<int64_t>(first_row + r) * dim + first, d_row);
    });
  }
}

template <typename T, int kQueries>
__device__ __forceinline__ void backward_rows(RowStream<T>& stream, int dim, float scale,
                                              BackwardShared<T, kQueries>& shared, const RowGradients<T>& to,
                                              Gradients<kQueries>& g) {
  constexpr int kScores = kQueries * kRows;
  const int lane = threadIdx.x % kScores, lane_row = threadIdx.x % kRows;
  float lane_p = 0.0f, lane_dp = 0.0f;
  for (int t = 0; t < stream.tiles(); ++t) {
    const T* tile = stream.take(t);
    const int rows = stream.rows_in(t);
    float partial[2 * kScores] = {};
    dot_tile<T, kQueries>(tile, rows, dim, g, partial);
    const BlockSums<2 * kScores> dots(partial, shared.next_sums());
    const float p = lane_row < rows ? expf(dots.total(lane) * scale - g.lane_lse) : 0.0f;
    const float dp = lane_row < rows ? dots.total(kScores + lane) : 0.0f;
    lane_p += p;
    lane_dp += p * dp;
    const float ds = scale * p * ((dp - g.lane_dot) + g.lane_d_lse);  // in this order: dp and dot cancel
    add_tile<T, kQueries>(tile, stream.first_row(t), rows, dim, p, ds, to, g);
  }
  lane_p = lanes_sum<kRows>(lane_p);
  lane_dp = lanes_sum<kRows>(lane_dp);
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    g.sum_p[q] = __shfl_sync(kWholeWarp, lane_p, q * kRows);
    g.sum_dp[q] = __shfl_sync(kWholeWarp, lane_dp, q * kRows);
  }
}

template <int kQueries>
__device__ __forceinline__ void publish_gradients(const RecallPlan& plan, float* partials, int split,
                                                  const Gradients<kQueries>& g) {
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const float dot = __shfl_sync(kWholeWarp, g.lane_dot, q * kRows);
    float* partial = partial_of(plan, partials, split, q);
    store_partial(partial, g.d_query[q]);
    if (threadIdx.x == 0) {
      store_vector(partial + kColumns * blockDim.x, Vector<float>{{g.sum_p[q], g.sum_dp[q], dot, 0.0f}});
    }
  }
}

// The rows were weighted with a delta from the rounded o. By now the exact one is known, and sum p M = o: du needs so
// much of o more.
__device__ __forceinline__ float share_of_o(float softmax_scale, float dot, float sum_p, float sum_dp) {
  return sum_p > 0.0f ? softmax_scale * (dot - sum_dp / sum_p) : 0.0f;
}

template <typename T, int kQueries>
__device__ __forceinline__ void write_d_query(const RecallBackward& p, int64_t batch, int first_query,
                                              Gradients<kQueries>& g) {
  const int dim = static_cast<int>(p.shape.dim);
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const float dot = __shfl_sync(kWholeWarp, g.lane_dot, q * kRows);
    const int row = first_query + q;
    if (row >= p.shape.queries) continue;
    const float error = share_of_o(p.softmax_scale, dot, g.sum_p[q], g.sum_dp[q]);
    float out[kColumns];
    load_columns(row_of<T>(p.recalled, batch, row), dim, out);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) g.d_query[q][c] += error * out[c];
    store_columns(row_of<T>(p.d_query, batch, row), dim, g.d_query[q], 1.0f);
  }
}

template <typename T, int kQueries>
__global__ void __launch_bounds__(max_threads(kQueries), 1) memory_recall_bwd_kernel(const RecallBackward p) {
  const RecallPlan& plan = p.plan;
  const int split = blockIdx.x % plan.splits;
  const int64_t batch = blockIdx.x / plan.splits;
  const int dim = static_cast<int>(p.shape.dim), slots = static_cast<int>(p.shape.slots);
  BackwardShared<T, kQueries> shared(plan.tile_rows, dim);
  const int live = live_slots(p.num_valid, batch, slots);
  const Share rows = share(live, split, plan.splits);
  RowGradients<T> to = {row_of<T>(p.d_memory, batch, 0), nullptr, false, false};
  if (p.d_memory_sum) to.sum = p.d_memory_sum + batch * slots * dim;

  for (int group = 0; group < plan.groups; ++group) {
    const int first_query = group * kQueries;
    to.first_group = group == 0;
    to.last_group = group == plan.groups - 1;
    RowStream<T> stream(shared.ring, row_of<T>(p.memory, batch, 0), p.memory.row_stride, rows, plan.tile_rows, dim);
    stream.start();  // the copies are under way while the queries are read
    Gradients<kQueries> g;
    load_group<T, kQueries>(p, batch, first_query, shared.next_sums(), g);
    backward_rows<T, kQueries>(stream, dim, p.softmax_scale, shared, to, g);

    if (plan.splits > 1) {
      const int64_t unit = batch * plan.groups + group;
      publish_gradients(plan, p.workspace + unit * plan.unit_floats, split, g);
    } else {
      write_d_query<T, kQueries>(p, batch, first_query, g);
    }
  }

  const Share dead = share(slots - live, split, plan.splits);
  const float zeros[kColumns] = {};
  for (int row = dead.begin; row < dead.end; ++row) {
    store_columns(row_of<T>(p.d_memory, batch, live + row), dim, zeros, 1.0f);
  }
}

template <typename T>
__global__ void __launch_bounds__(kReduceWarps* kWarp) memory_recall_reduce_bwd_kernel(const RecallBackward p) {
  const RecallPlan& plan = p.plan;
  const Reduction at = this_reduction(p);
  if (at.row >= p.shape.queries) return;
  float sum_p = 0.0f, sum_dp = 0.0f;
  for (int split = threadIdx.x % kWarp; split < plan.splits; split += kWarp) {
    const Vector<float> stats = stats_of(plan, at, split);
    sum_p += stats.element[0];
    sum_dp += stats.element[1];
  }
  sum_p = lanes_sum<kWarp>(sum_p);
  sum_dp = lanes_sum<kWarp>(sum_dp);
  const float dot = stats_of(plan, at, 0).element[2];
  const float error = share_of_o(p.softmax_scale, dot, sum_p, sum_dp);
  Vector<float> d_query = reduce_columns(plan, at, [](int) { return 1.0f; });
  const int column = column_at<T>(plan, at.position);
  if (threadIdx.x < kWarp && column < p.shape.dim) {
    const T* out = row_of<T>(p.recalled, at.batch, at.row) + column;
#pragma unroll
    for (int i = 0; i < kReduceColumns; ++i) d_query.element[i] += error * to_float(out[i]);
    store_four(row_of<T>(p.d_query, at.batch, at.row) + column, d_query);
  }
}

template <typename T, int kQueries>
const char* launch_backward(const RecallBackward& p, void* stream) {
  const size_t shared_bytes = BackwardShared<T, kQueries>::bytes(p.plan, p.shape.dim);
  return launch_both(memory_recall_bwd_kernel<T, kQueries>, memory_recall_reduce_bwd_kernel<T>,
                     p.shape.batch * p.plan.splits, shared_bytes, p, stream);
}

}  // namespace

void memory_recall_bwd(const RecallBackward& params, DType dtype, void* stream) {
  const char* error = with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    return params.plan.group_size == 1 ? launch_backward<T, 1>(params, stream)
                                       : launch_backward<T, kBackwardGroup>(params, stream);
  });
  if (error) throw launch_error("memory_recall_bwd", params.shape, dtype, error);
}

}  // namespace hmt::cuda
