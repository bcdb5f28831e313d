// The CUDA kernels as Python functions of raw pointers, sizes, strides (in elements), a dtype code and a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "recall.h"

namespace py = pybind11;

namespace hmt::cuda {
namespace {

using Pointer = uintptr_t;
using Shape = std::array<int64_t, 4>;                     // B, Q, N, D
using RowsTuple = std::tuple<Pointer, int64_t, int64_t>;  // data, batch stride, row stride

template <typename T>
T* pointer(Pointer address) {
  return reinterpret_cast<T*>(address);
}

Rows rows(const RowsTuple& tuple) {
  return {pointer<void>(std::get<0>(tuple)), std::get<1>(tuple), std::get<2>(tuple)};
}

RecallShape recall_shape(const Shape& shape) {
  return {shape[0], shape[1], shape[2], shape[3]};
}

// (floats of scratch, groups of queries) of a launch
std::tuple<int64_t, int> recall_plan(const Shape& shape, int dtype, int sm_count, bool backward) {
  const RecallPlan plan = plan_recall(recall_shape(shape), static_cast<DType>(dtype), sm_count, backward);
  return {plan.units * plan.unit_floats, plan.groups};
}

void recall_fwd(const Shape& shape, int dtype, int sm_count, const RowsTuple& query, const RowsTuple& memory,
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

void recall_bwd(const Shape& shape, int dtype, int sm_count, const RowsTuple& query, const RowsTuple& memory,
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

}  // namespace
}  // namespace hmt::cuda

void register_attention(py::module_& module);

void register_cuda(py::module_& module) {
  using namespace py::literals;
  register_attention(module);
  module.def("memory_recall_cuda_plan", &hmt::cuda::recall_plan, "shape"_a, "dtype"_a, "sm_count"_a, "backward"_a);
  module.def("memory_recall_cuda_fwd", &hmt::cuda::recall_fwd, py::kw_only(), "shape"_a, "dtype"_a, "sm_count"_a,
             "query"_a, "memory"_a, "num_valid"_a, "recalled"_a, "recalled_copy"_a, "lse"_a, "slot"_a, "new_memory"_a,
             "slot_index"_a, "workspace"_a, "softmax_scale"_a, "stream"_a);
  module.def("memory_recall_cuda_bwd", &hmt::cuda::recall_bwd, py::kw_only(), "shape"_a, "dtype"_a, "sm_count"_a,
             "query"_a, "memory"_a, "num_valid"_a, "recalled"_a, "d_recalled"_a, "lse"_a, "d_lse"_a, "d_query"_a,
             "d_memory"_a, "d_memory_sum"_a, "workspace"_a, "softmax_scale"_a, "stream"_a);
}
