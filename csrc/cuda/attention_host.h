// The host's side of a launch: dtype and head dimension as a type, and the error with the kernel's name and shapes.
#pragma once

#include <stdexcept>
#include <string>

#include "attention.h"

namespace hmt::cuda {

template <typename Element, int kHeadDim>
struct Instance {
  using T = Element;
  static constexpr int kDim = kHeadDim;
};

// Calls f with the Instance of a dtype and a head dimension; returns its error, or that there is no such kernel.
template <typename F>
const char* with_instance(DType dtype, const AttentionShape& shape, F f) {
  const auto with_dim = [&](auto element) -> const char* {
    using T = typename decltype(element)::T;
    switch (shape.dim) {
      case 64:
        return f(Instance<T, 64>());
      case 80:
        return f(Instance<T, 80>());
      case 96:
        return f(Instance<T, 96>());
      case 128:
        return f(Instance<T, 128>());
      default:
        return "there is no kernel for this head dimension";
    }
  };
  switch (dtype) {
    case DType::kFloat16:
      return with_dim(Instance<__half, 0>());
    case DType::kBFloat16:
      return with_dim(Instance<__nv_bfloat16, 0>());
    default:
      return "there is no kernel for this dtype";
  }
}

inline std::runtime_error launch_error(const char* kernel, const AttentionShape& shape, DType dtype,
                                       const char* error) {
  const char* dtypes[] = {"float32", "float16", "bfloat16"};
  const auto text = [](int64_t number) { return std::to_string(number); };
  return std::runtime_error(std::string(kernel) + "(B=" + text(shape.batch) + ", Hq=" + text(shape.q_heads) + ", Hkv=" +
                            text(shape.kv_heads) + ", Tq=" + text(shape.q_len) + ", Tk=" + text(shape.k_len) +
                            ", D=" + text(shape.dim) + ", " + dtypes[static_cast<int>(dtype)] + "): " + error);
}

}  // namespace hmt::cuda
