// The CUDA kernels as Python functions of raw pointers, sizes, strides (in elements), a dtype code and a stream.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "attention.h"
#include "recall.h"

namespace hmt::cuda {
namespace {

using Pointer = uintptr_t;
using RecallSizes = std::array<int64_t, 4>;                               // B, Q, N, D
using RowsTuple = std::tuple<Pointer, int64_t, int64_t>;                  // data, batch stride, row stride
using AttentionSizes = std::array<int64_t, 6>;                            // B, Hq, Hkv, Tq, Tk, D
using HeadsTuple = std::tuple<Pointer, int64_t, int64_t, int64_t>;        // data, batch stride, head stride, row stride
using RotaryTuple = std::tuple<Pointer, Pointer, int64_t, int64_t, int>;  // cos, sin, batch stride, row stride, half

template <typename T>
T* pointer(Pointer address) {
  return reinterpret_cast<T*>(address);
}

Rows rows(const RowsTuple& tuple) {
  return {pointer<void>(std::get<0>(tuple)), std::get<1>(tuple), std::get<2>(tuple)};
}

RecallShape recall_shape(const RecallSizes& shape) {
  return {shape[0], shape[1], shape[2], shape[3]};
}

// (floats of scratch, groups of queries) of a launch
std::tuple<int64_t, int> recall_plan(const RecallSizes& shape, int dtype, int sm_count, bool backward) {
  const RecallPlan plan = plan_recall(recall_shape(shape), static_cast<DType>(dtype), sm_count, backward);
  return {plan.units * plan.unit_floats, plan.groups};
}

void recall_fwd(const RecallSizes& shape, int dtype, int sm_count, const RowsTuple& query, const RowsTuple& memory,
                Pointer num_valid, const RowsTuple& recalled, const RowsTuple& recalled_copy, Pointer lse, Pointer slot,
                const RowsTuple& new_memory, Pointer slot_index, Pointer workspace, float softmax_scale,
                Pointer stream) {
  const auto type = static_cast<DType>(dtype);
  RecallForward p = {};
  p.shape = recall_shape(shape);
  p.plan = plan_recall(p.shape, type, sm_count, false);
  p.query = rows(query);
  p.memory = rows(memory);
  p.recalled = rows(recalled);
  p.recalled_copy = rows(recalled_copy);
  p.num_valid = pointer<const int32_t>(num_valid);
  p.lse = pointer<float>(lse);
  p.slot = pointer<int32_t>(slot);
  p.new_memory = rows(new_memory);
  p.slot_index = pointer<const int32_t>(slot_index);
  p.workspace = pointer<float>(workspace);
  p.softmax_scale = softmax_scale;
  memory_recall_fwd(p, type, pointer<void>(stream));
}

void recall_bwd(const RecallSizes& shape, int dtype, int sm_count, const RowsTuple& query, const RowsTuple& memory,
                Pointer num_valid, const RowsTuple& recalled, const RowsTuple& d_recalled, Pointer lse, Pointer d_lse,
                const RowsTuple& d_query, const RowsTuple& d_memory, Pointer d_memory_sum, Pointer workspace,
                float softmax_scale, Pointer stream) {
  const auto type = static_cast<DType>(dtype);
  RecallBackward p = {};
  p.shape = recall_shape(shape);
  p.plan = plan_recall(p.shape, type, sm_count, true);
  p.query = rows(query);
  p.memory = rows(memory);
  p.recalled = rows(recalled);
  p.d_recalled = rows(d_recalled);
  p.num_valid = pointer<const int32_t>(num_valid);
  p.lse = pointer<const float>(lse);
  p.d_lse = pointer<const float>(d_lse);
  p.d_query = rows(d_query);
  p.d_memory = rows(d_memory);
  p.d_memory_sum = pointer<float>(d_memory_sum);
  p.workspace = pointer<float>(workspace);
  p.softmax_scale = softmax_scale;
  memory_recall_bwd(p, type, pointer<void>(stream));
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
Params common(const AttentionSizes& shape, const RotaryTuple& rotary, Pointer pad_span, int32_t window,
              float softmax_scale) {
  Params p = {};
  p.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  p.group = make_group(p.shape);
  p.rotary = {pointer<const float>(std::get<0>(rotary)), pointer<const float>(std::get<1>(rotary)), std::get<2>(rotary),
              std::get<3>(rotary), std::get<4>(rotary)};
  p.mask = {pointer<const int32_t>(pad_span), window};
  p.softmax_scale = softmax_scale;
  return p;
}

void attention_fwd(const AttentionSizes& shape, int dtype, const HeadsTuple& q, const HeadsTuple& k,
                   const HeadsTuple& v, const HeadsTuple& o, Pointer lse, const RotaryTuple& rotary, Pointer rotated_k,
                   Pointer pad_span, int32_t window, float softmax_scale, Pointer stream) {
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
int64_t attention_padded_rows(const AttentionSizes& shape) {
  return padded_rows({shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]});
}

void attention_bwd(const AttentionSizes& shape, int dtype, const HeadsTuple& q, const HeadsTuple& k,
                   const HeadsTuple& v, const HeadsTuple& o, Pointer lse, const HeadsTuple& d_o, Pointer d_lse,
                   const HeadsTuple& dq, const HeadsTuple& dk, const HeadsTuple& dv, const RotaryTuple& rotary,
                   Pointer rotated_q, Pointer rotated_k, Pointer row_lse, Pointer row_delta, Pointer pad_span,
                   int32_t window, float softmax_scale, Pointer stream) {
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

inline void register_functions(pybind11::module_& module) {
  using namespace pybind11::literals;
  using pybind11::kw_only;
  module.def("memory_recall_cuda_plan", &recall_plan, "shape"_a, "dtype"_a, "sm_count"_a, "backward"_a);
  module.def("memory_recall_cuda_fwd", &recall_fwd, kw_only(), "shape"_a, "dtype"_a, "sm_count"_a, "query"_a,
             "memory"_a, "num_valid"_a, "recalled"_a, "recalled_copy"_a, "lse"_a, "slot"_a, "new_memory"_a,
             "slot_index"_a, "workspace"_a, "softmax_scale"_a, "stream"_a);
  module.def("memory_recall_cuda_bwd", &recall_bwd, kw_only(), "shape"_a, "dtype"_a, "sm_count"_a, "query"_a,
             "memory"_a, "num_valid"_a, "recalled"_a, "d_recalled"_a, "lse"_a, "d_lse"_a, "d_query"_a, "d_memory"_a,
             "d_memory_sum"_a, "workspace"_a, "softmax_scale"_a, "stream"_a);
  module.def("segment_attention_cuda_padded_rows", &attention_padded_rows, "shape"_a);
  module.def("segment_attention_cuda_fwd", &attention_fwd, kw_only(), "shape"_a, "dtype"_a, "q"_a, "k"_a, "v"_a, "o"_a,
             "lse"_a, "rotary"_a, "rotated_k"_a, "pad_span"_a, "window"_a, "softmax_scale"_a, "stream"_a);
  module.def("segment_attention_cuda_bwd", &attention_bwd, kw_only(), "shape"_a, "dtype"_a, "q"_a, "k"_a, "v"_a, "o"_a,
             "lse"_a, "d_o"_a, "d_lse"_a, "dq"_a, "dk"_a, "dv"_a, "rotary"_a, "rotated_q"_a, "rotated_k"_a, "row_lse"_a,
             "row_delta"_a, "pad_span"_a, "window"_a, "softmax_scale"_a, "stream"_a);
}

}  // namespace hmt::cuda
