// Radix selection of the k-th smallest |w| among alive weights.
//
// The bit pattern of |w| orders IEEE numbers like an unsigned integer, so a histogram of the top 11
// bits tells the bucket that holds the k-th smallest, a second one of that bucket's next bits
// narrows it down, and so on: 3 passes for 32-bit keys, 6 for 64-bit ones. Nothing is sorted,
// copied or concatenated; a thread needs one 16 KiB histogram. Sums of integers, so the result does
// not depend on the number of threads.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <limits>
#include <mutex>

#include "cpu/masked_tensors.h"

namespace layer_collapse {

inline constexpr int kDigitBits = 11;
using Histogram = std::array<int64_t, size_t{1} << kDigitBits>;

struct Weights : MaskedTensor {
  const void* data;
};

// uint32_t orders float, bfloat16 and half alike (both halves convert to float exactly); as soon as
// a double takes part, everything is ordered as double.
template <typename Key>
using KeyReal = std::conditional_t<sizeof(Key) == 8, double, float>;

template <typename Key>
constexpr int kKeyBits = sizeof(Key) * 8 - 1;  // without the sign, which |w| and -0.0 lose

template <typename Key>
constexpr Key kInfinity = std::bit_cast<Key>(std::numeric_limits<KeyReal<Key>>::infinity());

template <typename Key, typename Weight>
LC_INLINE Key magnitude_key(Weight weight) {
  using Stored = std::conditional_t<std::is_same_v<Weight, double>, double, float>;
  const auto real = static_cast<KeyReal<Key>>(static_cast<Stored>(weight));
  return std::bit_cast<Key>(real) & ~(Key{1} << kKeyBits<Key>);
}

// visit(word, bit, key) for the alive weights of words first .. last, in mask order.
template <typename Key, typename Visit>
void visit_alive(const Weights& weights, int64_t first, int64_t last, const Visit& visit) {
  visit_weight_type(weights.dtype, [&]<typename Weight>(std::type_identity<Weight>) {
    if constexpr (std::is_same_v<Weight, double> && sizeof(Key) < sizeof(double)) {
      refuse("magnitude_select: float64 weights need 64-bit keys (got 32)");
    } else {
      const auto* data = static_cast<const Weight*>(weights.data);
      for (int64_t number = first; number < last; ++number) {
        const int64_t count = weights_in_word(number, weights.numel);
        uint32_t word = weights.words ? weights.words[number] : full_word(count);
        if (word == 0) continue;
        const Weight* block = data + number * kWordBits;
        std::array<Weight, kWordBits> gathered;
        if (!weights.contiguous) {
          weights.walk.run(number * kWordBits, count,
                           [&](int64_t j, int64_t offset) { gathered[j] = data[offset]; });
          block = gathered.data();
        }
        for (; word != 0; word &= word - 1) {
          const int bit = std::countr_zero(word);
          visit(number, bit, magnitude_key<Key>(block[bit]));
        }
      }
    }
  });
}

inline int64_t alive_in(const Weights& weights) {
  return weights.words ? count_alive(weights.words, mask_words(weights.numel)) : weights.numel;
}

// The selected weights: every key < limit, and the first `ties` weights whose key is limit.
struct Cut {
  uint64_t limit = 0;
  int64_t ties = 0;
  int64_t nan_tensor = -1;  // the first tensor with an alive NaN; the cut means nothing then
};

using Views = std::vector<Weights>;

template <typename Body>
void parallel_ranges(const Views& views, const Body& body) {
  parallel_word_ranges({views.begin(), views.end()}, body);
}

// The cut below the k-th smallest alive magnitude over all views, 1 <= k <= number alive.
template <typename Key>
Cut select_smallest(const Views& views, int64_t k) {
  Key prefix = 0;  // the key's bits above `high`
  std::atomic<int64_t> nan_tensor{std::numeric_limits<int64_t>::max()};
  for (int high = kKeyBits<Key>; high > 0;) {
    const int low = std::max(high - kDigitBits, 0);
    const Key digit = (Key{1} << (high - low)) - 1;
    Histogram total{};
    std::mutex merging;
    parallel_ranges(views, [&](size_t i, int64_t first, int64_t last) {
      Histogram local{};
      bool has_nan = false;
      visit_alive<Key>(views[i], first, last, [&](int64_t, int, Key key) {
        has_nan |= key > kInfinity<Key>;
        if ((key >> high) == prefix) ++local[(key >> low) & digit];
      });
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t bucket = 0; bucket < total.size(); ++bucket) total[bucket] += local[bucket];
      if (has_nan) nan_tensor = std::min<int64_t>(nan_tensor, static_cast<int64_t>(i));
    });
    if (nan_tensor < static_cast<int64_t>(views.size())) return {0, 0, nan_tensor};
    size_t bucket = 0;
    while (k > total[bucket]) k -= total[bucket++];
    prefix = static_cast<Key>(prefix << (high - low)) | static_cast<Key>(bucket);
    high = low;
  }
  return {prefix, k, -1};
}

inline bool needs_wide_keys(const Views& views) {
  return std::any_of(views.begin(), views.end(),
                     [](const Weights& weights) { return weights.dtype == ScalarType::Double; });
}

inline Cut select_by_dtype(const Views& views, int64_t k) {
  return needs_wide_keys(views) ? select_smallest<uint64_t>(views, k)
                                : select_smallest<uint32_t>(views, k);
}

}  // namespace layer_collapse
