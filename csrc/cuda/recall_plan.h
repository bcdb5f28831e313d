// How memory_recall is cut into blocks on a GPU. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace hmt::cuda {

struct RecallShape {
  int64_t batch, queries, slots, dim;  // query [B, Q, D], memory [B, N, D]
};

constexpr int kColumns = 16;      // of the D columns, owned by one thread
constexpr int kRows = 8;          // at most, in a tile
constexpr int kStages = 3;        // tiles in shared memory
constexpr int kForwardGroup = 4;  // queries that share one reading of memory; registers set the limit
constexpr int kBackwardGroup = 2;
constexpr int kReduceColumns = 4;  // that a lane of the second launch adds up

// A block streams the rows of one split of a queue's live slots for one group of its queries (the forward kernel) or
// for all groups in turn (the backward kernel). A unit is a queue with a group of queries. What its splits leave is
// added up by a second launch.
struct RecallPlan {
  int group_size, groups;
  int threads, tile_rows;  // of a block
  int splits;
  int reduce_chunks;  // blocks of the second launch for one query
  int64_t units;
  int64_t partial_floats;  // of scratch, for one query of one split: what its threads hold, then four for the block
  int64_t unit_floats;
};

// With one query a block may have the 512 threads of D = 8192; a group of several needs more registers, so D <= 4096.
constexpr int max_threads(int group_size) {
  return group_size == 1 ? 512 : 256;
}

inline RecallPlan plan_recall(const RecallShape& shape, DType dtype, int sm_count, bool backward) {
  constexpr int64_t kTileBytes = 32 << 10;  // three tiles fit every card, and two blocks of them an H100's SM
  constexpr int64_t kSmBytes = 200 << 10;   // of shared memory, and threads with the registers of one query
  constexpr int64_t kSmThreads = 512;
  constexpr int64_t kRowsPerSplit = 4;  // at least, for each query of a group, since a split leaves D floats for each
  const int64_t row_bytes = shape.dim * (dtype == DType::kFloat32 ? 4 : 2);

  RecallPlan plan = {};
  plan.threads = static_cast<int>((shape.dim + kColumns * 32 - 1) / (kColumns * 32) * 32);
  plan.tile_rows = static_cast<int>(std::clamp<int64_t>(kTileBytes / row_bytes, 1, kRows));
  const int group = backward ? kBackwardGroup : kForwardGroup;
  plan.group_size = shape.queries > 1 && plan.threads <= max_threads(group) ? group : 1;
  plan.groups = static_cast<int>((shape.queries + plan.group_size - 1) / plan.group_size);
  plan.units = shape.batch * plan.groups;

  const int64_t by_shared_memory = kSmBytes / (kStages * plan.tile_rows * row_bytes);
  const int64_t blocks_per_sm = std::clamp<int64_t>(std::min(kSmThreads / plan.threads, by_shared_memory), 1, 8);
  const int64_t unsplit_blocks = std::max<int64_t>(backward ? shape.batch : plan.units, 1);
  const int64_t to_fill = (sm_count * blocks_per_sm + unsplit_blocks - 1) / unsplit_blocks;
  const int64_t worthwhile = shape.slots / (kRowsPerSplit * plan.group_size);
  plan.splits = static_cast<int>(std::max<int64_t>(std::min(to_fill, worthwhile), 1));
  if (plan.splits > 1) {
    plan.partial_floats = kColumns * plan.threads + 4;
    plan.reduce_chunks = kColumns * plan.threads / (kReduceColumns * 32);
    plan.unit_floats = plan.splits * plan.group_size * plan.partial_floats;
  }
  return plan;
}

}  // namespace hmt::cuda
