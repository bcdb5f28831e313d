// ldmatrix and mma.m16n8k16 as functions of a whole warp, with the fragments as the PTX ISA lays them out: lane l is in
// group l / 4 and has place l % 4 in it.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

inline float widen(__half, uint32_t bits) {
  return __half2float({static_cast<uint16_t>(bits)});
}
inline float widen(__nv_bfloat16, uint32_t bits) {
  return __bfloat162float({static_cast<uint16_t>(bits)});
}
inline uint32_t narrow(__half, float x) {
  return __float2half_rn(x).bits;
}
inline uint32_t narrow(__nv_bfloat16, float x) {
  return __float2bfloat16_rn(x).bits;
}

// Two sets of the warp in turn, so that one barrier is enough.
inline Matrices& next_matrices(Thread* self) {
  return self->warp->matrices[self->matrix_instructions++ % 2];
}

// Register i of lane l gets two neighbours of row l / 4 of matrix i, whose row r has the address of lane 8 i + r.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix needs addresses that are multiples of 16");
  Thread* self = current_thread;
  const unsigned lane = self->index.x % 32;
  Matrices& matrices = next_matrices(self);
  matrices.row[lane] = static_cast<const unsigned char*>(row);
  wait_at(self->warp->barrier, "ldmatrix");
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t element[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned along = lane % 4 * 2 + e, across = lane / 4;
      const unsigned r = transposed ? along : across, c = transposed ? across : along;
      std::memcpy(&element[e], matrices.row[8 * i + r] + 2 * c, 2);
    }
    to[i] = element[0] | static_cast<uint32_t>(element[1]) << 16;
  }
}

}  // namespace emulation

namespace hmt::cuda {

inline void ldmatrix(uint32_t (&to)[4], const void* row) {
  emulation::load_matrices(to, row, false);
}

inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  emulation::load_matrices(to, row, true);
}

// a: registers 0 to 3 hold columns 2 place, 2 place + 1 of rows group and group + 8, then the same eight columns on;
// b: registers 0 and 1 hold rows 2 place, 2 place + 1 of column group, then eight rows on;
// c: elements 0 to 3 are columns 2 place, 2 place + 1 of row group, then of row group + 8.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Thread* self = emulation::current_thread;
  const unsigned group = self->index.x % 32 / 4, place = self->index.x % 4;
  emulation::Matrices& matrices = emulation::next_matrices(self);
  const uint32_t b[2] = {b0, b1};
  for (unsigned e = 0; e < 2; ++e) {
    for (unsigned i = 0; i < 4; ++i) {
      matrices.a[group + i % 2 * 8][place * 2 + e + i / 2 * 8] = emulation::widen(T(), a[i] >> 16 * e & 0xffff);
    }
    for (unsigned i = 0; i < 2; ++i) {
      matrices.b[place * 2 + e + i * 8][group] = emulation::widen(T(), b[i] >> 16 * e & 0xffff);
    }
  }
  emulation::wait_at(self->warp->barrier, "mma");
  for (unsigned e = 0; e < 4; ++e) {
    float sum = 0.0f;
    for (unsigned k = 0; k < 16; ++k) sum += matrices.a[group + e / 2 * 8][k] * matrices.b[k][place * 2 + e % 2];
    c[e] += sum;
  }
}

template <typename T>
uint32_t pack(float first, float second) {
  return emulation::narrow(T(), first) | emulation::narrow(T(), second) << 16;
}

inline int not_hoisted(int x) {
  return x;
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

}  // namespace hmt::cuda
