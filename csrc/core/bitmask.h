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

// Bits `start`, `start + stride`, ... of a mask, several at a time.
//
// A window of 64 bits holds `per` bits that are `stride` apart. Multiplying by a number with a bit
// every `stride - 1` places adds up shifted copies of them, and where copy j brings bit j, they
// stand side by side; as per < stride, no two bits meet elsewhere and nothing carries.
class StridedBits {
 public:
  constexpr explicit StridedBits(int64_t stride) : stride_(stride) {
    if (stride == 1) {
      per_ = 32;
      kept_ = full_word(32);
      return;
    }
    per_ = std::max(std::min(stride - 1, 63 / stride + 1), int64_t{1});
    shift_ = (per_ - 1) * (stride - 1);
    kept_ = factor_ = 0;
    for (int64_t j = 0; j < per_; ++j) {
      kept_ |= uint64_t{1} << (j * stride);
      factor_ |= uint64_t{1} << (j * (stride - 1));
    }
  }

  // take(bits, count) for bits 0 .. length of the run, in order, at most 32 at a time. The mask has
  // words[size]; words beyond it count as 0.
  template <typename Take>
  constexpr void run(const uint32_t* words, int64_t size, int64_t start, int64_t length,
                     const Take& take) const {
    for (; length > 0; length -= per_, start += per_ * stride_) {
      const int64_t count = std::min(per_, length);
      const uint64_t bits = ((window(words, size, start) & kept_) * factor_) >> shift_;
      take(static_cast<uint32_t>(bits) & full_word(count), count);
    }
  }

 private:
  static constexpr uint64_t window(const uint32_t* words, int64_t size, int64_t start) {
    const int64_t number = start / kWordBits;
    const int64_t skipped = start % kWordBits;
    const auto word = [&](int64_t i) { return i < size ? uint64_t{words[i]} : 0; };
    const uint64_t low = word(number) | word(number + 1) << 32;
    return skipped == 0 ? low : low >> skipped | word(number + 2) << (64 - skipped);
  }

  int64_t stride_;
  int64_t per_ = 1;      // bits per window
  int64_t shift_ = 0;    // where the first of them ends up
  uint64_t kept_ = 1;    // the bits of a window that are `stride` apart
  uint64_t factor_ = 1;  // moves them side by side
};

}  // namespace layer_collapse
