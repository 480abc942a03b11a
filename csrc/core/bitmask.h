// One bit per weight. Weight i is bit i % 32 of word i / 32, 1 = alive; the bits of the last word
// beyond n are 0. i counts the weights in C order of the tensor's *logical* index, whatever its
// strides are, so a mask keeps its meaning when a model moves to channels_last or is saved.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/host_device.h"

namespace layer_collapse {

inline constexpr int64_t kWordBits = 32;

// Words of a mask for n weights; 0 for n = 0.
LC_HOST_DEVICE constexpr int64_t mask_words(int64_t numel) {
  return (numel + kWordBits - 1) / kWordBits;
}

// Number of weights that word number `word` of n stands for: 32, or fewer in the last one.
LC_HOST_DEVICE constexpr int64_t weights_in_word(int64_t word, int64_t numel) {
  const int64_t left = numel - word * kWordBits;
  return left < kWordBits ? left : kWordBits;
}

// The word whose first `weights` bits are set, for 0 <= weights <= 32.
LC_HOST_DEVICE constexpr uint32_t full_word(int64_t weights) {
  return weights >= kWordBits ? ~uint32_t{0} : (uint32_t{1} << weights) - 1;
}

// Whether a bit beyond the n-th is set in words[mask_words(n)].
constexpr bool has_stray_bits(const uint32_t* words, int64_t numel) {
  const int64_t count = mask_words(numel);
  if (count == 0) return false;
  return (words[count - 1] & ~full_word(weights_in_word(count - 1, numel))) != 0;
}

// alive[n] -> words[mask_words(n)]
constexpr void pack_mask(const bool* alive, int64_t numel, uint32_t* words) {
  for (int64_t word = 0; word < mask_words(numel); ++word) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < weights_in_word(word, numel); ++j) {
      bits |= static_cast<uint32_t>(alive[word * kWordBits + j]) << j;
    }
    words[word] = bits;
  }
}

// words[mask_words(n)] -> alive[n]
constexpr void unpack_mask(const uint32_t* words, int64_t numel, bool* alive) {
  for (int64_t i = 0; i < numel; ++i) alive[i] = (words[i / kWordBits] >> (i % kWordBits)) & 1;
}

// Bits set in words[count].
constexpr int64_t count_alive(const uint32_t* words, int64_t count) {
  int64_t alive = 0;
  for (int64_t word = 0; word < count; ++word) alive += std::popcount(words[word]);
  return alive;
}

}  // namespace layer_collapse
