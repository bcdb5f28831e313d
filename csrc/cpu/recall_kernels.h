// The kernels of memory_recall over the vectors of one instruction set; see vectors.h for how it is included.
// Each row of memory comes from main memory once: for its scores, and while still in cache for the weighted sum.
#pragma once

#include <cmath>

#include "recall.h"
#include "vectors.h"

namespace hmt::cpu {
namespace {

constexpr int kRows = kSlotBlock;                 // of memory, handled together
constexpr int kGroup = 4;                         // queries that share the widening of those rows
constexpr int kWriteRows = kLanes == 16 ? 4 : 2;  // rows of d_memory that fit into registers

template <class E>
using Row = const typename E::Element*;

template <class E>
typename E::Element* row_of(const Rows& rows, int64_t b, int64_t i) {
  return static_cast<typename E::Element*>(rows.data) + b * rows.batch_stride + i * rows.row_stride;
}

// Slots n, ..., n + kRows - 1 of a queue, of which `count` lie before the end; the others repeat the last one.
template <class E>
struct RowBlock {
  Row<E> row[kRows];
  int64_t to_next;  // elements to the block after this one, which is prefetched
  int count;
};

template <class E>
RowBlock<E> row_block(const Rows& memory, int64_t b, int64_t n, int64_t end) {
  RowBlock<E> rows;
  rows.to_next = kRows * memory.row_stride;
  rows.count = static_cast<int>(std::min<int64_t>(kRows, end - n));
  for (int r = 0; r < kRows; ++r) rows.row[r] = row_of<E>(memory, b, std::min(n + r, end - 1));
  return rows;
}

// products[i][r] = x[i] . row[r]
template <class E, int kCount>
void dot_rows(const Row<E> (&x)[kCount], const RowBlock<E>& rows, int64_t dim, float (&products)[kCount][kRows]) {
  f32 sums[kCount][kRows] = {};
  for_each_block(dim, [&](int64_t k, auto part) HMT_INLINE {
    typename E::Block blocks[kCount];
    for (int i = 0; i < kCount; ++i) blocks[i] = load<E>(x[i] + k, part);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename E::Block block = load<E>(rows.row[r] + k, part);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sums[i][r] = E::dot(sums[i][r], blocks[i], block);
    }
  });
  for (int i = 0; i < kCount; ++i) {
    for (int r = 0; r < kRows; ++r) products[i][r] = sum(sums[i][r]);
  }
}

template <class E>
inline void prefetch(Row<E> from) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (size_t i = 0; i < kBlock * sizeof *from; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// What a block of rows weighs for one query, and what all rows before it weigh from now on.
struct Weights {
  float rows[kRows];
  float before;
};

// partial[i] = weights[i].before partial[i] + sum over r of weights[i].rows[r] row[r]
template <class E, int kCount>
void add_rows(const RowBlock<E>& rows, const Weights (&weights)[kCount], int64_t dim, float* partial, int64_t stride) {
  for_each_block(dim, [&](int64_t k, auto part) HMT_INLINE {
    Pair sums[kCount];
    for (int i = 0; i < kCount; ++i) sums[i] = scale(weights[i].before, load_pair(partial + i * stride + k));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      prefetch<E>(rows.row[r] + rows.to_next + k);
      const Pair x = E::widen(load<E>(rows.row[r] + k, part));
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sums[i] = multiply_add(weights[i].rows[r], x, sums[i]);
    }
    for (int i = 0; i < kCount; ++i) store_pair(partial + i * stride + k, sums[i]);
  });
}

// x = exp(x - base) in the first `count` rows, zero in the others.
inline void exp_rows(float (&x)[kRows], float base, int count) {
  constexpr int kSize = kRows > kLanes ? kRows : kLanes;
  float rows[kSize];
  for (int r = 0; r < kSize; ++r) rows[r] = r < kRows && r < count ? x[r] - base : -INFINITY;
  for (int r = 0; r < kSize; r += kLanes) store_vector(rows + r, exp_of_negative(load_vector<f32>(rows + r)));
  std::memcpy(x, rows, sizeof x);
}

// The weights exp(score - max) of rows with these products, under the running maximum.
inline Weights weigh(const float (&products)[kRows], int count, int64_t first_slot, float softmax_scale,
                     Softmax& softmax) {
  Weights weights;
  const float old_max = softmax.max;
  for (int r = 0; r < kRows; ++r) {
    weights.rows[r] = products[r] * softmax_scale;
    if (r < count && weights.rows[r] > softmax.max) {
      softmax.max = weights.rows[r];
      softmax.slot = first_slot + r;
    }
  }
  const float base = softmax.max == -INFINITY ? 0.0f : softmax.max;  // -inf - -inf would be NaN
  weights.before = softmax.max == old_max ? 1.0f : expf(old_max - base);
  exp_rows(weights.rows, base, count);
  softmax.sum *= weights.before;
  for (const float weight : weights.rows) softmax.sum += weight;
  return weights;
}

template <class E, int kCount>
void forward_rows(const Recall& p, const RowBlock<E>& rows, int64_t b, int64_t n, int64_t q, float* partial,
                  Softmax* softmax) {
  const int64_t stride = scratch_stride(p.dim);
  Row<E> query[kCount];
  for (int i = 0; i < kCount; ++i) query[i] = row_of<E>(p.query, b, q + i);
  float products[kCount][kRows];
  dot_rows<E>(query, rows, p.dim, products);
  Weights weights[kCount];
  for (int i = 0; i < kCount; ++i) weights[i] = weigh(products[i], rows.count, n, p.softmax_scale, softmax[q + i]);
  add_rows<E>(rows, weights, p.dim, partial + q * stride, stride);
}

// add_rows of kRows rows and dot_rows of the kRows after them, for one query, in one loop: loads of one hide behind the
// arithmetic of the other. The second runs kAheadBytes further on in its rows, since rows that lie a multiple of 4 KB
// apart share one set of the L1 cache.
constexpr int64_t kAheadBytes = 1984;

template <class E>
void add_and_dot_rows(Row<E> rows, int64_t row_stride, const Weights& weights, Row<E> x, int64_t dim, float* partial,
                      float (&products)[kRows]) {
  constexpr int64_t kAhead = kAheadBytes / (kBlock * sizeof(*rows)) * kBlock;
  const int64_t whole = dim / kBlock * kBlock;
  const Row<E> next = rows + kRows * row_stride;
  f32 sums[kRows] = {};
  const auto step = [&](int64_t k, int64_t ahead, auto part) HMT_INLINE {
    const typename E::Block block = load<E>(x + ahead, part);
    Pair total = scale(weights.before, load_pair(partial + k));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r] = E::dot(sums[r], block, load<E>(next + r * row_stride + ahead, part));
      total = multiply_add(weights.rows[r], E::widen(load<E>(rows + r * row_stride + k, part)), total);
    }
    store_pair(partial + k, total);
  };
  for (int64_t k = 0, ahead = kAhead < whole ? kAhead : 0; k < whole; k += kBlock) {
    step(k, ahead, Whole());
    ahead = ahead + kBlock < whole ? ahead + kBlock : 0;
  }
  if (whole < dim) step(whole, whole, Part{dim - whole});
  for (int r = 0; r < kRows; ++r) products[r] = sum(sums[r]);
}

