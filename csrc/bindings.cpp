// The Python module hmt_kernels._C. Tensors come as addresses, sizes and strides, so that no torch header is needed.
// Only this file compiles pybind11, which takes longer than any kernel.
#include "cpu/bindings.h"

#include <pybind11/pybind11.h>
#ifdef HMT_WITH_CUDA
#include "cuda/bindings.h"
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled kernels of hmt_kernels.";
  hmt::cpu::register_functions(module);
#ifdef HMT_WITH_CUDA
  hmt::cuda::register_functions(module);
#endif
}
