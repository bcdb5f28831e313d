// memory_recall on a CPU: what is to be computed, how it is cut into tasks, and what an instruction set provides.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hmt::cpu {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
constexpr int kNumDTypes = 3;
constexpr int kMaxQueries = 64;

// A [B, rows, D] tensor with contiguous rows; strides count elements.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
};

struct Recall {
  int64_t batch, queries, slots, dim;
  DType dtype;
  float softmax_scale;
  Rows query, memory;
  const int32_t* num_valid;  // [B], or null for all slots
  Rows recalled;             // results of the forward pass, inputs of the backward pass
  float* lse;                // [B, Q]
  int32_t* slot;             // [B, Q], forward only
  // Backward only.
  Rows d_recalled, d_query, d_memory;
  const float* d_lse;  // [B, Q], or null for zero
};

// The softmax over some slots, for one query.
struct Softmax {
  float max, sum;  // of the scores; of exp(score - max)
  int64_t slot;    // the strongest
};

// The kernels of one instruction set, each for every dtype. A partial result is [Q, scratch_stride(D)].
struct Kernels {
  // Slots [begin, end) of queue b: partial = sum of exp(score - max) memory.
  using Forward = void (*)(const Recall&, int64_t b, int64_t begin, int64_t end, float* partial, Softmax*);
  // Writes d_memory of slots [begin, end) of queue b; partial = sum of ds memory.
  using Backward = void (*)(const Recall&, int64_t b, int64_t begin, int64_t end, float* partial);
  // row = sum of weight * partial over the same row of `count` partials, which are `stride` floats apart.
  using Combine = void (*)(const float* partials, int64_t stride, const float* weights, int64_t count, int64_t dim,
                           void* row);
  const char* name;
  Forward forward[kNumDTypes];
  Backward backward[kNumDTypes];
  Combine combine[kNumDTypes];
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif

// The best kernels for this machine, or those that HMT_KERNELS_CPU_ISA names; std::invalid_argument if it has not them.
const Kernels& choose_kernels();

void memory_recall_fwd(const Recall& recall, const Kernels& kernels, int num_threads);
void memory_recall_bwd(const Recall& recall, const Kernels& kernels, int num_threads);

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The live slots of a queue are cut into chunks of whole blocks of kSlotBlock, each with a partial result. Where they
// are cut depends on nothing but their number, Q and D, so that no result depends on the threads or the rest of the
// batch. A power of two of them, as even as can be, keeps as many threads busy to the end.
constexpr int64_t kMaxChunks = 64, kSlotBlock = 8;
constexpr int64_t kChunkSlots = 64;  // at least: a chunk also writes and re-reads D floats
constexpr int64_t kChunkElements = 1 << 15;

inline int64_t num_chunks(int64_t live, int64_t queries, int64_t dim) {
  const int64_t least = std::max({kChunkSlots, 2 * queries, kChunkElements / dim});
  const int64_t most = std::min(kMaxChunks, live / least);
  int64_t chunks = 1;
  while (2 * chunks <= most) chunks *= 2;
  return live > 0 ? chunks : 0;
}

// The first slot of a chunk.
inline int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t live) {
  return std::min(divide_up(live, kSlotBlock) * chunk / chunks * kSlotBlock, live);
}

// Scratch rows are padded to whole blocks of the widest instruction set.
inline int64_t scratch_stride(int64_t dim) {
  return divide_up(dim, 32) * 32;
}

}  // namespace hmt::cpu
