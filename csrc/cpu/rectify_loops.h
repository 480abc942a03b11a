// The fused loops: activate and count in one traversal.
//
// A tensor is seen as [outer, C, inner] in the order of its storage. Where inner is large, a row of
// `inner` elements belongs to one channel and its counters stay in registers (plane loop). Else
// every element of a row is a column with a counter of its own (column loop): one byte, so that the
// counters of thousands of columns stay in the nearest cache.
//
// This file, those that it is made of and rectify_run.h are compiled once per machine, in a
// namespace and with the instructions of that machine (machines/*.cpp): GCC takes vectors of 64
// bytes apart when it reads a function, so a clone that is made later comes too late.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/column_sums.h"
#include "cpu/sign_counts.h"
#include "cpu/vector_counts.h"

namespace layer_collapse {
namespace LC_MACHINE {

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

// In place the loads miss the cache that the stores would otherwise miss: ask for them early.
// x: 64 floats that are read soon.
template <bool kAhead>
LC_INLINE void fetch(const float* x) {
  if constexpr (!kAhead) return;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_prefetch(x + i * kLanes<float>);
}
inline constexpr int64_t kAheadFloats = 512;

// -1 in the lanes whose valid [n <= kLanes] is true.
template <typename T>
LC_INLINE typename Lanes<T>::Mask load_valid(const bool* valid, int64_t n) {
  IntegerOf<sizeof(T)> lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = valid[i] ? -1 : 0;
  return load<typename Lanes<T>::Mask>(lanes);
}

// Plane loop: n <= kLongestRow elements of one channel, so that no counter overflows;
// counts[row * stride] += what was found.
inline constexpr int64_t kLongestRow = 255 * kGroup;

template <bool kMasked, typename Rectifier, typename T>
LC_INLINE void rectify_row(const T* x, T* y, const bool* valid, int64_t n, Compute<T> slope,
                           int64_t* counts, int64_t stride) {
  using Mask = typename Lanes<T>::Mask;
  constexpr int64_t kStep = kLanes<T>;
  Compute<T> slopes[kStep];
  if constexpr (Rectifier::kSloped) std::fill_n(slopes, kStep, slope);
  Tally<Rectifier, T, false> tally;
  int64_t i = 0;
  if constexpr (!kMasked) {
    for (; i + 4 * kStep <= n; i += 4 * kStep) {
      rectify_group<false, 4>(x + i, y + i, slopes, nullptr, tally);
    }
  }
  for (; i < n; i += kStep) {
    const int64_t rest = std::min(kStep, n - i);
    const Mask keep = kMasked ? load_valid<T>(valid + i, rest) : Mask{};
    if (rest == kStep) {
      rectify_group<kMasked, 1>(x + i, y + i, slopes, &keep, tally);
    } else {
      rectify_tail<1>(x + i, y + i, rest, slopes, kMasked ? &keep : nullptr, tally);
    }
  }
  for (int row = 0; row < tally.kRows; ++row) counts[row * stride] += sum_lanes<T>(tally.rows[row]);
}

// The same for rectifiers that are counted by sign, on floats.
template <typename Counter, bool kAhead, typename Rectifier>
LC_INLINE void rectify_signs(const float* x, float* y, int64_t n, int64_t* counts, int64_t stride) {
  SignTally<Rectifier, Counter> tally;
  NanWatch watch;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    fetch<kAhead>(x + i + kAheadFloats);
    tally.add(x + i, y + i, watch);
  }
  if (i < n) tally.add_part(x + i, y + i, n - i, watch);
  tally.sum_into(counts, stride);
  if (!watch.saw_nan()) [[likely]]
    return;
  find_nan(kWrites<Rectifier> ? y : x, n, [&](int64_t, bool negative) {
    recount_nan<Rectifier>(negative, [&](int row) -> int64_t& { return counts[row * stride]; });
  });
}

// Rows from .. to, cut into segments of kLongestRow: item = row * segments + segment.
// counts: [kRows][C].
template <typename Rectifier, typename T>
LC_INLINE void rectify_planes(const Span<T>& span, int64_t from, int64_t to, int64_t* counts) {
  const int64_t segments = (span.width + kLongestRow - 1) / kLongestRow;
  int64_t row = from / segments, segment = from % segments, channel = row % span.channels;
  const bool in_place = span.x == span.y;
  for (int64_t item = from; item < to; ++item) {
    const int64_t start = segment * kLongestRow, place = row * span.width + start;
    const int64_t n = std::min(kLongestRow, span.width - start);
    const auto slope = Rectifier::kSloped ? span.slopes[channel] : Compute<T>{};
    const T* x = span.x + place;
    T* y = span.y + place;
    int64_t* into = counts + channel;
    if (span.valid) {
      const bool* valid = span.valid + row / span.channels * span.width + start;
      rectify_row<true, Rectifier>(x, y, valid, n, slope, into, span.channels);
    } else if constexpr (!kBySign<Rectifier, T>) {
      rectify_row<false, Rectifier>(x, y, nullptr, n, slope, into, span.channels);
    } else if (n <= kFewGroups * kGroup) {
      if constexpr (kFewGroups > 0) {
        rectify_signs<int64_t, false, Rectifier>(x, y, n, into, span.channels);
      }
    } else if (in_place) {
      rectify_signs<SignBytes, true, Rectifier>(x, y, n, into, span.channels);
    } else {
      rectify_signs<SignBytes, false, Rectifier>(x, y, n, into, span.channels);
    }
    if (++segment < segments) continue;
    segment = 0;
    ++row;
    if (++channel == span.channels) channel = 0;
  }
}

// Column loop, one row. slopes: one per column, and whole blocks of them.
template <typename Rectifier, typename T>
LC_INLINE void rectify_columns(const T* x, T* y, int64_t width, const Compute<T>* slopes,
                               uint8_t* bytes) {
  using Mask = typename Lanes<T>::Mask;
  constexpr int kVectors = kBlock / kLanes<T>;
  const int64_t stride = blocks_of(width) * kBlock;
  for (int64_t c = 0; c < width; c += kBlock) {
    Tally<Rectifier, T, true> tally;
    const Compute<T>* own = slopes + (Rectifier::kSloped ? c : 0);
    for (int row = 0; row < tally.kRows; ++row) {
      tally.rows[row] = load<Mask>(bytes + row * stride + c);
    }
    if (c + kBlock <= width) {
      rectify_group<false, kVectors>(x + c, y + c, own, nullptr, tally);
    } else {
      rectify_tail<kVectors>(x + c, y + c, width - c, own, nullptr, tally);
    }
    for (int row = 0; row < tally.kRows; ++row) {
      store(bytes + row * stride + c, tally.rows[row]);
    }
  }
}

// Rows of kTile blocks of columns, whose counters stay in registers meanwhile. x and y are at the
// first column, bytes too; the last block has `last` columns. Returns whether there was a NaN.
template <int kTile, bool kAhead, typename Rectifier>
LC_INLINE bool rectify_tile(const float* x, float* y, int64_t width, int64_t rows, int64_t last,
                            uint8_t* bytes, int64_t stride) {
  SignTally<Rectifier> tally[kTile];
  NanWatch watch;
#pragma GCC unroll 8
  for (int tile = 0; tile < kTile; ++tile) tally[tile].load_from(bytes + tile * kBlock, stride);
  for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int tile = 0; tile < kTile; ++tile) {
      const int64_t at = row * width + tile * kBlock;
      fetch<kAhead>(x + at + 2 * width);
      if (tile + 1 == kTile && last < kBlock) {
        tally[tile].add_part(x + at, y + at, last, watch);
      } else {
        tally[tile].add(x + at, y + at, watch);
      }
    }
  }
