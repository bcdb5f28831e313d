// The bindings over the emulated kernels, as a Python module: pointers are addresses of CPU memory.
#include <pybind11/pybind11.h>

#include "device.cuh"

void register_cuda(pybind11::module_& module);

PYBIND11_MODULE(hmt_cuda_emulated, module) {
  register_cuda(module);
  module.def("set_seed", [](uint64_t seed) { emulation::options().seed = seed; });
  module.def("fail_next_launch", [] { emulation::options().fail_next_launch = true; });
}
