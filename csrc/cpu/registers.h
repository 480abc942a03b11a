// What the loops over floats ask of a machine, on one register of it. Part of a machine's code: see
// rectify_loops.h. Where an operation picks an operand, it picks the second one if either is NaN
// or both are zeros.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/dispatch.h"

namespace layer_collapse {
namespace LC_MACHINE {

// load, store  of lanes that lie anywhere
// max, min     of lanes
// narrow32     the int32 lanes of a, then b, as int16; narrow16: int16 as int8. Both saturate, and
//              go through the registers in parts of 16 bytes: first part of a, first part of b, ...
// byte_sums    of the 8 bytes of every 64-bit lane
// unordered    all bits of the lanes in which a or b is NaN; not with AVX-512, which has masks
#if defined(LC_AVX512)
// maskz: the plain intrinsics make GCC 12 warn of a variable of its own.
struct Register {
  using Floats = __m512;
  using Bits = __m512i;
  static LC_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static LC_INLINE void store(float* y, Floats v) { _mm512_storeu_ps(y, v); }
  static LC_INLINE Floats max(Floats a, Floats b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
  static LC_INLINE Floats min(Floats a, Floats b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
  static LC_INLINE Bits narrow32(Bits a, Bits b) { return _mm512_packs_epi32(a, b); }
  static LC_INLINE Bits narrow16(Bits a, Bits b) { return _mm512_packs_epi16(a, b); }
  static LC_INLINE Bits byte_sums(Bits a) { return _mm512_sad_epu8(a, _mm512_setzero_si512()); }
};
#elif defined(LC_AVX2)
struct Register {
  using Floats = __m256;
  using Bits = __m256i;
  static LC_INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static LC_INLINE void store(float* y, Floats v) { _mm256_storeu_ps(y, v); }
  static LC_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static LC_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static LC_INLINE Bits narrow32(Bits a, Bits b) { return _mm256_packs_epi32(a, b); }
  static LC_INLINE Bits narrow16(Bits a, Bits b) { return _mm256_packs_epi16(a, b); }
  static LC_INLINE Bits byte_sums(Bits a) { return _mm256_sad_epu8(a, _mm256_setzero_si256()); }
  static LC_INLINE Floats unordered(Floats a, Floats b) {
    return _mm256_cmp_ps(a, b, _CMP_UNORD_Q);
  }
};
#elif defined(__x86_64__)
struct Register {
  using Floats = __m128;
  using Bits = __m128i;
  static LC_INLINE Floats load(const float* x) { return _mm_loadu_ps(x); }
  static LC_INLINE void store(float* y, Floats v) { _mm_storeu_ps(y, v); }
  static LC_INLINE Floats max(Floats a, Floats b) { return _mm_max_ps(a, b); }
  static LC_INLINE Floats min(Floats a, Floats b) { return _mm_min_ps(a, b); }
  static LC_INLINE Bits narrow32(Bits a, Bits b) { return _mm_packs_epi32(a, b); }
  static LC_INLINE Bits narrow16(Bits a, Bits b) { return _mm_packs_epi16(a, b); }
  static LC_INLINE Bits byte_sums(Bits a) { return _mm_sad_epu8(a, _mm_setzero_si128()); }
  static LC_INLINE Floats unordered(Floats a, Floats b) { return _mm_cmpunord_ps(a, b); }
};
#else
struct Register {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
  static LC_INLINE Floats load(const float* x) {
    Floats v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  }
  static LC_INLINE void store(float* y, Floats v) { std::memcpy(y, &v, sizeof(v)); }
  static LC_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static LC_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
  static LC_INLINE Bits narrow32(Bits a, Bits b) { return narrow<int32_t, int16_t>(a, b); }
  static LC_INLINE Bits narrow16(Bits a, Bits b) { return narrow<int16_t, int8_t>(a, b); }
  static LC_INLINE Floats unordered(Floats a, Floats b) { return (Floats)((a != a) | (b != b)); }
  static LC_INLINE Bits byte_sums(Bits a) {
    uint8_t bytes[16];
    std::memcpy(bytes, &a, sizeof(a));
    Bits sums{};
    for (int i = 0; i < 16; ++i) sums[i / 8] += bytes[i];
    return sums;
  }

 private:
  template <typename Wide, typename Narrow>
  static LC_INLINE Bits narrow(Bits a, Bits b) {
    constexpr int kLanes = 16 / sizeof(Wide);
    Wide wide[2 * kLanes];
    std::memcpy(wide, &a, sizeof(a));
    std::memcpy(wide + kLanes, &b, sizeof(b));
    Narrow narrowed[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) {
      narrowed[i] = std::clamp<Wide>(wide[i], std::numeric_limits<Narrow>::min(),
                                     std::numeric_limits<Narrow>::max());
    }
    Bits bits;
    std::memcpy(&bits, narrowed, sizeof(bits));
    return bits;
  }
};
#endif

}  // namespace LC_MACHINE
}  // namespace layer_collapse
