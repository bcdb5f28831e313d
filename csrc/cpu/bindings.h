// The CPU kernels as Python functions of addresses, sizes, strides (in elements) and a dtype code.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "recall.h"

namespace hmt::cpu {
namespace {

using Address = uintptr_t;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // B, Q, N, D
using RowsTuple = std::tuple<Address, int64_t, int64_t>;       // data, batch stride, row stride

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Rows rows(const RowsTuple& tuple) {
  return {pointer<void>(std::get<0>(tuple)), std::get<1>(tuple), std::get<2>(tuple)};
}

Rows contiguous(Address data, int64_t count, int64_t dim) {
  return {pointer<void>(data), count * dim, dim};
}

Recall recall(const Shape& shape, int dtype, float softmax_scale, const RowsTuple& query, const RowsTuple& memory,
              Address num_valid, Address recalled, Address lse) {
  Recall p = {};
  std::tie(p.batch, p.queries, p.slots, p.dim) = shape;
  p.dtype = static_cast<DType>(dtype);
  p.softmax_scale = softmax_scale;
  p.query = rows(query);
  p.memory = rows(memory);
  p.num_valid = pointer<const int32_t>(num_valid);
  p.recalled = contiguous(recalled, p.queries, p.dim);
  p.lse = pointer<float>(lse);
  return p;
}

void forward(const Shape& shape, int dtype, float softmax_scale, const RowsTuple& query, const RowsTuple& memory,
             Address num_valid, Address recalled, Address lse, Address slot, int num_threads) {
  Recall p = recall(shape, dtype, softmax_scale, query, memory, num_valid, recalled, lse);
  p.slot = pointer<int32_t>(slot);
  const Kernels& kernels = choose_kernels();
  pybind11::gil_scoped_release release;
  memory_recall_fwd(p, kernels, num_threads);
}

void backward(const Shape& shape, int dtype, float softmax_scale, const RowsTuple& query, const RowsTuple& memory,
              Address num_valid, Address recalled, Address lse, const RowsTuple& d_recalled, Address d_lse,
              Address d_query, Address d_memory, int num_threads) {
  Recall p = recall(shape, dtype, softmax_scale, query, memory, num_valid, recalled, lse);
  p.d_recalled = rows(d_recalled);
  p.d_lse = pointer<const float>(d_lse);
  p.d_query = contiguous(d_query, p.queries, p.dim);
  p.d_memory = contiguous(d_memory, p.slots, p.dim);
  const Kernels& kernels = choose_kernels();
  pybind11::gil_scoped_release release;
  memory_recall_bwd(p, kernels, num_threads);
}

}  // namespace

inline void register_functions(pybind11::module_& module) {
  module.def("cpu_isa", [] { return choose_kernels().name; });
  module.def("memory_recall_cpu_fwd", &forward);
  module.def("memory_recall_cpu_bwd", &backward);
}

}  // namespace hmt::cpu
