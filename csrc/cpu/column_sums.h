// What becomes of the bytes of the column loop. Part of a machine's code: see rectify_loops.h.
#pragma once

#include <cstdint>

#include "cpu/sign_counts.h"

namespace layer_collapse {
namespace LC_MACHINE {

// A block is 64 columns; bytes [kRows][blocks][64] count at most kByteRows rows.
inline constexpr int64_t kBlock = 64, kByteRows = 255;

constexpr int64_t blocks_of(int64_t width) { return (width + kBlock - 1) / kBlock; }

// Puts the bytes of one counter in the order of the columns. kBySignBytes: they are SignTally's.
template <bool kBySignBytes, typename T>
LC_INLINE void order_columns(uint8_t* bytes, int64_t blocks) {
  using Words = typename Lanes<T>::Words;
  for (; blocks > 0; --blocks, bytes += kBlock) {
    if constexpr (kBySignBytes) {
      store(bytes, in_column_order(load<SignBytes>(bytes)));
    } else {
      const auto packed = load<Words>(bytes);
#pragma GCC unroll 8
      for (int i = 0; i < kBlock / kLanes<T>; ++i) {
        typename Lanes<T>::Unsigned lanes[kLanes<T>];
        store(lanes, (packed >> (8 * i)) & 0xFF);
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          bytes[i * kLanes<T> + lane] = static_cast<uint8_t>(lanes[lane]);
        }
      }
    }
  }
}

// Adds ordered bytes of columns to sums [width]; the first time they need not hold anything.
LC_INLINE void add_columns(const uint8_t* bytes, int64_t width, int32_t* sums, bool first) {
  for (int64_t i = 0; i < width; ++i) sums[i] = (first ? 0 : sums[i]) + bytes[i];
}

// The same where each channel has `inner` <= 64 columns in sequence: to sums [C], over and over.
// The 64 bytes after the last column may be read.
LC_INLINE void add_planes(const uint8_t* bytes, int64_t width, int64_t inner, int64_t channels,
                          int64_t* sums) {
  int8_t first_columns[kBlock] = {};
  std::fill_n(first_columns, inner, int8_t{-1});
  const auto keep = load<SignBytes>(first_columns);
  for (int64_t first = 0, channel = 0; first < width; first += inner) {
    const auto eight = byte_sums(load<SignBytes>(bytes + first) & keep);
    sums[channel] += sum_lanes<double>(bits_as<Lanes<double>::Mask>(eight));
    if (++channel == channels) channel = 0;
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
