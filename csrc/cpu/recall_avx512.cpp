// memory_recall with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "recall.h"
#include "target.h"

HMT_TARGET_BEGIN("avx512f,avx512bw,fma,f16c")

namespace hmt::cpu {
namespace {

constexpr int kLanes = 16;

#define HMT_NATIVE_FLOAT16
struct NativeFloat16 {
  using Vector = __m256i;
  static __m512 widen(Vector x) { return _mm512_maskz_cvtph_ps(0xffff, x); }
  static Vector narrow(__m512 x) { return _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace hmt::cpu

#include "recall_kernels.h"

namespace hmt::cpu {
constexpr Kernels kAvx512 = make_kernels("avx512");
}

HMT_TARGET_END
#endif
