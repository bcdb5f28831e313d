// Tiles of rows in shared memory, and products of them on the tensor cores. A warp owns one or two times 16 rows of
// every product; a thread has its part of them in fragments.
#pragma once

#include "block.cuh"

namespace hmt::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kWarpRows = 16;

// Elements from row to row of a tile. An odd number of 16-byte chunks: eight rows lie in different banks for ldmatrix.
template <int kDim>
constexpr int kPitch = kDim + 8;

// Threads that copy one row of a tile, 16 bytes each.
template <int kDim>
constexpr int kRowThreads = kDim > 64 ? 16 : 8;

// Starts to copy rows 0 to kRows - 1 of a tile; rows from `count` on become zero. row_at(row) is an address, and is
// called for rows in order.
template <int kRows, int kDim, typename T, typename RowAt>
__device__ __forceinline__ void load_tile(T* tile, int count, RowAt row_at) {
  constexpr int kStep = kAttentionThreads / kRowThreads<kDim>;
  const int thread_row = threadIdx.x / kRowThreads<kDim>;
  const int column = threadIdx.x % kRowThreads<kDim> * Vector<T>::kSize;
  if (column >= kDim) return;
  T* target = tile + thread_row * kPitch<kDim> + column;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    if (i + thread_row < count) {
      cp_async16(target + i * kPitch<kDim>, row_at(i + thread_row) + column);
    } else {
      store_vector(target + i * kPitch<kDim>, Vector<T>{});
    }
  }
}

// Changes the sign of a tile that has landed.
template <int kRows, int kDim, typename T>
__device__ __forceinline__ void negate_tile(T* tile) {
  for (int i = threadIdx.x; i < kRows * kPitch<kDim> / 2; i += kAttentionThreads) {
    reinterpret_cast<uint32_t*>(tile)[i] ^= 0x80008000u;
  }
}

// The left operand of a product, 16 rows by 16 columns of a tile in shared memory.
template <int kDim, typename T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(a, tile + lane % 16 * kPitch<kDim> + lane / 16 * 8);
}

template <int kTiles, int kColumns>
using Fragments = float[kTiles][kColumns / 8][4];

// c += a b^T for kTiles times 16 rows of a [.., kDim], and b [kRows, kDim] in shared memory; left(m, k, fragment)
// brings columns k to k + 15 of the m-th 16 rows.
template <int kDim, int kRows, int kTiles, typename T, typename Left>
__device__ __forceinline__ void multiply_by_rows(Fragments<kTiles, kRows>& c, const T* b, Left left) {
  const int lane = threadIdx.x % kWarp;
  const T* lane_row = b + (lane / 16 * 8 + lane % 8) * kPitch<kDim> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) left(m, k, a[m]);
#pragma unroll
    for (int n = 0; n < kRows; n += 16) {
      uint32_t right[4];
      ldmatrix(right, lane_row + n * kPitch<kDim> + k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma<T>(c[m][n / 8], a[m], right[0], right[1]);
        mma<T>(c[m][n / 8 + 1], a[m], right[2], right[3]);
      }
    }
  }
}

// c += a b for kTiles times 16 rows of a [.., kRows], as a product left it, rounded to T, and b [kRows, kDim] in shared
// memory.
template <int kDim, int kRows, int kTiles, typename T>
__device__ __forceinline__ void multiply_by_columns(Fragments<kTiles, kDim>& c, const Fragments<kTiles, kRows>& a,
                                                    const T* b) {
  const int lane = threadIdx.x % kWarp;
  const T* lane_row = b + lane % 16 * kPitch<kDim> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kRows; k += 16) {
    uint32_t packed[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed[m][i] = pack<T>(a[m][k / 8 + i / 2][i % 2 * 2], a[m][k / 8 + i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < kDim; n += 16) {
      uint32_t columns[4];
      ldmatrix_transposed(columns, lane_row + k * kPitch<kDim> + n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma<T>(c[m][n / 8], packed[m], columns[0], columns[1]);
        mma<T>(c[m][n / 8 + 1], packed[m], columns[2], columns[3]);
      }
    }
  }
}

// Where element e of the j-th fragment of a product lies: its row among the warp's 16, and its column.
__device__ __forceinline__ int fragment_row(int e) {
  return threadIdx.x % kWarp / 4 + e / 2 * 8;
}
__device__ __forceinline__ int fragment_column(int j, int e) {
  return j * 8 + threadIdx.x % 4 * 2 + e % 2;
}

// Puts factor times a product of the whole block into shared memory, [rows, kPitch<kDim>] in float32; factor has one
// value for each of the thread's rows. Call when no thread reads the memory any more.
template <int kDim, int kTiles>
__device__ __forceinline__ void stage_product(float* staging, const Fragments<kTiles, kDim>& c,
                                              const float (&factor)[kTiles][2]) {
  const int first_row = threadIdx.x / kWarp * kTiles * kWarpRows;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = first_row + m * kWarpRows + fragment_row(e);
        float* to = staging + row * kPitch<kDim> + fragment_column(j, e);
        *reinterpret_cast<float2*>(to) = {c[m][j][e] * factor[m][e / 2], c[m][j][e + 1] * factor[m][e / 2]};
      }
    }
  }
}

// Writes the first `rows` rows of staged float32 to global memory.
template <int kDim, typename T, typename RowAt>
__device__ __forceinline__ void store_staged(const float* staging, int rows, RowAt row_at) {
  constexpr int kChunks = kDim / Vector<T>::kSize;
  for (int chunk = threadIdx.x; chunk < rows * kChunks; chunk += kAttentionThreads) {
    const int row = chunk / kChunks, column = chunk % kChunks * Vector<T>::kSize;
    const float* from = staging + row * kPitch<kDim> + column;
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) from_float(from[e], vector.element[e]);
    store_vector(row_at(row) + column, vector);
  }
}

}  // namespace hmt::cuda
