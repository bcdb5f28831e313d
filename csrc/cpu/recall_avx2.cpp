// memory_recall with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "recall.h"
#include "target.h"

HMT_TARGET_BEGIN("avx2,fma,f16c")

namespace hmt::cpu {
namespace {

constexpr int kLanes = 8;

#define HMT_NATIVE_FLOAT16
struct NativeFloat16 {
  using Vector = __m128i;
  static __m256 widen(Vector x) { return _mm256_cvtph_ps(x); }
  static Vector narrow(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace hmt::cpu

#include "recall_kernels.h"

namespace hmt::cpu {
constexpr Kernels kAvx2 = make_kernels("avx2");
}

HMT_TARGET_END
#endif
