// The bindings over the emulated kernels, as a Python module: pointers are addresses of CPU memory.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "device.cuh"

namespace {

// The instructions for matrices alone, one warp, for the tests of their fragments; lanes come first in every array.
struct MatrixInstruction {
  const uint32_t (*a)[4], (*b)[2];  // of mma
  float (*c)[4];
  const unsigned char* rows;  // of ldmatrix: 16 bytes per lane
  uint32_t (*to)[4];
  bool transposed, bfloat16;
};

void matrix_kernel(const MatrixInstruction p) {
  const unsigned lane = threadIdx.x;
  if (p.rows != nullptr) {
    (p.transposed ? hmt::cuda::ldmatrix_transposed : hmt::cuda::ldmatrix)(p.to[lane], p.rows + 16 * lane);
  } else {
    (p.bfloat16 ? hmt::cuda::mma<__nv_bfloat16> : hmt::cuda::mma<__half>)(p.c[lane], p.a[lane], p.b[lane][0],
                                                                          p.b[lane][1]);
  }
}

void run(const MatrixInstruction& instruction) {
  hmt::cuda::launch(matrix_kernel, 1, 32, 0, instruction, nullptr);
}

using hmt::cuda::pointer;

}  // namespace

PYBIND11_MODULE(hmt_cuda_emulated, module) {
  hmt::cuda::register_functions(module);
  module.def("mma", [](uintptr_t a, uintptr_t b, uintptr_t c, bool bfloat16) {
    MatrixInstruction p = {};
    p.a = pointer<uint32_t[4]>(a), p.b = pointer<uint32_t[2]>(b), p.c = pointer<float[4]>(c), p.bfloat16 = bfloat16;
    run(p);
  });
  module.def("ldmatrix", [](uintptr_t rows, uintptr_t to, bool transposed) {
    MatrixInstruction p = {};
    p.rows = pointer<unsigned char>(rows), p.to = pointer<uint32_t[4]>(to), p.transposed = transposed;
    run(p);
  });
  module.def("set_seed", [](uint64_t seed) { emulation::options().seed = seed; });
  module.def("fail_next_launch", [] { emulation::options().fail_next_launch = true; });
}