template <class E>
void forward_one(const Recall& p, int64_t b, int64_t begin, int64_t end, float* partial, Softmax& softmax) {
  const Row<E> query = row_of<E>(p.query, b, 0);
  float products[1][kRows];
  for (int64_t n = begin; n < end; n += kRows) {
    const auto rows = row_block<E>(p.memory, b, n, end);
    if (n == begin || rows.count < kRows) dot_rows<E, 1>({query}, rows, p.dim, products);
    const Weights weights = weigh(products[0], rows.count, n, p.softmax_scale, softmax);
    if (n + 2 * kRows <= end) {
      add_and_dot_rows<E>(rows.row[0], p.memory.row_stride, weights, query, p.dim, partial, products[0]);
    } else {
      add_rows<E, 1>(rows, {weights}, p.dim, partial, scratch_stride(p.dim));
    }
  }
}

template <class E>
void forward(const Recall& p, int64_t b, int64_t begin, int64_t end, float* partial, Softmax* result) {
  std::memset(partial, 0, p.queries * scratch_stride(p.dim) * sizeof *partial);
  Softmax softmax[kMaxQueries];  // the results of other chunks stand in the same cache line as these
  for (int64_t q = 0; q < p.queries; ++q) softmax[q] = {-INFINITY, 0.0f, begin};
  if (kLanes == 16 && p.queries == 1) {  // with fewer registers the fused loop spills
    forward_one<E>(p, b, begin, end, partial, softmax[0]);
  } else {
    for (int64_t n = begin; n < end; n += kRows) {
      const auto rows = row_block<E>(p.memory, b, n, end);
      int64_t q = 0;
      for (; q + kGroup <= p.queries; q += kGroup) forward_rows<E, kGroup>(p, rows, b, n, q, partial, softmax);
      for (; q < p.queries; ++q) forward_rows<E, 1>(p, rows, b, n, q, partial, softmax);
    }
  }
  std::memcpy(result, softmax, p.queries * sizeof *softmax);
}

template <class E>
float dot(Row<E> x, Row<E> y, int64_t dim) {
  f32 products = {};
  for_each_block(dim, [&](int64_t k, auto part)
                          HMT_INLINE { products = E::dot(products, load<E>(x + k, part), load<E>(y + k, part)); });
  return sum(products);
}

