// memory_recall in plain C++: vectors of four floats, which every 64-bit processor has.
namespace hmt::cpu {
namespace {
constexpr int kLanes = 4;
}
}  // namespace hmt::cpu

#include "recall_kernels.h"

namespace hmt::cpu {
constexpr Kernels kPortable = make_kernels("portable");
}