#pragma GCC unroll 8
  for (int tile = 0; tile < kTile; ++tile) tally[tile].store_to(bytes + tile * kBlock, stride);
  return watch.saw_nan();
}

// How many of the blocks that are left make the next tile: not so that a single one remains among
// others, which would be slow. Four counters of eight blocks would not fit the registers.
constexpr int64_t next_tile(int64_t left, [[maybe_unused]] int64_t blocks,
                            [[maybe_unused]] bool wide) {
#if defined(LC_AVX512)
  if (wide && left >= 8 && left != 9) return 8;
#else
  // Half the registers, of half the size: the counters of two blocks stay in them. More only where
  // a tile is whole rows, which come from memory faster.
  if (blocks > 4) return left == 3 ? 3 : std::min<int64_t>(left, 2);
#endif
  if (left >= 4 && left != 5) return 4;
  return std::min<int64_t>(left, 3);
}

// Rows [rows][width] of columns that are counted by sign. Returns whether there was a NaN.
template <bool kAhead, typename Rectifier>
LC_INLINE bool rectify_tiles(const float* x, float* y, int64_t width, int64_t rows,
                             uint8_t* bytes) {
  const int64_t blocks = blocks_of(width), stride = blocks * kBlock;
  bool any_nan = false;
  for (int64_t block = 0; block < blocks;) {
    const int64_t left = blocks - block, c = block * kBlock;
    const int64_t tile = next_tile(left, blocks, kAhead && SignTally<Rectifier>::kRows == 3);
    const int64_t last = std::min(kBlock, width - c - (tile - 1) * kBlock);
    const auto run = [&]<int kTile>(std::integral_constant<int, kTile>) {
      return rectify_tile<kTile, kAhead, Rectifier>(x + c, y + c, width, rows, last, bytes + c,
                                                    stride);
    };
    bool saw_nan;
    if (kAhead && tile == 8) {
      saw_nan = run(std::integral_constant<int, 8>{});
    } else if (tile == 4) {
      saw_nan = run(std::integral_constant<int, 4>{});
    } else if (tile == 3) {
      saw_nan = run(std::integral_constant<int, 3>{});
    } else if (tile == 2) {
      saw_nan = run(std::integral_constant<int, 2>{});
    } else {
      saw_nan = run(std::integral_constant<int, 1>{});
    }
    block += tile;
    if (!saw_nan) [[likely]]
      continue;
    any_nan = true;
    const int64_t columns = (tile - 1) * kBlock + last;
    for (int64_t row = 0; row < rows; ++row) {
      const float* kept = (kWrites<Rectifier> ? y : x) + c + row * width;
      find_nan(kept, columns, [&](int64_t i, bool negative) {
        uint8_t* cell = bytes + c + i / kBlock * kBlock + place_of(i % kBlock);
        recount_nan<Rectifier>(negative, [&](int r) -> uint8_t& { return cell[r * stride]; });
      });
    }
  }
  return any_nan;
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
