// The dtype codes of the bindings. Plain C++.
#pragma once

namespace hmt::cuda {
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
}
