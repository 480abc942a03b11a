// Halves as the floats that are computed with, a cache line at a time. Part of a machine's code:
// see rectify_loops.h. GCC 12 finds the instructions for bfloat16 by itself, those for float16 not.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "cpu/dispatch.h"

namespace layer_collapse {
namespace LC_MACHINE {

inline constexpr int kLineHalves = 32;

// Eight at a time: GCC takes comparisons of wider vectors apart, and plain loops are not vectorised
// within the steps.
typedef uint16_t EightHalves __attribute__((vector_size(16)));
typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef float EightFloats __attribute__((vector_size(32)));

LC_INLINE void widen(const BFloat16* from, float* to) {
  for (int i = 0; i < kLineHalves; i += 8) {
    EightHalves halves;
    std::memcpy(&halves, static_cast<const void*>(from + i), sizeof(halves));
    const EightWords words = __builtin_convertvector(halves, EightWords) << 16;
    std::memcpy(to + i, &words, sizeof(words));
  }
}

// To the nearest, ties to even; a NaN stays one.
LC_INLINE void narrow(const float* from, BFloat16* to) {
  for (int i = 0; i < kLineHalves; i += 8) {
    EightWords words;
    EightFloats floats;
    std::memcpy(&words, from + i, sizeof(words));
    std::memcpy(&floats, from + i, sizeof(floats));
    const EightWords rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;
    const auto number = (EightWords)(floats == floats);
    const EightHalves halves =
        __builtin_convertvector((rounded & number) | (0x7FC0 & ~number), EightHalves);
    std::memcpy(static_cast<void*>(to + i), &halves, sizeof(halves));
  }
}

#if defined(LC_AVX512)
LC_INLINE void widen(const Half* from, float* to) {
  for (int i = 0; i < kLineHalves; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(0xFFFF, halves));  // maskz: see registers.h
  }
}
LC_INLINE void narrow(const float* from, Half* to) {
  for (int i = 0; i < kLineHalves; i += 16) {
    const __m256i halves = _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(from + i), 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
}
#elif defined(LC_AVX2)
LC_INLINE void widen(const Half* from, float* to) {
  for (int i = 0; i < kLineHalves; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
}
LC_INLINE void narrow(const float* from, Half* to) {
  for (int i = 0; i < kLineHalves; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
}
#else
LC_INLINE void widen(const Half* from, float* to) {
  for (int i = 0; i < kLineHalves; ++i) to[i] = static_cast<float>(from[i]);
}
LC_INLINE void narrow(const float* from, Half* to) {
  for (int i = 0; i < kLineHalves; ++i) to[i] = static_cast<Half>(from[i]);
}
#endif

// The numbers of a line as a loop computes with them: floats and doubles where they lie, halves as
// floats until close() rounds them. A whole line at once, or one by one at the end of a tensor.
template <typename T>
class Numbers {
 public:
  using Real = Compute<T>;

  LC_INLINE const Real* open(const T* memory, int64_t count) {
    if constexpr (std::is_same_v<T, Real>) {
      return memory;
    } else {
      if (count == kLineHalves) {
        widen(memory, room_);
      } else {
        for (int64_t i = 0; i < count; ++i) room_[i] = static_cast<Real>(memory[i]);
      }
      return room_;
    }
  }
  LC_INLINE Real* open(T* memory, int64_t count) {
    return const_cast<Real*>(open(static_cast<const T*>(memory), count));
  }
  LC_INLINE void close(T* memory, int64_t count) const {
    if constexpr (!std::is_same_v<T, Real>) {
      if (count == kLineHalves) {
        narrow(room_, memory);
      } else {
        for (int64_t i = 0; i < count; ++i) memory[i] = static_cast<T>(room_[i]);
      }
    }
  }

 private:
  Real room_[std::is_same_v<T, Real> ? 1 : kLineHalves];
};

}  // namespace LC_MACHINE
}  // namespace layer_collapse
