// 16-byte vectors, and sums and maxima over a warp and over a block.
#pragma once

#include "device.cuh"

namespace hmt::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* pointer) {
  return *reinterpret_cast<const Vector<T>*>(pointer);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T>& vector) {
  *reinterpret_cast<Vector<T>*>(pointer) = vector;
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

__device__ __forceinline__ void from_float(float x, float& y) {
  y = x;
}
__device__ __forceinline__ void from_float(float x, __half& y) {
  y = __float2half_rn(x);
}
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) {
  y = __float2bfloat16_rn(x);
}

// Sums and maxima over groups of kLanes neighbouring lanes; every lane gets its group's.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kWholeWarp, x, offset);
  return x;
}

template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, offset));
  return x;
}

// The larger score wins, the lower slot on ties; slot -1 is "none yet".
template <int kLanes>
__device__ __forceinline__ void lanes_strongest(float& score, int& slot) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const float other_score = __shfl_xor_sync(kWholeWarp, score, offset);
    const int other_slot = __shfl_xor_sync(kWholeWarp, slot, offset);
    const bool tie_won = other_score == score && other_slot >= 0 && (slot < 0 || other_slot < slot);
    if (other_score > score || tie_won) {
      score = other_score;
      slot = other_slot;
    }
  }
}

// Sums kCount values over the block, in a fixed order and with one barrier: first each warp halves the values that a
// lane carries with every exchange, about one shuffle per value, then total(i) adds what the warps left.
template <int kCount>
class BlockSums {
 public:
  static_assert(kCount <= kWarp && (kCount & (kCount - 1)) == 0, "a power of two, at most one value per lane");

  // shared [warps, kCount]: must not be written again before the next barrier but one.
  __device__ __forceinline__ BlockSums(float (&value)[kCount], float* shared) : shared_(shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    exchange<kCount / 2, kWarp / 2>(value, lane);
    const float sum = lanes_sum<kWarp / kCount>(value[0]);
    if (lane % (kWarp / kCount) == 0) shared[warp * kCount + lane / (kWarp / kCount)] = sum;
    __syncthreads();
  }

  __device__ __forceinline__ float total(int i) const {
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += shared_[warp * kCount + i];
    return sum;
  }

 private:
  // Lanes that differ in bit kOffset each keep one half of 2 * kHalf values, with what the other lane had of it.
  template <int kHalf, int kOffset>
  static __device__ __forceinline__ void exchange(float (&value)[kCount], int lane) {
    if constexpr (kHalf > 0) {
      const bool upper = (lane & kOffset) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float kept = upper ? value[i + kHalf] : value[i];
        const float sent = upper ? value[i] : value[i + kHalf];
        value[i] = kept + __shfl_xor_sync(kWholeWarp, sent, kOffset);
      }
      exchange<kHalf / 2, kOffset / 2>(value, lane);
    }
  }

  const float* shared_;
};

}  // namespace hmt::cuda
