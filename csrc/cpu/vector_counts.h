// Rectifiers and their counts on a few vectors of any dtype. Part of a machine's code: see
// rectify_loops.h. Floats have a shorter way for some of them: sign_counts.h.
#pragma once

#include <cstdint>

#include "cpu/rectifiers.h"

namespace layer_collapse {
namespace LC_MACHINE {

// One counter per lane (plane loop), at most the largest BitsOf<T>; or one per byte of a lane
// (column loop), at most 255: byte i of a lane counts in vector i of a group.
template <typename Rectifier, typename T, bool kBytes>
struct Tally {
  using Mask = typename Lanes<T>::Mask;
  static constexpr int kRows = count_rows(Rectifier::kind);
  Mask rows[kRows] = {};

  // holds: -1 in the lanes to count.
  template <int row>
  LC_INLINE void add(Mask holds, int vector) {
    rows[row] -= holds << (kBytes ? 8 * vector : 0);
  }
};

// kVectors vectors of x, one after the other, into y, which may be x. keep: per vector, -1 where an
// element counts, read if kMasked.
template <bool kMasked, int kVectors, typename Rectifier, typename T, bool kBytes>
LC_INLINE void rectify_group(const T* x, T* y, const Compute<T>* slopes,
                             const typename Lanes<T>::Mask* keep,
                             Tally<Rectifier, T, kBytes>& tally) {
  using Values = typename Lanes<T>::Values;
  using Mask = typename Lanes<T>::Mask;
  constexpr int64_t step = kLanes<T>;
  Values v[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) v[i] = load<Values>(x + i * step);

#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const Mask kept = kMasked ? keep[i] : ~Mask{};
    const Mask negative = is_negative<T>(v[i]);
    tally.template add<kPositive>(is_positive<T>(v[i]) & kept, i);
    tally.template add<kNegative>(negative & kept, i);
    tally.template add<kNan>(is_nan<T>(v[i]) & kept, i);
    if constexpr (Rectifier::kind == Kind::relu6) {
      tally.template add<kExtra>(is_above_six<T>(v[i]) & kept, i);
    } else if constexpr (Rectifier::kind == Kind::hardswish) {
      tally.template add<kExtra>(is_within_three<T>(v[i]) & kept, i);
    }
    activate<Rectifier>(v[i], y + i * step, slopes + (kBytes && Rectifier::kSloped ? i * step : 0));
  }
}

// The same for the first n elements of a group, by way of a group of zeros that do not count.
template <int kVectors, typename Rectifier, typename T, bool kBytes>
LC_INLINE void rectify_tail(const T* x, T* y, int64_t n, const Compute<T>* slopes,
                            const typename Lanes<T>::Mask* keep,
                            Tally<Rectifier, T, kBytes>& tally) {
  alignas(64) T padded[kVectors * kLanes<T>];
  IntegerOf<sizeof(T)> kept[kVectors * kLanes<T>], given[kVectors * kLanes<T>];
  std::memset(static_cast<void*>(padded), 0, sizeof(padded));
  std::memcpy(static_cast<void*>(padded), x, n * sizeof(T));
  for (int i = 0; keep && i < kVectors; ++i) store(given + i * kLanes<T>, keep[i]);
  for (int i = 0; i < kVectors * kLanes<T>; ++i) kept[i] = i < n && (!keep || given[i]) ? -1 : 0;
  typename Lanes<T>::Mask counted[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    counted[i] = load<typename Lanes<T>::Mask>(kept + i * kLanes<T>);
  }
  rectify_group<true, kVectors>(padded, padded, slopes, counted, tally);
  if constexpr (kWrites<Rectifier>) {
    std::memcpy(static_cast<void*>(y), padded, n * sizeof(T));
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
