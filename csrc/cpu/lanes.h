// 64 bytes of a tensor as one vector, and the signs of its elements. Part of a machine's code: see
// rectify_loops.h.
//
// A comparison yields integers of the element's width, -1 where it holds.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/pack.h"

namespace layer_collapse {
namespace LC_MACHINE {

template <typename T>
inline constexpr int kLanes = 64 / sizeof(T);

template <typename T>
struct Lanes {
  using Bits = IntegerOf<sizeof(T)>;
  using Unsigned = std::make_unsigned_t<Bits>;
  static constexpr bool kHalf = sizeof(T) == 2;  // no machine computes with these: bits alone

  using Mask = Vector<Bits>;  // and counters
  using Words = Vector<Unsigned>;
  using Values = Vector<std::conditional_t<kHalf, Bits, T>>;
  using Wide = Vector<Compute<T>>;  // what arithmetic on halves runs in
};

// Bit patterns of a half type; between two positive ones the order is that of the numbers.
template <typename T>
struct HalfBits;
template <>
struct HalfBits<BFloat16> {
  static constexpr uint16_t kThree = 0x4040, kSix = 0x40C0, kInfinity = 0x7F80;
};
template <>
struct HalfBits<Half> {
  static constexpr uint16_t kThree = 0x4200, kSix = 0x4600, kInfinity = 0x7C00;
};
inline constexpr uint16_t kHalfSign = 0x8000;

// lowest <= bits <= highest as one unsigned comparison.
template <typename T>
LC_INLINE typename Lanes<T>::Mask bits_between(typename Lanes<T>::Values v, uint16_t lowest,
                                               uint16_t highest) {
  using Words = typename Lanes<T>::Words;
  const Words above = bits_as<Words>(v) - lowest;
  return above <= static_cast<uint16_t>(highest - lowest);
}

template <typename T>
LC_INLINE typename Lanes<T>::Mask is_positive(typename Lanes<T>::Values v) {
  if constexpr (Lanes<T>::kHalf) {
    return bits_between<T>(v, 1, HalfBits<T>::kInfinity);
  } else {
    return v > 0;
  }
}

template <typename T>
LC_INLINE typename Lanes<T>::Mask is_negative(typename Lanes<T>::Values v) {
  if constexpr (Lanes<T>::kHalf) {
    return bits_between<T>(v, kHalfSign + 1, kHalfSign + HalfBits<T>::kInfinity);
  } else {
    return v < 0;
  }
}

template <typename T>
LC_INLINE typename Lanes<T>::Mask is_nan(typename Lanes<T>::Values v) {
  using Words = typename Lanes<T>::Words;
  if constexpr (Lanes<T>::kHalf) {
    return (bits_as<Words>(v) & 0x7FFF) > HalfBits<T>::kInfinity;
  } else {
    return v != v;
  }
}

template <typename T>
LC_INLINE typename Lanes<T>::Mask is_above_six(typename Lanes<T>::Values v) {
  if constexpr (Lanes<T>::kHalf) {
    return bits_between<T>(v, HalfBits<T>::kSix + 1, HalfBits<T>::kInfinity);
  } else {
    return v > 6;
  }
}

// -3 < v < 3
template <typename T>
LC_INLINE typename Lanes<T>::Mask is_within_three(typename Lanes<T>::Values v) {
  using Words = typename Lanes<T>::Words;
  if constexpr (Lanes<T>::kHalf) {
    return (bits_as<Words>(v) & 0x7FFF) < HalfBits<T>::kThree;
  } else {
    return (v > -3) & (v < 3);
  }
}

// The sum of all lanes, modulo 2^32 for 32-bit ones.
template <typename T>
LC_INLINE int64_t sum_lanes(typename Lanes<T>::Mask lanes) {
  if constexpr (sizeof(T) == sizeof(int16_t)) {
    const auto pairs = bits_as<Vector<int32_t>>(lanes);
    return sum_lanes<float>(((pairs << 16) >> 16) + (pairs >> 16));
  } else {
    const auto part = sum_of_parts(lanes);
    constexpr int kCount = sizeof(part) / sizeof(T);
    if constexpr (sizeof(T) == sizeof(int32_t) && kCount > 4) {
      typedef int32_t Quarter __attribute__((vector_size(16)));
      Quarter quarters[kCount / 4];
      std::memcpy(quarters, &part, sizeof(part));
      Quarter four = quarters[0];
      for (int i = 1; i < kCount / 4; ++i) four += quarters[i];
      const Quarter two = four + __builtin_shuffle(four, Quarter{2, 3, 0, 1});
      return two[0] + two[1];
    } else {
      int64_t sum = 0;
      for (int lane = 0; lane < kCount; ++lane) sum += part[lane];
      return sum;
    }
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
