// 64 bytes of a tensor as one vector, and the signs of its elements. Part of a machine's code: see
// rectify_loops.h.
//
// GCC's vector extension: one 512-bit register where the machine has them, two of 256 bits or four
// of 128 otherwise. A comparison yields integers of the element's width, -1 where it holds.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"

namespace layer_collapse {
namespace LC_MACHINE {

template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 2, int16_t,
                                  std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;

template <typename T>
inline constexpr int kLanes = 64 / sizeof(T);

template <typename T>
struct Lanes {
  using Bits = BitsOf<T>;
  using Unsigned = std::make_unsigned_t<Bits>;
  static constexpr bool kHalf = sizeof(T) == 2;  // no machine computes with these: bits alone

  typedef Bits Mask __attribute__((vector_size(64)));  // and counters
  typedef Unsigned Words __attribute__((vector_size(64)));
  typedef int8_t Bytes __attribute__((vector_size(64 / sizeof(T))));
  typedef std::conditional_t<kHalf, Bits, T> Element;
  typedef Element Values __attribute__((vector_size(64)));
  typedef Compute<T> Wide __attribute__((vector_size(64)));  // what arithmetic on halves runs in
};

template <typename To, typename From>
LC_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
LC_INLINE V load(const T* source) {
  V v;
  std::memcpy(&v, source, sizeof(v));
  return v;
}

template <typename V, typename T>
LC_INLINE void store(T* target, V v) {
  std::memcpy(target, &v, sizeof(v));
}

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
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    typedef int32_t Half __attribute__((vector_size(32)));
    typedef int32_t Quarter __attribute__((vector_size(16)));
    Half halves[2];
    std::memcpy(halves, &lanes, sizeof(halves));
    const Half half = halves[0] + halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, &half, sizeof(quarters));
    const Quarter four = quarters[0] + quarters[1];
    const Quarter two = four + __builtin_shuffle(four, Quarter{2, 3, 0, 1});
    return two[0] + two[1];
  } else {
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += lanes[lane];
    return sum;
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
