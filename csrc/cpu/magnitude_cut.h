// Where to cut: the exact k-th smallest magnitude among alive weights.
//
// A histogram over a range of keys tells which of its buckets holds the k-th smallest; that bucket
// is the next range, until it is a single key. From all keys this is radix selection, 3 passes
// for 32-bit keys and 6 for 64-bit ones; a range guessed from a sample saves the first of them.
// Nothing is sorted, copied or concatenated; a thread needs one 16 KiB histogram. Sums of
// integers, so the result does not depend on the number of threads, nor on the guess.
#pragma once

#include <mutex>
#include <numeric>
#include <span>

#include "cpu/key_sample.h"

namespace layer_collapse {

inline constexpr int kDigitBits = 11;
using Histogram = std::array<int64_t, size_t{1} << kDigitBits>;

// From so many weights on, a sample costs less than the pass that it saves.
inline constexpr int64_t kSampleFrom = 16 * kSampleSize;

// What one pass over all alive weights learns about a range.
struct Tally {
  int64_t below = 0;        // keys below the range
  Histogram inside{};       // keys in each bucket of the range
  int64_t nan_tensor = -1;  // the first tensor with an alive NaN

  int64_t count_inside() const { return std::accumulate(inside.begin(), inside.end(), int64_t{0}); }
};

// Buckets of 2^shift keys cover a range.
template <typename Key>
int bucket_shift(KeyRange<Key> range) {
  return std::max(static_cast<int>(std::bit_width(static_cast<Key>(range.width - 1))) - kDigitBits,
                  0);
}

template <typename Key>
Tally tally(const Views& views, KeyRange<Key> range) {
  Tally total;
  std::mutex merging;
  const int shift = bucket_shift(range);
  parallel_word_ranges(views, [&](std::span<const WordRange> ranges) {
    Tally local;
    for (const WordRange& part : ranges) {
      Key largest = 0;
      scan_words<Key>(views[part.tensor], part.first, part.last, range, largest,
                      [&](int64_t, Split split, const auto& key_of) {
                        local.below += std::popcount(split.below);
                        for (uint32_t rest = split.inside; rest != 0; rest &= rest - 1) {
                          ++local.inside[(key_of(std::countr_zero(rest)) - range.low) >> shift];
                        }
                      });
      if (largest > kInfinity<Key> && local.nan_tensor < 0) local.nan_tensor = part.tensor;
    }
    const std::lock_guard<std::mutex> lock(merging);
    total.below += local.below;
    for (size_t i = 0; i < total.inside.size(); ++i) total.inside[i] += local.inside[i];
    if (total.nan_tensor < 0 || (local.nan_tensor >= 0 && local.nan_tensor < total.nan_tensor)) {
      total.nan_tensor = local.nan_tensor;
    }
  });
  return total;
}

// The selected weights: every key < limit, and the first `ties` weights whose key is limit.
struct Cut {
  uint64_t limit = 0;
  int64_t ties = 0;
  int64_t nan_tensor = -1;  // the first tensor with an alive NaN; the cut means nothing then
};

// The cut below the k-th smallest of `alive` magnitudes over all views, 1 <= k <= alive.
template <typename Key>
Cut select_smallest(const Views& views, int64_t alive, int64_t k) {
  KeyRange<Key> range;
  if (alive >= kSampleFrom) range = guess_range<Key>(views, alive, k);
  for (;;) {
    const Tally found = tally(views, range);
    if (found.nan_tensor >= 0) return {0, 0, found.nan_tensor};
    int64_t rank = k - found.below;
    if (rank < 1 || rank > found.count_inside()) {  // a wrong guess
      range = {};
      continue;
    }
    size_t bucket = 0;
    while (rank > found.inside[bucket]) rank -= found.inside[bucket++];
    const int shift = bucket_shift(range);
    range = {static_cast<Key>(range.low + (static_cast<Key>(bucket) << shift)), Key{1} << shift};
    if (shift > 0) continue;
    // If all weights with this key are selected, they are no ties.
    if (rank == found.inside[bucket]) return {uint64_t{range.low} + 1, 0, -1};
    return {range.low, rank, -1};
  }
}

inline bool needs_wide_keys(const Views& views) {
  return std::any_of(views.begin(), views.end(),
                     [](const Weights& weights) { return weights.dtype == ScalarType::Double; });
}

// body(Key{}) with the keys that the weights need.
template <typename Body>
decltype(auto) with_keys(const Views& views, const Body& body) {
  return needs_wide_keys(views) ? body(uint64_t{}) : body(uint32_t{});
}

}  // namespace layer_collapse
