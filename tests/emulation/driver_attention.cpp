// Runs the kernels of segment_attention on made-up data, for the sanitizers and for random orders: every array has
// exactly its size, what must not be read is NaN, and all seeds must give the same bits.
//
//     driver SEEDS [CASE]
//
// -DFORWARD_ONLY leaves the backward kernels out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

// Included, not linked: the standard library's headers take longer to compile than the kernels.
#include "attention_fwd.cu"
#include "attention_rotate.cu"
#ifndef FORWARD_ONLY
#include "attention_bwd.cu"
#endif

namespace {

using hmt::cuda::DType;

struct Case {
  const char* name;
  hmt::cuda::AttentionShape shape;
  int half;  // of the rotary features
  int window;
  std::vector<int32_t> pad_span;  // [B, 2], or empty
};

// One head dimension, 80, so that little is to be compiled. Tiles have 64 rows, or 32 in the backward pass.
const Case kCases[] = {
    {"square", {1, 2, 1, 40, 40, 80}, 40, INT32_MAX, {}},
    {"everything", {1, 3, 1, 9, 140, 80}, 10, 100, {40, 100}},
    {"decoding", {1, 2, 2, 1, 65, 80}, 0, INT32_MAX, {2, 40}},
    {"hidden", {1, 1, 1, 5, 70, 80}, 0, INT32_MAX, {0, 70}},
};

using Bytes = std::vector<unsigned char>;

// [B, H, T, D] with a gap of NaN after every row but the last.
template <typename T>
struct Tensor {
  Tensor(int64_t batch, int64_t heads, int64_t length, int64_t dim)
      : rows(batch * heads * length), heads(heads), length(length), dim(dim), stride(dim + 8) {
    bytes.resize(static_cast<size_t>((rows - 1) * stride + dim) * sizeof(T), 0xff);
  }

  hmt::cuda::Heads strided() { return {bytes.data(), heads * length * stride, length * stride, stride}; }
  T* row(int64_t i) { return reinterpret_cast<T*>(bytes.data()) + i * stride; }

  void fill(unsigned& state) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < dim; ++d) {
        state = state * 1664525u + 1013904223u;
        hmt::cuda::from_float(static_cast<float>(state >> 8) / 8388608.0f - 1.0f, row(i)[d]);
      }
    }
  }

  bool has_nan() {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < dim; ++d) {
        if (std::isnan(hmt::cuda::to_float(row(i)[d]))) return true;
      }
    }
    return false;
  }

  int64_t rows, heads, length, dim, stride;
  Bytes bytes;
};

[[noreturn]] void fail(const Case& c, uint64_t seed, const char* what) {
  std::printf("FAILED: case %s, seed %llu: %s\n", c.name, static_cast<unsigned long long>(seed), what);
  std::exit(1);
}

void append(Bytes& all, const void* data, size_t size) {
  all.insert(all.end(), static_cast<const unsigned char*>(data), static_cast<const unsigned char*>(data) + size);
}

// Runs the forward and the backward pass; returns all results.
Bytes run(const Case& c, uint64_t seed) {
  using T = __half;
  const auto& [batch, q_heads, kv_heads, q_len, k_len, dim] = c.shape;
  emulation::options().seed = seed;
  unsigned state = 1;
  Tensor<T> q(batch, q_heads, q_len, dim), k(batch, kv_heads, k_len, dim), v = k;
  Tensor<T> o = q, d_o = q, dq = q, dk = k, dv = k, rotated_q = q, rotated_k = k;
  Tensor<float> cos(1, 1, k_len, (c.half + 7) / 8 * 8), sin = cos;
  for (Tensor<T>* tensor : {&q, &k, &v, &d_o}) tensor->fill(state);
  cos.fill(state), sin.fill(state);
  const size_t rows = static_cast<size_t>(q.rows);
  std::vector<float> lse(rows, NAN), d_lse(rows, 0.5f);

  hmt::cuda::AttentionForward f = {};
  f.shape = c.shape, f.group = hmt::cuda::make_group(c.shape);
  f.q = q.strided(), f.k = k.strided(), f.v = v.strided(), f.o = o.strided(), f.lse = lse.data();
  f.rotary = {cos.row(0), sin.row(0), 0, cos.stride, c.half};
  f.mask = {c.pad_span.empty() ? nullptr : c.pad_span.data(), c.window};
  f.softmax_scale = 0.5f, f.rotated_k = rotated_k.strided();
  hmt::cuda::segment_attention_fwd(f, DType::kFloat16, nullptr);
  if (o.has_nan()) fail(c, seed, "o holds NaN");
  for (const float x : lse) {
    if (std::isnan(x)) fail(c, seed, "softmax_lse holds NaN");
  }

#ifndef FORWARD_ONLY
  hmt::cuda::AttentionBackward g = {};
  g.shape = f.shape, g.group = f.group, g.q = f.q, g.k = f.k, g.v = f.v, g.o = f.o, g.lse = lse.data();
  g.d_o = d_o.strided(), g.d_lse = d_lse.data(), g.dq = dq.strided(), g.dk = dk.strided(), g.dv = dv.strided();
  g.rotary = f.rotary, g.mask = f.mask, g.softmax_scale = f.softmax_scale;
  g.rotated_q = rotated_q.strided(), g.rotated_k = f.rotated_k, g.padded_rows = hmt::cuda::padded_rows(c.shape);
  std::vector<float> row_lse(static_cast<size_t>(batch * kv_heads * g.padded_rows), NAN), row_delta = row_lse;
  g.row_lse = row_lse.data(), g.row_delta = row_delta.data();
  hmt::cuda::segment_attention_bwd(g, DType::kFloat16, nullptr);
  if (dq.has_nan() || dk.has_nan() || dv.has_nan()) fail(c, seed, "a gradient holds NaN");
#endif

  Bytes all;
  for (Tensor<T>* tensor : {&o, &dq, &dk, &dv}) append(all, tensor->bytes.data(), tensor->bytes.size());
  append(all, lse.data(), lse.size() * sizeof(float));
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  for (const Case& c : kCases) {
    if (argc > 2 && std::string(argv[2]) != c.name) continue;
    const Bytes first = run(c, 0);
    for (uint64_t seed = 1; seed < seeds; ++seed) {
      if (run(c, seed) != first) fail(c, seed, "the bits differ from those of seed 0");
    }
    const size_t bits = std::hash<std::string_view>()({reinterpret_cast<const char*>(first.data()), first.size()});
    std::printf("case %s: %llu orders agree on %zx\n", c.name, static_cast<unsigned long long>(seeds), bits);
  }
}
