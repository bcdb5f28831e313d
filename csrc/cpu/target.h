// HMT_TARGET_BEGIN("avx2,fma") ... HMT_TARGET_END: functions in between are compiled for these instructions, whatever
// the compiler's flags, and must only be called where the processor has them. Include all other headers before: what
// they define inline may be shared with code for lesser processors.
#pragma once

#define HMT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HMT_TARGET_BEGIN(features) \
  HMT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HMT_TARGET_END HMT_PRAGMA(clang attribute pop)
#else
// Without an end: gcc compiles templates at the end of the file, with the options it finds there.
#define HMT_TARGET_BEGIN(features) HMT_PRAGMA(GCC target(features))
#define HMT_TARGET_END
#endif
