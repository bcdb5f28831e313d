// The host's side of a launch: the dtype as a type, and the error with the kernel's name and shapes.
#pragma once

#include <stdexcept>
#include <string>

#include "recall.h"

namespace hmt::cuda {

template <typename Element>
struct Type {
  using T = Element;
};

// Calls f with the Type of a dtype.
template <typename F>
auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Type<__half>());
    case DType::kBFloat16:
      return f(Type<__nv_bfloat16>());
    default:
      return f(Type<float>());
  }
}

inline std::runtime_error launch_error(const char* kernel, const RecallShape& shape, DType dtype, const char* error) {
  const char* dtypes[] = {"float32", "float16", "bfloat16"};
  return std::runtime_error(std::string(kernel) + "(B=" + std::to_string(shape.batch) +
                            ", Q=" + std::to_string(shape.queries) + ", N=" + std::to_string(shape.slots) + ", D=" +
                            std::to_string(shape.dim) + ", " + dtypes[static_cast<int>(dtype)] + "): " + error);
}

}  // namespace hmt::cuda
