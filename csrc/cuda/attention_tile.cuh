// Tiles of rows in shared memory, and products of them on the tensor cores. A warp owns 16 rows of every product.
#pragma once

#include "block.cuh"

namespace hmt::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kWarpRows = 16;

// Elements from row to row of a tile. An odd number of 16-byte chunks: eight rows lie in different banks for ldmatrix.
template <int kDim>
constexpr int kPitch = kDim + 8;

// Starts to copy rows [first, first + kRows) into a tile; rows from `end` on become zero. row_at(row) is its address.
template <int kRows, int kDim, typename T, typename RowAt>
__device__ __forceinline__ void load_tile(T* tile, int first, int end, RowAt row_at) {
  constexpr int kChunks = kDim / Vector<T>::kSize;
#pragma unroll
  for (int i = 0; i < kRows * kChunks; i += kAttentionThreads) {
    const int chunk = i + static_cast<int>(threadIdx.x);
    if (i + kAttentionThreads > kRows * kChunks && chunk >= kRows * kChunks) break;
    const int row = chunk / kChunks, column = chunk % kChunks * Vector<T>::kSize;
    T* target = tile + row * kPitch<kDim> + column;
    if (first + row < end) {
      cp_async16(target, row_at(first + row) + column);
    } else {
      store_vector(target, Vector<T>{});
    }
  }
}

// The left operand of a product, 16 rows by 16 columns of a tile in shared memory.
template <int kDim, typename T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(a, tile + lane % 16 * kPitch<kDim> + lane / 16 * 8);
}

// c [16, kRows] += a [16, kDim] b^T with b [kRows, kDim] in shared memory; left(k, fragment) brings columns k to k
// + 15.
template <int kDim, int kRows, typename T, typename Left>
__device__ __forceinline__ void multiply_by_rows(float (&c)[kRows / 8][4], const T* b, Left left) {
  const int lane = threadIdx.x % kWarp;
  const T* lane_row = b + (lane / 16 * 8 + lane % 8) * kPitch<kDim> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t a[4];
    left(k, a);
#pragma unroll
    for (int n = 0; n < kRows; n += 16) {
      uint32_t right[4];
      ldmatrix(right, lane_row + n * kPitch<kDim> + k);
      mma<T>(c[n / 8], a, right[0], right[1]);
      mma<T>(c[n / 8 + 1], a, right[2], right[3]);
    }
  }
}

// c [16, kDim] += a [16, kRows] b with b [kRows, kDim] in shared memory and a as a product left it, rounded to T.
template <int kDim, int kRows, typename T>
__device__ __forceinline__ void multiply_by_columns(float (&c)[kDim / 8][4], const float (&a)[kRows / 8][4],
                                                    const T* b) {
  const int lane = threadIdx.x % kWarp;
  const T* lane_row = b + lane % 16 * kPitch<kDim> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kRows; k += 16) {
    const float (&left)[4] = a[k / 8];
    const float (&right)[4] = a[k / 8 + 1];
    const uint32_t packed[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                                pack<T>(right[2], right[3])};
#pragma unroll
    for (int n = 0; n < kDim; n += 16) {
      uint32_t columns[4];
      ldmatrix_transposed(columns, lane_row + k * kPitch<kDim> + n);
      mma<T>(c[n / 8], packed, columns[0], columns[1]);
      mma<T>(c[n / 8 + 1], packed, columns[2], columns[3]);
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

// Puts factor times a product of the whole block into shared memory, [kBlockRows, kPitch<kDim>] in float32; factor has
// one value for each of the thread's two rows. Call when no thread reads the memory any more.
template <int kDim>
__device__ __forceinline__ void stage_product(float* staging, const float (&c)[kDim / 8][4], const float (&factor)[2]) {
  const int first_row = threadIdx.x / kWarp * kWarpRows;
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      float* to = staging + (first_row + fragment_row(e)) * kPitch<kDim> + fragment_column(j, e);
      *reinterpret_cast<float2*>(to) = {c[j][e] * factor[e / 2], c[j][e + 1] * factor[e / 2]};
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
