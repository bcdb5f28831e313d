// The Python module hmt_kernels._C. Tensors come as addresses, sizes and strides, so that no torch header is needed.
#include <pybind11/pybind11.h>

void register_cpu(pybind11::module_& module);  // in csrc/cpu
#ifdef HMT_WITH_CUDA
void register_cuda(pybind11::module_& module);  // in csrc/cuda
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled kernels of hmt_kernels.";
  register_cpu(module);
#ifdef HMT_WITH_CUDA
  register_cuda(module);
#endif
}
