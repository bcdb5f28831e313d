// The CUDA kernels of segment_attention as Python functions; see bindings_cuda.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "attention.h"

namespace py = pybind11;

namespace hmt::cuda {
namespace {

using Pointer = uintptr_t;
using Shape = std::array<int64_t, 6>;                                     // B, Hq, Hkv, Tq, Tk, D
using HeadsTuple = std::tuple<Pointer, int64_t, int64_t, int64_t>;        // data, batch stride, head stride, row stride
using RotaryTuple = std::tuple<Pointer, Pointer, int64_t, int64_t, int>;  // cos, sin, batch stride, row stride, half

template <typename T>
T* pointer(Pointer address) {
  return reinterpret_cast<T*>(address);
}

Heads heads(const HeadsTuple& tuple) {
  return {pointer<void>(std::get<0>(tuple)), std::get<1>(tuple), std::get<2>(tuple), std::get<3>(tuple)};
}

// [B, heads, length, dim] of scratch, contiguous
Heads scratch(Pointer address, int64_t heads, int64_t length, int64_t dim) {
  return {pointer<void>(address), heads * length * dim, length * dim, dim};
}

// What both directions have in common.
template <typename Params>
Params common(const Shape& shape, const RotaryTuple& rotary, Pointer pad_span, int32_t window, float softmax_scale) {
  Params p = {};
  p.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  p.group = make_group(p.shape);
  p.rotary = {pointer<const float>(std::get<0>(rotary)), pointer<const float>(std::get<1>(rotary)), std::get<2>(rotary),
              std::get<3>(rotary), std::get<4>(rotary)};
  p.mask = {pointer<const int32_t>(pad_span), window};
  p.softmax_scale = softmax_scale;
  return p;
}

void attention_fwd(const Shape& shape, int dtype, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
                   const HeadsTuple& o, Pointer lse, const RotaryTuple& rotary, Pointer rotated_k, Pointer pad_span,
                   int32_t window, float softmax_scale, Pointer stream) {
  auto p = common<AttentionForward>(shape, rotary, pad_span, window, softmax_scale);
  p.q = heads(q);
  p.k = heads(k);
  p.v = heads(v);
  p.o = heads(o);
  p.lse = pointer<float>(lse);
  p.rotated_k = scratch(rotated_k, p.shape.kv_heads, p.shape.k_len, p.shape.dim);
  segment_attention_fwd(p, static_cast<DType>(dtype), pointer<void>(stream));
}

// The rows of row_lse and row_delta for every head of k.
int64_t attention_padded_rows(const Shape& shape) {
  return padded_rows({shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]});
}

void attention_bwd(const Shape& shape, int dtype, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
                   const HeadsTuple& o, Pointer lse, const HeadsTuple& d_o, Pointer d_lse, const HeadsTuple& dq,
                   const HeadsTuple& dk, const HeadsTuple& dv, const RotaryTuple& rotary, Pointer rotated_q,
                   Pointer rotated_k, Pointer row_lse, Pointer row_delta, Pointer pad_span, int32_t window,
                   float softmax_scale, Pointer stream) {
  auto p = common<AttentionBackward>(shape, rotary, pad_span, window, softmax_scale);
  p.q = heads(q);
  p.k = heads(k);
  p.v = heads(v);
  p.o = heads(o);
  p.lse = pointer<const float>(lse);
  p.d_o = heads(d_o);
  p.d_lse = pointer<const float>(d_lse);
  p.dq = heads(dq);
  p.dk = heads(dk);
  p.dv = heads(dv);
  p.rotated_q = scratch(rotated_q, p.shape.q_heads, p.shape.q_len, p.shape.dim);
  p.rotated_k = scratch(rotated_k, p.shape.kv_heads, p.shape.k_len, p.shape.dim);
  p.row_lse = pointer<float>(row_lse);
  p.row_delta = pointer<float>(row_delta);
  p.padded_rows = padded_rows(p.shape);
  segment_attention_bwd(p, static_cast<DType>(dtype), pointer<void>(stream));
}

}  // namespace
}  // namespace hmt::cuda

void register_attention(py::module_& module) {
  using namespace py::literals;
  module.def("segment_attention_cuda_padded_rows", &hmt::cuda::attention_padded_rows, "shape"_a);
  module.def("segment_attention_cuda_fwd", &hmt::cuda::attention_fwd, py::kw_only(), "shape"_a, "dtype"_a, "q"_a, "k"_a,
             "v"_a, "o"_a, "lse"_a, "rotary"_a, "rotated_k"_a, "pad_span"_a, "window"_a, "softmax_scale"_a, "stream"_a);
  module.def("segment_attention_cuda_bwd", &hmt::cuda::attention_bwd, py::kw_only(), "shape"_a, "dtype"_a, "q"_a, "k"_a,
             "v"_a, "o"_a, "lse"_a, "d_o"_a, "d_lse"_a, "dq"_a, "dk"_a, "dv"_a, "rotary"_a, "rotated_q"_a,
             "rotated_k"_a, "row_lse"_a, "row_delta"_a, "pad_span"_a, "window"_a, "softmax_scale"_a, "stream"_a);
}
