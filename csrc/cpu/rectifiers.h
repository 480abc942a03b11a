// One functor per rectifier; a new one is a functor here and a case in rectify_run.h.
#pragma once

#include "core/rectifier.h"
#include "cpu/lanes.h"

namespace layer_collapse {
namespace LC_MACHINE {

// The counters of a channel, in the order of a ledger.
inline constexpr int kPositive = 0, kNegative = 1, kNan = 2, kExtra = 3;

// apply        what torch computes, on lanes of float or double
// apply_bits   if kOnBits: the same on the bits of halves, which are otherwise computed in float
//              and rounded once
// kOnSign      floats go through sign_counts.h, which knows what to do
struct Relu {
  static constexpr Kind kind = Kind::relu;
  static constexpr bool kOnBits = true, kOnSign = true, kSloped = false;
  // Not max(v, 0): NaN and -0.0 stay, as in torch.relu.
  template <typename V>
  static LC_INLINE V apply(V v, V) {
    return select(v < 0, V{}, v);
  }
  template <typename T, typename V>
  static LC_INLINE V apply_bits(V v) {
    return select(is_negative<T>(v), V{}, v);
  }
};
struct Relu6 {
  static constexpr Kind kind = Kind::relu6;
  static constexpr bool kOnBits = true, kOnSign = true, kSloped = false;
  template <typename V>
  static LC_INLINE V apply(V v, V) {
    const V rectified = select(v < 0, V{}, v);
    return select(rectified > 6, V{} + 6, rectified);
  }
  template <typename T, typename V>
  static LC_INLINE V apply_bits(V v) {
    const V rectified = select(is_negative<T>(v), V{}, v);
    const V six = V{} + static_cast<int16_t>(HalfBits<T>::kSix);
    return select(is_above_six<T>(v), six, rectified);
  }
};
struct LeakyRelu {
  static constexpr Kind kind = Kind::leaky_relu;
  static constexpr bool kOnBits = false, kOnSign = false, kSloped = true;
  template <typename V>
  static LC_INLINE V apply(V v, V slope) {
    return select(v > 0, v, v * slope);
  }
};
struct Hardswish {
  static constexpr Kind kind = Kind::hardswish;
  static constexpr bool kOnBits = false, kOnSign = false, kSloped = false;
  template <typename V>
  static LC_INLINE V apply(V v, V none) {
    return v * Relu6::apply(v + 3, none) / 6;
  }
};
// Counts alone, for rectifiers whose output torch computes (GELU, SiLU).
struct CountOnly {
  static constexpr Kind kind = Kind::gelu;
  static constexpr bool kOnBits = false, kOnSign = true, kSloped = false;
};

template <typename Rectifier>
inline constexpr bool kWrites = !std::is_same_v<Rectifier, CountOnly>;

// y: kLanes elements; slopes: one per lane, read by sloped rectifiers only.
template <typename Rectifier, typename T>
LC_INLINE void activate(typename Lanes<T>::Values v, T* y, const Compute<T>* slopes) {
  using Wide = typename Lanes<T>::Wide;
  if constexpr (!kWrites<Rectifier>) {
    return;
  } else if constexpr (!Lanes<T>::kHalf) {
    const Wide slope = Rectifier::kSloped ? load<Wide>(slopes) : Wide{};
    store(y, Rectifier::apply(v, slope));
  } else if constexpr (Rectifier::kOnBits) {
    store(y, Rectifier::template apply_bits<T>(v));
  } else {
    T halves[kLanes<T>];
    Compute<T> wide[kLanes<T>];
    store(halves, v);
    for (int i = 0; i < kLanes<T>; ++i) wide[i] = static_cast<Compute<T>>(halves[i]);
    for (int i = 0; i < kLanes<T>; i += kLanes<Compute<T>>) {
      const Wide slope = Rectifier::kSloped ? load<Wide>(slopes + i) : Wide{};
      store(wide + i, Rectifier::apply(load<Wide>(wide + i), slope));
    }
    for (int i = 0; i < kLanes<T>; ++i) y[i] = static_cast<T>(wide[i]);
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
