// Where to cut: the exact k-th smallest magnitude among alive weights.
//
// One pass counts the keys below a range and keeps those inside; the k-th smallest is then found
// among the kept ones. The range is guessed from a sample, and the counts tell whether it was
// right. If more keys would have to be kept than kMaxKept, a histogram over the range tells which
// of its buckets holds the k-th smallest, and that is the next range; starting from all keys, this
// is radix selection. So memory is bounded whatever the number of weights, nothing is copied or
// concatenated, and as all of it is sums of integers, the result depends neither on the number of
// threads nor on the guess.
#pragma once

#include <mutex>
#include <numeric>

#include "cpu/key_sample.h"

namespace layer_collapse {

inline constexpr int kDigitBits = 11;
inline constexpr size_t kMaxKept = size_t{1} << 20;  // keys, per thread

// Fewer weights than this are kept all: a sample would cost more than it spares.
inline constexpr int64_t kSampleFrom = 8 * kSampleSize;

// The keys inside a range, by bucket of 2^shift keys.
template <typename Key>
struct Histogram {
  KeyRange<Key> range;
  int shift;
  std::array<int64_t, size_t{1} << kDigitBits> counts{};

  explicit Histogram(KeyRange<Key> keys)
      : range(keys),
        shift(std::max<int>(std::bit_width(static_cast<Key>(keys.width - 1)) - kDigitBits, 0)) {}

  void take(int64_t, Key key) { ++counts[(key - range.low) >> shift]; }

  void merge(const Histogram& other) {
    for (size_t i = 0; i < counts.size(); ++i) counts[i] += other.counts[i];
  }

  // The bucket that holds the rank-th smallest key, counted from 1, as a range; `rank` becomes the
  // rank in it and `inside` the number of its keys.
  KeyRange<Key> bucket_of(int64_t& rank, int64_t& inside) const {
    size_t bucket = 0;
    while (rank > counts[bucket]) rank -= counts[bucket++];
    inside = counts[bucket];
    return {static_cast<Key>(range.low + (static_cast<Key>(bucket) << shift)), Key{1} << shift};
  }
};

// The keys inside a range themselves, with their tensors, in no order.
template <typename Key>
struct KeptKeys {
  struct Entry {
    Key key;
    int32_t tensor;
  };

  std::vector<Entry> entries;
  bool complete = true;

  void take(int64_t tensor, Key key) {
    if (entries.size() < kMaxKept) {
      entries.push_back({key, static_cast<int32_t>(tensor)});
    } else {
      complete = false;
    }
  }

  void merge(const KeptKeys& other) {
    entries.insert(entries.end(), other.entries.begin(), other.entries.end());
    complete &= other.complete;
  }
};

// Where all that is asked for is the counts.
template <typename Key>
struct NoKeys {
  void take(int64_t, Key) {}
  void merge(const NoKeys&) {}
};

// Alive keys below and inside a range.
struct Counts {
  std::vector<int64_t> below, inside;  // [tensors]
  int64_t nan_tensor = -1;             // the first tensor with an alive NaN

  // The rank inside the range of the k-th smallest key of all; below 1 or above the number inside
  // if it does not lie there.
  int64_t rank_inside(int64_t k) const {
    return k - std::accumulate(below.begin(), below.end(), int64_t{0});
  }
  int64_t all_inside() const { return std::accumulate(inside.begin(), inside.end(), int64_t{0}); }
};

// One pass over all alive weights. Each thread gives the keys inside the range to a copy of `sink`,
// and they are merged in it.
template <typename Key, typename Sink>
Counts count_range(const Views& views, KeyRange<Key> range, Sink& sink) {
  Counts counts{std::vector<int64_t>(views.size()), std::vector<int64_t>(views.size())};
  std::mutex merging;
  const Sink fresh = sink;
  parallel_word_ranges(views, [&](std::span<const WordRange> ranges) {
    Sink local = fresh;
    std::vector<Scanned<Key>> sums;
    for (const auto& [tensor, first, last] : ranges) {
      const auto take = [&, i = tensor](int64_t, Split split, const auto& key_of) {
        for (uint32_t rest = split.inside; rest != 0; rest &= rest - 1) {
          local.take(i, key_of(std::countr_zero(rest)));
        }
      };
      sums.push_back(scan_words<Key>(views[tensor], first, last, range, take));
    }
    const std::lock_guard<std::mutex> lock(merging);
    sink.merge(local);
    for (size_t i = 0; i < ranges.size(); ++i) {
      const int64_t tensor = ranges[i].tensor;
      counts.below[tensor] += sums[i].below;
      counts.inside[tensor] += sums[i].inside;
      if (sums[i].largest > kInfinity<Key> &&
          (counts.nan_tensor < 0 || tensor < counts.nan_tensor)) {
        counts.nan_tensor = tensor;
      }
    }
  });
  return counts;
}

// The selected weights: every key < limit, and the first `ties` weights whose key is limit.
struct Cut {
  int64_t nan_tensor = -1;  // the first tensor with an alive NaN; all else is void then
  uint64_t limit = 0;
  int64_t ties = 0;
  std::vector<int64_t> below{}, equal{};  // [tensors]: weights with such keys
};

// The cut at the rank-th smallest of the keys inside a range, all of which were kept.
template <typename Key>
Cut cut_kept(KeyRange<Key> range, int64_t rank, Counts counts, KeptKeys<Key> kept) {
  while (range.width > 1) {
    Histogram<Key> histogram(range);
    for (const auto& entry : kept.entries) histogram.take(entry.tensor, entry.key);
    int64_t inside = 0;
    range = histogram.bucket_of(rank, inside);
    std::erase_if(kept.entries, [&](const auto& entry) {
      counts.below[entry.tensor] += entry.key < range.low;
      return static_cast<Key>(entry.key - range.low) >= range.width;
    });
  }
  std::vector<int64_t> equal(counts.below.size());
  for (const auto& entry : kept.entries) ++equal[entry.tensor];
  return {-1, range.low, rank, std::move(counts.below), std::move(equal)};
}

// The cut at the k-th smallest of `alive` magnitudes over all views, 1 <= k <= alive.
template <typename Key>
Cut select_smallest(const Views& views, int64_t alive, int64_t k) {
  const Guess<Key> everything{{}, alive};
  Guess<Key> next = alive < kSampleFrom ? everything : guess_range<Key>(views, alive, k);
  for (;;) {
    const KeyRange<Key> range = next.range;
    const bool single = range.width == 1;
    const bool keeps = !single && next.inside <= static_cast<int64_t>(kMaxKept);
    NoKeys<Key> none;
    KeptKeys<Key> kept;
    Histogram<Key> histogram(range);
    Counts counts = single  ? count_range(views, range, none)
                    : keeps ? count_range(views, range, kept)
                            : count_range(views, range, histogram);
    if (counts.nan_tensor >= 0) return {counts.nan_tensor};

    int64_t rank = counts.rank_inside(k);
    if (rank < 1 || rank > counts.all_inside()) {
      next = everything;  // a wrong guess
    } else if (single) {
      return {-1, range.low, rank, std::move(counts.below), std::move(counts.inside)};
    } else if (!keeps) {
      next.range = histogram.bucket_of(rank, next.inside);
    } else if (kept.complete) {
      return cut_kept(range, rank, std::move(counts), std::move(kept));
    } else {
      next.inside = counts.all_inside();  // more than expected
    }
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
