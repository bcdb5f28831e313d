// Runs the kernels on made-up data, for the sanitizers and for random orders: every array has exactly its size, what
// must not be read is NaN, and all seeds must give the same bits.
//
//     driver SEEDS [CASE]
//
// -DFORWARD_ONLY leaves the backward kernel out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "block.cuh"
#include "recall.h"
#include "recall_host.h"

namespace {

using hmt::cuda::DType;

struct Case {
  const char* name;
  DType dtype;
  int64_t batch, queries, slots, dim;
};

// More than one split from 8 slots, or 32 with several queries; two warps from D = 520.
const Case kCases[] = {
    {"split", DType::kBFloat16, 2, 1, 100, 64},       {"two-warps", DType::kFloat32, 1, 3, 48, 520},
    {"many-splits", DType::kFloat32, 1, 1, 408, 520}, {"groups", DType::kFloat16, 1, 5, 50, 72},
    {"short", DType::kFloat32, 3, 2, 5, 8},
};

using Bytes = std::vector<unsigned char>;

// B x rows x dim with a gap of NaN after every row but the last.
struct Tensor {
  Tensor(int64_t batch, int64_t rows, int64_t dim, size_t item)
      : batch(batch), count(rows), dim(dim), item(item), stride(dim + 8) {
    bytes.resize(static_cast<size_t>(std::max<int64_t>((batch * rows - 1) * stride + dim, 0)) * item, 0xff);
  }

  hmt::cuda::Rows rows() { return {bytes.data(), count * stride, stride}; }
  unsigned char* at(int64_t b, int64_t row) {
    return bytes.data() + (b * count + row) * stride * static_cast<int64_t>(item);
  }

  template <typename T>
  void fill(int64_t b, int64_t row, unsigned& state) {
    for (int64_t d = 0; d < dim; ++d) {
      state = state * 1664525u + 1013904223u;
      T value;
      hmt::cuda::from_float(static_cast<float>(state >> 8) / 8388608.0f - 1.0f, value);
      std::memcpy(at(b, row) + d * static_cast<int64_t>(item), &value, item);
    }
  }

  int64_t batch, count, dim;
  size_t item;
  int64_t stride;
  Bytes bytes;
};

template <typename T>
bool has_nan(Tensor& tensor) {
  for (int64_t b = 0; b < tensor.batch; ++b) {
    for (int64_t r = 0; r < tensor.count; ++r) {
      for (int64_t d = 0; d < tensor.dim; ++d) {
        T value;
        std::memcpy(&value, tensor.at(b, r) + d * static_cast<int64_t>(tensor.item), tensor.item);
        if (std::isnan(hmt::cuda::to_float(value))) return true;
      }
    }
  }
  return false;
}

[[noreturn]] void fail(const Case& c, uint64_t seed, const char* what) {
  std::printf("FAILED: case %s, seed %llu: %s\n", c.name, static_cast<unsigned long long>(seed), what);
  std::exit(1);
}

void append(Bytes& all, const void* data, size_t size) {
  all.insert(all.end(), static_cast<const unsigned char*>(data), static_cast<const unsigned char*>(data) + size);
}

// Runs the step (or, with several queries, the forward pass) and the backward pass; returns all results.
template <typename T>
Bytes run(const Case& c, uint64_t seed) {
  emulation::options().seed = seed;
  unsigned state = 1;
  const hmt::cuda::RecallShape shape = {c.batch, c.queries, c.slots, c.dim};
  Tensor query(c.batch, c.queries, c.dim, sizeof(T)), memory(c.batch, c.slots, c.dim, sizeof(T));
  Tensor recalled = query, copy = query, d_recalled = query, d_query = query,
         d_memory(c.batch, c.slots, c.dim, sizeof(T));
  Tensor new_memory(c.batch, 1, c.dim, sizeof(T));
  d_memory.stride = c.dim;
  std::vector<int32_t> num_valid, slot_index, slot(static_cast<size_t>(c.batch * c.queries), 7777);
  std::vector<float> lse(slot.size(), NAN), d_lse(slot.size(), 0.5f);
  for (int64_t b = 0; b < c.batch; ++b) {
    num_valid.push_back(static_cast<int32_t>(c.slots - b * (c.slots / 2)));
    slot_index.push_back(b == 0 ? num_valid[0] / 2 : static_cast<int32_t>(c.slots) - 1);
    for (int64_t n = 0; n < num_valid.back(); ++n) memory.fill<T>(b, n, state);
    for (int64_t q = 0; q < c.queries; ++q) query.fill<T>(b, q, state), d_recalled.fill<T>(b, q, state);
    new_memory.fill<T>(b, 0, state);
  }

  hmt::cuda::RecallForward f = {};
  f.shape = shape;
  f.plan = hmt::cuda::plan_recall(shape, c.dtype, 132, false);
  f.query = query.rows(), f.memory = memory.rows(), f.recalled = recalled.rows(), f.recalled_copy = copy.rows();
  if (c.queries == 1) f.new_memory = new_memory.rows(), f.slot_index = slot_index.data();
  f.num_valid = num_valid.data(), f.lse = lse.data(), f.slot = slot.data(), f.softmax_scale = 0.5f;
  std::vector<float> workspace(static_cast<size_t>(f.plan.units * f.plan.unit_floats), NAN);
  f.workspace = workspace.data();
  hmt::cuda::memory_recall_fwd(f, c.dtype, nullptr);
  if (has_nan<T>(recalled) || has_nan<T>(copy)) fail(c, seed, "recalled holds NaN");

#ifndef FORWARD_ONLY
  hmt::cuda::RecallBackward g = {};
  g.shape = shape;
  g.plan = hmt::cuda::plan_recall(shape, c.dtype, 132, true);
  g.query = f.query, g.memory = f.memory, g.recalled = f.recalled, g.d_recalled = d_recalled.rows();
  g.num_valid = f.num_valid, g.lse = f.lse, g.d_lse = d_lse.data(), g.softmax_scale = f.softmax_scale;
  g.d_query = d_query.rows(), g.d_memory = d_memory.rows();
  std::vector<float> sum(static_cast<size_t>(c.batch * c.slots * c.dim), NAN);
  g.d_memory_sum = sum.data();
  workspace.assign(static_cast<size_t>(g.plan.units * g.plan.unit_floats), NAN);
  g.workspace = workspace.data();
  hmt::cuda::memory_recall_bwd(g, c.dtype, nullptr);
  if (has_nan<T>(d_query) || has_nan<T>(d_memory)) fail(c, seed, "a gradient holds NaN");
#endif

  Bytes all;
  for (Tensor* tensor : {&memory, &recalled, &copy, &d_query, &d_memory})
    append(all, tensor->bytes.data(), tensor->bytes.size());
  append(all, lse.data(), lse.size() * sizeof(float));
  append(all, slot.data(), slot.size() * sizeof(int32_t));
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  for (const Case& c : kCases) {
    if (argc > 2 && std::string(argv[2]) != c.name) continue;
    const auto run_case = [&](uint64_t seed) {
      return hmt::cuda::with_dtype(c.dtype, [&](auto type) { return run<typename decltype(type)::T>(c, seed); });
    };
    const Bytes first = run_case(0);
    for (uint64_t seed = 1; seed < seeds; ++seed) {
      if (run_case(seed) != first) fail(c, seed, "the bits differ from those of seed 0");
    }
    const size_t bits = std::hash<std::string_view>()({reinterpret_cast<const char*>(first.data()), first.size()});
    std::printf("case %s: %llu orders agree on %zx\n", c.name, static_cast<unsigned long long>(seeds), bits);
  }
}
