// The CPU kernels' tasks: which instruction set, which chunk of which queue, and how their partial results meet.
#include "recall.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "threads.h"

namespace hmt::cpu {
namespace {

constexpr int64_t kThreadProducts = 1 << 16;  // multiplications of a query with memory that are worth a thread

int64_t live_slots(const Recall& p, int64_t b) {
  return p.num_valid ? std::clamp<int64_t>(p.num_valid[b], 0, p.slots) : p.slots;
}

char* row_address(const Recall& p, const Rows& rows, int64_t b, int64_t i) {
  const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<char*>(rows.data) + size * (b * rows.batch_stride + i * rows.row_stride);
}

// The partial results of every chunk, [B, chunks, Q, stride].
class Partials {
 public:
  explicit Partials(const Recall& p)
      : chunks(num_chunks(p.slots, p.queries, p.dim)), queries_(p.queries), stride_(scratch_stride(p.dim)) {
    const size_t bytes = p.batch * chunks * queries_ * stride_ * sizeof(float);
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (bytes > 0 && !data_) throw std::bad_alloc();
  }
  float* at(int64_t b, int64_t chunk, int64_t q) const {
    return data_.get() + ((b * chunks + chunk) * queries_ + q) * stride_;
  }
  int64_t chunk_stride() const { return queries_ * stride_; }

  const int64_t chunks;  // of a full queue; one with fewer live slots has no more

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  int64_t queries_, stride_;
  std::unique_ptr<float, Free> data_;
};

// Calls chunk(b, i, begin, end) for every chunk i of every queue b (begin == end if the queue has fewer chunks), and
// result(b, count) once all those of queue b are done: the thread that did the last one goes on with that.
template <class Chunk, class Result>
void for_each_chunk(const Recall& p, int64_t chunks, int num_threads, Chunk chunk, Result result) {
  const int64_t products = p.batch * p.queries * p.slots * p.dim;
  const auto threads = std::min<int64_t>(num_threads, 1 + products / kThreadProducts);
  const int64_t tasks = std::max<int64_t>(chunks, 1);  // without slots there still is a result
  std::vector<std::atomic<int64_t>> done(p.batch);
  parallel_for(p.batch * tasks, static_cast<int>(threads), [&](int64_t task) {
    const int64_t b = task / tasks, i = task % tasks, live = live_slots(p, b);
    const int64_t count = num_chunks(live, p.queries, p.dim);
    const auto begin = [&](int64_t chunk) { return chunk < count ? chunk_begin(chunk, count, live) : live; };
    if (i < chunks) chunk(b, i, begin(i), begin(i + 1));
    if (done[b].fetch_add(1) + 1 == tasks) result(b, count);
  });
}

// The softmax over all chunks, and the weight of each chunk's partial result.
Softmax merge(const Softmax* chunks, int64_t stride, int64_t count, float* weights) {
  Softmax total = {-INFINITY, 0.0f, -1};
  for (int64_t i = 0; i < count; ++i) {
    const Softmax& chunk = chunks[i * stride];
    if (i == 0 || chunk.max > total.max) total = {chunk.max, 0.0f, chunk.slot};
  }
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = expf(chunks[i * stride].max - total.max);
    total.sum += weights[i] * chunks[i * stride].sum;
  }
  for (int64_t i = 0; i < count; ++i) weights[i] /= total.sum;
  return total;
}

struct Choice {
  const Kernels& kernels;
  bool supported;
};

// From the best to the portable one.
std::vector<Choice> choices() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{kAvx512Bf16, bf16}, {kAvx512, avx512}, {kAvx2, avx2}, {kPortable, true}};
#else
  return {{kPortable, true}};
#endif
}

}  // namespace

const Kernels& choose_kernels() {
  static const std::vector<Choice> all = choices();
  const char* name = std::getenv("HMT_KERNELS_CPU_ISA");
  const bool any = name == nullptr || *name == '\0';
  std::string known;
  for (const auto& [kernels, supported] : all) {
    if (supported && (any || std::strcmp(name, kernels.name) == 0)) return kernels;
    if (supported) known += std::string(known.empty() ? "" : ", ") + kernels.name;
  }
  throw std::invalid_argument("HMT_KERNELS_CPU_ISA must be one of " + known + " on this machine, got '" + name + "'");
}

void memory_recall_fwd(const Recall& p, const Kernels& kernels, int num_threads) {
  const int type = static_cast<int>(p.dtype);
  const Partials partials(p);
  std::vector<Softmax> softmax(p.batch * partials.chunks * p.queries);  // [B, chunks, Q]
  const auto softmax_of = [&](int64_t b, int64_t i) { return softmax.data() + (b * partials.chunks + i) * p.queries; };
  const auto chunk = [&](int64_t b, int64_t i, int64_t begin, int64_t end) {
    if (begin < end) kernels.forward[type](p, b, begin, end, partials.at(b, i, 0), softmax_of(b, i));
  };
  const auto result = [&](int64_t b, int64_t count) {
    float weights[kMaxChunks];
    for (int64_t q = 0; q < p.queries; ++q) {
      const Softmax total = merge(softmax_of(b, 0) + q, p.queries, count, weights);
      kernels.combine[type](partials.at(b, 0, q), partials.chunk_stride(), weights, count, p.dim,
                            row_address(p, p.recalled, b, q));
      p.lse[b * p.queries + q] = total.max + logf(total.sum);
      p.slot[b * p.queries + q] = static_cast<int32_t>(total.slot);
    }
  };
  for_each_chunk(p, partials.chunks, num_threads, chunk, result);
}

void memory_recall_bwd(const Recall& p, const Kernels& kernels, int num_threads) {
  const int type = static_cast<int>(p.dtype);
  const Partials partials(p);
  const auto chunk = [&](int64_t b, int64_t i, int64_t begin, int64_t end) {
    if (begin < end) kernels.backward[type](p, b, begin, end, partials.at(b, i, 0));
    // The gradient of dead slots is zero; every chunk takes its share of them.
    const int64_t live = live_slots(p, b), dead = p.slots - live;
    char* first = row_address(p, p.d_memory, b, live + dead * i / partials.chunks);
    std::memset(first, 0, row_address(p, p.d_memory, b, live + dead * (i + 1) / partials.chunks) - first);
  };
  const auto result = [&](int64_t b, int64_t count) {
    float weights[kMaxChunks];
    std::fill_n(weights, count, 1.0f);
    for (int64_t q = 0; q < p.queries; ++q) {
      kernels.combine[type](partials.at(b, 0, q), partials.chunk_stride(), weights, count, p.dim,
                            row_address(p, p.d_query, b, q));
    }
  };
  for_each_chunk(p, partials.chunks, num_threads, chunk, result);
}

}  // namespace hmt::cpu
