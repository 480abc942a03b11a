// The fused loops: activate and count in one traversal.
//
// A tensor is seen as [outer, C, inner] in the order of its storage. Where inner is large, a row of
// `inner` elements belongs to one channel and its counters stay in registers (plane loop). Else
// every element of a row is a column with a counter of its own (column loop): one byte, so that the
// counters of thousands of columns stay in the nearest cache and rows are read in sequence.
//
// This file, those that it is made of and rectify_run.h are compiled once per machine, in a
// namespace and with the instructions of that machine (machines/*.cpp): GCC takes vectors of 64
// bytes apart when it reads a function, so a clone that is made later comes too late.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/rectifiers.h"

namespace layer_collapse {
namespace LC_MACHINE {

// Counters of a loop. From nonzero and negative follows positive; together they take one
// instruction less than the two signs.
inline constexpr int kNonzero = 0, kNegative = 1, kNan = 2, kExtra = 3;

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
// element counts, read if kMasked. Returns whether rows[kNan] may have changed.
template <bool kMasked, int kVectors, typename Rectifier, typename T, bool kBytes>
LC_INLINE bool rectify_group(const T* x, T* y, const Compute<T>* slopes,
                             const typename Lanes<T>::Mask* keep,
                             Tally<Rectifier, T, kBytes>& tally) {
  using Values = typename Lanes<T>::Values;
  using Mask = typename Lanes<T>::Mask;
  constexpr int64_t step = kLanes<T>;
  Values v[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) v[i] = load<Values>(x + i * step);

  if constexpr (std::is_same_v<T, float> && Rectifier::kOnSign && !kMasked && kVectors == 4) {
    if (!has_nan(v)) [[likely]] {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const auto bits = bits_as<Mask>(v[i] + Values{});  // makes -0.0 to 0.0
        const Mask sign = bits >> 31;
        tally.rows[kNonzero] += at_most_one(bits) << (kBytes ? 8 * i : 0);
        tally.template add<kNegative>(sign, i);
        if constexpr (Rectifier::kind == Kind::relu6) {
          tally.template add<kExtra>(bits_as<Mask>(6 - v[i]) >> 31, i);  // -1 where v > 6
        }
        if constexpr (kWrites<Rectifier>) store(y + i * step, Rectifier::apply_ordered(v[i], sign));
      }
      return false;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const Mask kept = kMasked ? keep[i] : ~Mask{};
    const Mask negative = is_negative<T>(v[i]);
    tally.template add<kNonzero>((is_positive<T>(v[i]) | negative) & kept, i);
    tally.template add<kNegative>(negative & kept, i);
    tally.template add<kNan>(is_nan<T>(v[i]) & kept, i);
    if constexpr (Rectifier::kind == Kind::relu6) {
      tally.template add<kExtra>(is_above_six<T>(v[i]) & kept, i);
    } else if constexpr (Rectifier::kind == Kind::hardswish) {
      tally.template add<kExtra>(is_within_three<T>(v[i]) & kept, i);
    }
    activate<Rectifier>(v[i], y + i * step, slopes + (kBytes && Rectifier::kSloped ? i * step : 0));
  }
  return true;
}

// The same for the first n elements of a group, by way of a group of zeros that do not count.
template <int kVectors, typename Rectifier, typename T, bool kBytes>
LC_INLINE void rectify_tail(const T* x, T* y, int64_t n, const Compute<T>* slopes,
                            const typename Lanes<T>::Mask* keep,
                            Tally<Rectifier, T, kBytes>& tally) {
  alignas(64) T padded[kVectors * kLanes<T>];
  typename Lanes<T>::Mask kept[kVectors];
  std::memset(static_cast<void*>(padded), 0, sizeof(padded));
  std::memcpy(static_cast<void*>(padded), x, n * sizeof(T));
  for (int i = 0; i < kVectors * kLanes<T>; ++i) {
    const int vector = i / kLanes<T>, lane = i % kLanes<T>;
    kept[vector][lane] = i < n && (keep == nullptr || keep[vector][lane]) ? -1 : 0;
  }
  rectify_group<true, kVectors>(padded, padded, slopes, kept, tally);
  if constexpr (kWrites<Rectifier>) {
    std::memcpy(static_cast<void*>(y), padded, n * sizeof(T));
  }
}

// What the loops read and write. Pointers are to the whole tensor, in the order of its storage.
template <typename T>
struct Span {
  const T* x;
  T* y;
  const bool* valid;         // [outer * inner], null: every position counts
  const Compute<T>* slopes;  // one per channel (plane loop) or per column; null without slopes
  int64_t channels;          // of the plane loop
  int64_t width;             // elements of a row
};

// -1 in the lanes whose valid [n <= kLanes] is true.
template <typename T>
LC_INLINE typename Lanes<T>::Mask load_valid(const bool* valid, int64_t n) {
  int8_t padded[kLanes<T>] = {};
  std::memcpy(padded, valid, n);
  const auto bytes = load<typename Lanes<T>::Bytes>(padded);
  return -__builtin_convertvector(bytes, typename Lanes<T>::Mask);
}

// Plane loop: n <= kLongestRow elements of one channel, so that no counter overflows;
// counts[row * stride] += what was found.
inline constexpr int64_t kLongestRow = 1 << 15;

template <bool kMasked, typename Rectifier, typename T>
LC_INLINE void rectify_row(const T* x, T* y, const bool* valid, int64_t n, Compute<T> slope,
                           int64_t* counts, int64_t stride) {
  using Mask = typename Lanes<T>::Mask;
  constexpr int64_t kStep = kLanes<T>;
  Compute<T> slopes[kStep];
  if constexpr (Rectifier::kSloped) std::fill_n(slopes, kStep, slope);
  Tally<Rectifier, T, false> tally;
  bool saw_nan = false;
  int64_t i = 0;
  if constexpr (!kMasked) {
    for (; i + 4 * kStep <= n; i += 4 * kStep) {
      saw_nan |= rectify_group<false, 4>(x + i, y + i, slopes, nullptr, tally);
    }
  }
  for (; i < n; i += kStep) {
    saw_nan = true;
    const int64_t rest = std::min(kStep, n - i);
    const Mask keep = kMasked ? load_valid<T>(valid + i, rest) : Mask{};
    if (rest == kStep) {
      rectify_group<kMasked, 1>(x + i, y + i, slopes, &keep, tally);
    } else {
      rectify_tail<1>(x + i, y + i, rest, slopes, kMasked ? &keep : nullptr, tally);
    }
  }
  // Both sums fit 16 bits: one walk over the lanes for two counters.
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    const auto both =
        static_cast<uint32_t>(sum_lanes<T>(tally.rows[kNonzero] + (tally.rows[kNegative] << 16)));
    counts[kNonzero * stride] += both & 0xFFFF;
    counts[kNegative * stride] += both >> 16;
  } else {
    counts[kNonzero * stride] += sum_lanes<T>(tally.rows[kNonzero]);
    counts[kNegative * stride] += sum_lanes<T>(tally.rows[kNegative]);
  }
  if (saw_nan) counts[kNan * stride] += sum_lanes<T>(tally.rows[kNan]);
  if constexpr (tally.kRows > 3) counts[kExtra * stride] += sum_lanes<T>(tally.rows[kExtra]);
}

// Rows from .. to, cut into segments of kLongestRow: item = row * segments + segment.
// counts: [kRows][C].
template <typename Rectifier, typename T>
LC_INLINE void rectify_planes(const Span<T>& span, int64_t from, int64_t to, int64_t* counts) {
  const int64_t segments = (span.width + kLongestRow - 1) / kLongestRow;
  int64_t row = from / segments, segment = from % segments, channel = row % span.channels;
  for (int64_t item = from; item < to; ++item) {
    const int64_t start = segment * kLongestRow, place = row * span.width + start;
    const int64_t n = std::min(kLongestRow, span.width - start);
    const auto slope = Rectifier::kSloped ? span.slopes[channel] : Compute<T>{};
    if (span.valid) {
      const bool* valid = span.valid + row / span.channels * span.width + start;
      rectify_row<true, Rectifier>(span.x + place, span.y + place, valid, n, slope,
                                   counts + channel, span.channels);
    } else {
      rectify_row<false, Rectifier>(span.x + place, span.y + place, nullptr, n, slope,
                                    counts + channel, span.channels);
    }
    if (++segment < segments) continue;
    segment = 0;
    ++row;
    if (++channel == span.channels) channel = 0;
  }
}

// Column loop. A block is 64 columns; bytes [kRows][blocks][64] count at most kByteRows rows.
inline constexpr int64_t kBlock = 64, kByteRows = 255;

constexpr int64_t blocks_of(int64_t width) { return (width + kBlock - 1) / kBlock; }

// One row. Returns whether a NaN may have been counted.
template <typename Rectifier, typename T>
LC_INLINE bool rectify_columns(const T* x, T* y, int64_t width, const Compute<T>* slopes,
                               uint8_t* bytes) {
  using Mask = typename Lanes<T>::Mask;
  using Counters = Tally<Rectifier, T, true>;
  constexpr int kVectors = kBlock / kLanes<T>;
  const int64_t stride = blocks_of(width) * kBlock;
  const int64_t whole = width / kBlock * kBlock;
  bool any_nan = false;
  for (int64_t c = 0; c < whole; c += kBlock) {
    Counters tally;
    uint8_t* cell = bytes + c;
    tally.rows[kNonzero] = load<Mask>(cell + kNonzero * stride);
    tally.rows[kNegative] = load<Mask>(cell + kNegative * stride);
    if constexpr (Counters::kRows > 3) tally.rows[kExtra] = load<Mask>(cell + kExtra * stride);
    const bool saw_nan = rectify_group<false, kVectors>(
        x + c, y + c, slopes + (Rectifier::kSloped ? c : 0), nullptr, tally);
    store(cell + kNonzero * stride, tally.rows[kNonzero]);
    store(cell + kNegative * stride, tally.rows[kNegative]);
    if constexpr (Counters::kRows > 3) store(cell + kExtra * stride, tally.rows[kExtra]);
    if (saw_nan) {
      any_nan = true;
      cell += kNan * stride;
      store(cell, load<Mask>(cell) + tally.rows[kNan]);
    }
  }
  if (whole == width) return any_nan;
  Counters tally;
  rectify_tail<kVectors>(x + whole, y + whole, width - whole,
                         slopes + (Rectifier::kSloped ? whole : 0), nullptr, tally);
  for (int row = 0; row < tally.kRows; ++row) {
    uint8_t* cell = bytes + row * stride + whole;
    store(cell, load<Mask>(cell) + tally.rows[row]);
  }
  return true;
}

// Adds the bytes of one counter of all columns to sums [blocks * 64] and clears them; the first
// time sums need not hold anything.
template <typename T>
LC_INLINE void drain_columns(uint8_t* bytes, int64_t blocks, int32_t* sums, bool first) {
  using Words = typename Lanes<T>::Words;
  for (int64_t block = 0; block < blocks; ++block) {
    const auto packed = load<Words>(bytes + block * kBlock);
    store(bytes + block * kBlock, Words{});
#pragma GCC unroll 8
    for (int i = 0; i < kBlock / kLanes<T>; ++i) {
      const Words lanes = (packed >> (8 * i)) & 0xFF;
      int32_t* into = sums + block * kBlock + i * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        into[lane] = (first ? 0 : into[lane]) + static_cast<int32_t>(lanes[lane]);
      }
    }
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