// What the backward pass knows of every query of a queue, and its weights for the rows at hand.
template <class E>
struct Queries {
  Row<E> query[kMaxQueries], d_recalled[kMaxQueries];
  float delta[kMaxQueries], d_lse[kMaxQueries];
  float p[kMaxQueries][kRows], ds[kMaxQueries][kRows];  // ds: of the product, that is with softmax_scale
  float excess[kMaxQueries] = {};                       // sum of p (do . M - delta), which is zero but for rounding
};

// d_memory of kWriteRows rows from `first` on, and their share of partial; kOne: there is one query only.
template <class E, bool kOne>
void write_rows(const Recall& p, const Queries<E>& queries, const RowBlock<E>& rows, int first,
                typename E::Element* const (&d_row)[kRows], float* partial) {
  const int64_t count = kOne ? 1 : p.queries, stride = scratch_stride(p.dim);
  for_each_block(p.dim, [&](int64_t k, auto part) HMT_INLINE {
    Pair x[kWriteRows], dx[kWriteRows] = {};
    for (int r = 0; r < kWriteRows; ++r) {
      prefetch<E>(rows.row[first + r] + rows.to_next + k);
      x[r] = E::widen(load<E>(rows.row[first + r] + k, part));
    }
    for (int64_t q = 0; q < count; ++q) {
      const Pair u = E::widen(load<E>(queries.query[q] + k, part));
      const Pair d = E::widen(load<E>(queries.d_recalled[q] + k, part));
      Pair du = load_pair(partial + q * stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < kWriteRows; ++r) {
        const float weight = queries.p[q][first + r], ds = queries.ds[q][first + r];
        du = multiply_add(ds, x[r], du);
        dx[r] = multiply_add(weight, d, multiply_add(ds, u, dx[r]));
      }
      store_pair(partial + q * stride + k, du);
    }
    for (int r = 0; r < kWriteRows; ++r) {
      if (first + r < rows.count) store<E>(d_row[first + r] + k, dx[r], part);
    }
  });
}

template <class E>
void backward(const Recall& p, int64_t b, int64_t begin, int64_t end, float* partial) {
  std::memset(partial, 0, p.queries * scratch_stride(p.dim) * sizeof *partial);
  Queries<E> queries;
  for (int64_t q = 0; q < p.queries; ++q) {
    queries.query[q] = row_of<E>(p.query, b, q);
    queries.d_recalled[q] = row_of<E>(p.d_recalled, b, q);
    queries.d_lse[q] = p.d_lse ? p.d_lse[b * p.queries + q] : 0.0f;
    queries.delta[q] = dot<E>(queries.d_recalled[q], row_of<E>(p.recalled, b, q), p.dim);
  }
  for (int64_t n = begin; n < end; n += kRows) {
    const auto rows = row_block<E>(p.memory, b, n, end);
    typename E::Element* d_row[kRows];
    for (int r = 0; r < kRows; ++r) d_row[r] = row_of<E>(p.d_memory, b, n + r);
    for (int64_t q = 0; q < p.queries; ++q) {
      float products[2][kRows];
      dot_rows<E, 2>({queries.query[q], queries.d_recalled[q]}, rows, p.dim, products);
      for (int r = 0; r < kRows; ++r) {
        const float score = products[0][r] * p.softmax_scale - p.lse[b * p.queries + q];
        const float weight = r < rows.count ? expf(score) : 0.0f;
        const float difference = r < rows.count ? products[1][r] - queries.delta[q] : 0.0f;
        queries.p[q][r] = weight;
        queries.ds[q][r] = p.softmax_scale * weight * (difference + queries.d_lse[q]);
        queries.excess[q] += weight * difference;
      }
    }
    for (int first = 0; first < rows.count; first += kWriteRows) {
      const auto write = p.queries == 1 ? write_rows<E, true> : write_rows<E, false>;
      write(p, queries, rows, first, d_row, partial);
    }
  }
  // Memories that have much in common would show the excess in full: it is taken out along their mean.
  for (int64_t q = 0; q < p.queries; ++q) {
    float* row = partial + q * scratch_stride(p.dim);
    for_each_block(p.dim, [&](int64_t k, auto part) HMT_INLINE {
      const Pair mean = E::widen(load<E>(row_of<E>(p.recalled, b, q) + k, part));
      store_pair(row + k, multiply_add(-p.softmax_scale * queries.excess[q], mean, load_pair(row + k)));
    });
  }
}

template <class E>
void combine(const float* partials, int64_t stride, const float* weights, int64_t count, int64_t dim, void* row) {
  for_each_block(dim, [&](int64_t k, auto part) HMT_INLINE {
    Pair sums = {};
    for (int64_t i = 0; i < count; ++i) sums = multiply_add(weights[i], load_pair(partials + i * stride + k), sums);
    store<E>(static_cast<typename E::Element*>(row) + k, sums, part);
  });
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {forward<Float32>, forward<Float16>, forward<BFloat16>},
          {backward<Float32>, backward<Float16>, backward<BFloat16>},
          {combine<Float32>, combine<Float16>, combine<BFloat16>}};
}

}  // namespace
}  // namespace hmt::cpu
