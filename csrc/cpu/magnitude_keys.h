// |w| as unsigned integers, and the scan that all of magnitude selection is made of: which alive
// weights lie below a range of keys and which inside it.
#pragma once

#include <array>
#include <bit>
#include <limits>

#include "cpu/masked_tensors.h"

namespace layer_collapse {

struct Weights : MaskedTensor {
  const void* data;
};

using Views = std::vector<Weights>;

// uint32_t orders float, bfloat16 and half alike (both halves convert to float exactly); as soon as
// a double takes part, everything is ordered as double.
template <typename Key>
using KeyReal = std::conditional_t<sizeof(Key) == 8, double, float>;

template <typename Key>
constexpr Key kInfinity = std::bit_cast<Key>(std::numeric_limits<KeyReal<Key>>::infinity());

// The bit pattern of |w|, which orders IEEE numbers like an unsigned integer; -0.0 is 0.0.
template <typename Key, typename Weight>
LC_INLINE Key magnitude_key(Weight weight) {
  const auto real = static_cast<KeyReal<Key>>(static_cast<Compute<Weight>>(weight));
  return std::bit_cast<Key>(real) & (~Key{0} >> 1);
}

// The keys low .. low + width.
template <typename Key>
struct KeyRange {
  Key low = 0;
  Key width = kInfinity<Key> + 1;  // every number, no NaN
};

// Bit j: weight j of a mask word is alive and its key lies below or inside a range.
struct Split {
  uint32_t below, inside;
};

// What a scan of words comes to.
template <typename Key>
struct Scanned {
  int64_t below = 0, inside = 0;
  Key largest = 0;  // of all alive keys
};

// Splits weights[count * 32] by alive[count] and adds up.
template <typename Weight, typename Key>
LC_INLINE void split_each(const Weight* weights, const uint32_t* alive, int64_t count,
                          KeyRange<Key> range, Split* splits, Scanned<Key>& sum) {
  std::array<Key, kWordBits> most{};  // by place in the word, so that words do not wait in turn
  int64_t below_sum = 0;
  int64_t inside_sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = alive[i];
    if (word == 0) {
      splits[i] = {};
      continue;
    }
    uint32_t below = 0;
    uint32_t inside = 0;
    for (int j = 0; j < kWordBits; ++j) {
      const Key key = magnitude_key<Key>(weights[i * kWordBits + j]);
      below |= static_cast<uint32_t>(key < range.low) << j;
      inside |= static_cast<uint32_t>(static_cast<Key>(key - range.low) < range.width) << j;
      most[j] = std::max<Key>(most[j], key & (Key{0} - Key{(word >> j) & 1}));
    }
    splits[i] = {below & word, inside & word};
    below_sum += std::popcount(below & word);
    inside_sum += std::popcount(inside & word);
  }
  sum.below += below_sum;
  sum.inside += inside_sum;
  for (Key key : most) sum.largest = std::max(sum.largest, key);
}

#define LC_SPLIT(Weight, Key)                                                                    \
  LC_CLONES inline void split_words(const Weight* weights, const uint32_t* alive, int64_t count, \
                                    KeyRange<Key> range, Split* splits, Scanned<Key>& sum) {     \
    split_each(weights, alive, count, range, splits, sum);                                       \
  }
LC_SPLIT(float, uint32_t)
LC_SPLIT(BFloat16, uint32_t)
LC_SPLIT(Half, uint32_t)
LC_SPLIT(float, uint64_t)
LC_SPLIT(BFloat16, uint64_t)
LC_SPLIT(Half, uint64_t)
LC_SPLIT(double, uint64_t)
#undef LC_SPLIT

// visit(number, split, key_of) for every word first .. last, in mask order; key_of(j) is the key of
// weight j of the word.
template <typename Key, typename Visit>
Scanned<Key> scan_words(const Weights& weights, int64_t first, int64_t last, KeyRange<Key> range,
                        const Visit& visit) {
  Scanned<Key> sum;
  visit_weight_type(weights.dtype, [&]<typename Weight>(std::type_identity<Weight>) {
    if constexpr (std::is_same_v<Weight, double> && sizeof(Key) < sizeof(double)) {
      refuse("magnitude_select: float64 weights need 64-bit keys (got 32)");
    } else {
      constexpr int64_t kBatch = 32;  // words
      const auto* data = static_cast<const Weight*>(weights.data);
      std::array<Weight, kBatch * kWordBits> gathered{};
      std::array<uint32_t, kBatch> full;
      std::array<Split, kBatch> splits;
      for (int64_t begin = first; begin < last; begin += kBatch) {
        const int64_t count = std::min(kBatch, last - begin);
        const int64_t base = begin * kWordBits;
        const int64_t number = std::min(count * kWordBits, weights.numel - base);
        const Weight* block = data + base;
        if (!weights.contiguous) {
          weights.walk.run(base, number, [&](int64_t j, int64_t at) { gathered[j] = data[at]; });
          block = gathered.data();
        } else if (number < count * kWordBits) {  // the last word is not all there
          std::copy_n(data + base, number, gathered.begin());
          block = gathered.data();
        }
        const uint32_t* alive = weights.words + begin;
        if (weights.words == nullptr) {
          for (int64_t i = 0; i < count; ++i) {
            full[i] = full_word(weights_in_word(begin + i, weights.numel));
          }
          alive = full.data();
        }
        split_words(block, alive, count, range, splits.data(), sum);
        for (int64_t i = 0; i < count; ++i) {
          visit(begin + i, splits[i],
                [&](int j) { return magnitude_key<Key>(block[i * kWordBits + j]); });
        }
      }
    }
  });
  return sum;
}

}  // namespace layer_collapse
