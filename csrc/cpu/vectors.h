// Vectors of kLanes floats, and rows of float32, float16 or bfloat16 read and written as such. Included by one file per
// instruction set, which defines kLanes before; everything is internal to that file.
#pragma once

#include <cstdint>
#include <cstring>

#define HMT_INLINE __attribute__((always_inline))  // for the bodies of loops, which a compiler may find too long

namespace hmt::cpu {
namespace {

using f32 = float __attribute__((vector_size(4 * kLanes)));
using u32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using s32 = int32_t __attribute__((vector_size(4 * kLanes)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline u32 select(s32 mask, u32 yes, u32 no) {
  return (yes & bits<u32>(mask)) | (no & ~bits<u32>(mask));
}

template <int kCount>
struct Floats {
  typedef float Vector __attribute__((vector_size(4 * kCount)));
};

template <int kCount>
inline float sum_of(typename Floats<kCount>::Vector x) {
  typename Floats<kCount / 2>::Vector halves[2];
  std::memcpy(halves, &x, sizeof x);
  if constexpr (kCount == 4) {
    const auto pair = halves[0] + halves[1];
    return pair[0] + pair[1];
  } else {
    return sum_of<kCount / 2>(halves[0] + halves[1]);
  }
}

inline float sum(f32 x) {
  return sum_of<kLanes>(x);
}

// exp(x) for x <= 0, to 2 units in the last place; zero where that would be subnormal.
inline f32 exp_of_negative(f32 x) {
  const f32 shifted = x * 0x1.715476p+0f + 0x1.8p+23f;  // x / ln 2, rounded to an integer in the last bits
  const f32 n = shifted - 0x1.8p+23f;
  const f32 r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts
  f32 y = r * 0x1.6c16c2p-10f + 0x1.111112p-7f;                // the series of exp, to r^6
  y = y * r + 0x1.555556p-5f;
  y = y * r + 0x1.555556p-3f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const u32 power = (bits<u32>(shifted) + 127) << 23;
  const f32 scaled = y * bits<f32>(power);
  return bits<f32>(bits<u32>(scaled) & ~bits<u32>(x < -87.0f));
}

// A block is 2 kLanes elements of a row. Widened it is two vectors, in an order of the dtype's own: since all that
// is done to rows is done element by element, or summed, the order never shows.
constexpr int64_t kBlock = 2 * kLanes;

struct Pair {
  f32 a, b;
};

template <class Vector>
inline Vector load_vector(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Vector>
inline void store_vector(void* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

inline Pair load_pair(const float* from) {
  return {load_vector<f32>(from), load_vector<f32>(from + kLanes)};
}

inline void store_pair(float* to, Pair x) {
  store_vector(to, x.a);
  store_vector(to + kLanes, x.b);
}

inline Pair scale(float factor, Pair x) {
  return {factor * x.a, factor * x.b};
}

inline Pair multiply_add(float factor, Pair x, Pair sum) {
  return {factor * x.a + sum.a, factor * x.b + sum.b};
}

struct Float32 {
  using Element = float;
  using Block = Pair;
  static Block load(const Element* from) { return load_pair(from); }
  static void store(Element* to, Block x) { store_pair(to, x); }
  static Pair widen(Block x) { return x; }
  static Block narrow(Pair x) { return x; }
  static f32 dot(f32 sum, Block x, Block y) { return sum + x.a * y.a + x.b * y.b; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Block = u32;
  static Block load(const Element* from) { return load_vector<u32>(from); }
  static void store(Element* to, Block x) { store_vector(to, x); }
  static Pair widen(Block x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));  // loaded once: gcc would take it from memory twice
#endif
    return {bits<f32>(x << 16), bits<f32>(x & 0xffff0000u)};
  }
  static Block narrow(Pair x) { return (round(x.a) >> 16) | (round(x.b) & 0xffff0000u); }
  static f32 dot(f32 sum, Block x, Block y) {
#ifdef HMT_NATIVE_BFLOAT16
    return native_bfloat16_dot(sum, x, y);
#else
    const Pair p = widen(x), q = widen(y);
    return sum + p.a * q.a + p.b * q.b;
#endif
  }

 private:
  // To nearest, ties to even, in the upper 16 bits; a NaN stays one.
  static u32 round(f32 x) {
    const u32 i = bits<u32>(x);
    return select(x != x, i | 0x400000u, i + 0x7fffu + ((i >> 16) & 1u));
  }
};

struct Float16 {
  using Element = uint16_t;
#ifdef HMT_NATIVE_FLOAT16
  using Half = NativeFloat16::Vector;
  struct Block {
    Half a, b;
  };
  static Block load(const Element* from) { return {load_vector<Half>(from), load_vector<Half>(from + kLanes)}; }
  static void store(Element* to, Block x) {
    store_vector(to, x.a);
    store_vector(to + kLanes, x.b);
  }
  static Pair widen(Block x) { return {NativeFloat16::widen(x.a), NativeFloat16::widen(x.b)}; }
  static Block narrow(Pair x) { return {NativeFloat16::narrow(x.a), NativeFloat16::narrow(x.b)}; }
#else
  using Block = u32;
  static Block load(const Element* from) { return load_vector<u32>(from); }
  static void store(Element* to, Block x) { store_vector(to, x); }
  static Pair widen(Block x) { return {widen_half(x & 0xffffu), widen_half(x >> 16)}; }
  static Block narrow(Pair x) { return narrow_half(x.a) | (narrow_half(x.b) << 16); }
#endif
  static f32 dot(f32 sum, Block x, Block y) {
    const Pair p = widen(x), q = widen(y);
    return sum + p.a * q.a + p.b * q.b;
  }

#ifndef HMT_NATIVE_FLOAT16
 private:
  static f32 widen_half(u32 x) {
    const u32 magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    const u32 finite = bits<u32>(bits<f32>(magnitude) * 0x1p112f);
    return bits<f32>(sign | select(bits<s32>(magnitude) >= 0x0f800000, magnitude | 0x7f800000u, finite));
  }

  // To nearest, ties to even.
  static u32 narrow_half(f32 x) {
    const u32 i = bits<u32>(x), magnitude = i & 0x7fffffffu, sign = (i >> 16) & 0x8000u;
    const s32 order = bits<s32>(magnitude);
    const u32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Added to 0.5, a subnormal half's unit is the last bit of the mantissa.
    const u32 subnormal = bits<u32>(bits<f32>(magnitude) + 0.5f) - 0x3f000000u;
    u32 half = select(order < 0x38800000, subnormal, normal);
    half = select(order >= 0x477ff000, half * 0u + 0x7c00u, half);
    return sign | select(order > 0x7f800000, half * 0u + 0x7e00u, half);
  }
#endif
};

// A row's last block may hold fewer than kBlock elements: the rest reads as zero and is not written.
struct Whole {};
struct Part {
  int64_t count;
};

template <class E>
inline typename E::Block load(const typename E::Element* from, Whole) {
  return E::load(from);
}

template <class E>
inline typename E::Block load(const typename E::Element* from, Part part) {
  typename E::Element elements[kBlock] = {};
  std::memcpy(elements, from, part.count * sizeof *from);
  return E::load(elements);
}

template <class E>
inline void store(typename E::Element* to, Pair x, Whole) {
  E::store(to, E::narrow(x));
}

template <class E>
inline void store(typename E::Element* to, Pair x, Part part) {
  typename E::Element elements[kBlock];
  E::store(elements, E::narrow(x));
  std::memcpy(to, elements, part.count * sizeof *to);
}

// Calls body(k, Whole or Part) for every block of columns, k being its first.
template <class Body>
inline void for_each_block(int64_t dim, Body body) {
  int64_t k = 0;
  for (; k + kBlock <= dim; k += kBlock) body(k, Whole());
  if (k < dim) body(k, Part{dim - k});
}

}  // namespace
}  // namespace hmt::cpu
