// magnitude_shares and magnitude_prune_ on the CPU: the exact k smallest |w| among alive weights,
// in the order of a stable sort by (|w|, tensor, index), index in C order of the logical shape.
#include <torch/csrc/stable/library.h>

#include "cpu/magnitude_cut.h"
#include "magnitude_arguments.h"

namespace layer_collapse {
namespace {

Views view_weights(const char* op, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& masks) {
  check_length(op, "masks", masks.size(), weights.size());
  Views views;
  for (size_t i = 0; i < weights.size(); ++i) {
    views.push_back(
        {view_in_mask_order(op, "weights", i, weights[i], masks[i]), weights[i].const_data_ptr()});
  }
  return views;
}

// Bits set in words[count].
LC_CLONES int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits += std::popcount(words[i]);
  return bits;
}

int64_t alive_in(const Weights& weights) {
  return weights.words ? count_bits(weights.words, mask_words(weights.numel)) : weights.numel;
}

Tensor magnitude_shares(std::vector<Tensor> weights, std::vector<Tensor> masks, int64_t k) {
  constexpr const char* kOp = "magnitude_shares";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  const Views views = view_weights(kOp, weights, masks);
  int64_t alive = 0;
  for (const Weights& view : views) alive += alive_in(view);
  check(k >= 0 && k <= alive, kOp, ": k must lie between 0 and the ", alive, " alive weights (got ",
        k, ")");
  Tensor shares = torch::stable::new_zeros(weights[0], {static_cast<int64_t>(weights.size())},
                                           ScalarType::Long);
  if (k == 0) return shares;

  const Cut cut =
      with_keys(views, [&]<typename Key>(Key) { return select_smallest<Key>(views, alive, k); });
  check(cut.nan_tensor < 0, kOp, ": alive weights must not be NaN (got NaN in weights[",
        cut.nan_tensor, "])");
  int64_t ties = cut.ties;
  auto* result = shares.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < views.size(); ++i) {
    const int64_t taken = std::min(ties, cut.equal[i]);
    result[i] = cut.below[i] + taken;
    ties -= taken;
  }
  return shares;
}

// The keys of a digit by bucket, and those of them that are NaN.
template <typename Key>
struct DigitCounts : Histogram<Key> {
  using Histogram<Key>::Histogram;
  int64_t nans = 0;

  void take(int64_t tensor, Key key) {
    Histogram<Key>::take(tensor, key);
    nans += key > kInfinity<Key>;
  }
  void merge(const DigitCounts& other) {
    Histogram<Key>::merge(other);
    nans += other.nans;
  }
};

template <typename Key>
void count_digits(const Views& views, Key prefix, int64_t digit, int64_t* rows) {
  constexpr int kBits = 8 * sizeof(Key) - 1;
  const int above = kBits - static_cast<int>(digit) * kDigitBits;  // bits from this digit on
  const KeyRange<Key> range{prefix << above, Key{1} << above};
  for (const Weights& view : views) {
    DigitCounts<Key> counts(range);
    count_range<Key>({view}, range, counts);
    *std::copy(counts.counts.begin(), counts.counts.end(), rows) = counts.nans;
    rows += kHistogramWords;
  }
}

Tensor magnitude_histogram(std::vector<Tensor> weights, std::vector<Tensor> masks, Tensor prefix,
                           int64_t digit, bool wide) {
  check_histogram_arguments(weights, prefix, digit, wide);
  const Views views = view_weights("magnitude_histogram", weights, masks);
  Tensor histograms = torch::stable::new_empty(
      weights[0], {static_cast<int64_t>(weights.size()), kHistogramWords}, ScalarType::Long);
  auto* rows = histograms.mutable_data_ptr<int64_t>();
  const int64_t chosen = *prefix.const_data_ptr<int64_t>();
  if (wide) {
    count_digits<uint64_t>(views, static_cast<uint64_t>(chosen), digit, rows);
  } else {
    count_digits<uint32_t>(views, static_cast<uint32_t>(chosen), digit, rows);
  }
  return histograms;
}

// Clears the bits of the cut in one tensor's mask.
template <typename Key>
void clear_below(const Views& one, const Cut& cut) {
  const Weights& weights = one[0];
  uint32_t* words = weights.words;
  const KeyRange<Key> limit{static_cast<Key>(cut.limit), 1};
  const bool all_ties = cut.ties == cut.equal[0];
  parallel_word_ranges(one, [&](std::span<const WordRange> ranges) {
    for (const auto& [tensor, first, last] : ranges) {
      scan_words<Key>(weights, first, last, limit, [&](int64_t number, Split split, const auto&) {
        words[number] &= ~(all_ties ? split.below | split.inside : split.below);
      });
    }
  });
  if (all_ties) return;
  // Ties go by index, hence in one thread; the walk ends with the last tie that is taken.
  int64_t ties = cut.ties;
  for (int64_t first = 0; ties > 0; first += kGrainWords) {
    const int64_t last = std::min(first + kGrainWords, mask_words(weights.numel));
    scan_words<Key>(weights, first, last, limit, [&](int64_t number, Split split, const auto&) {
      for (; split.inside != 0 && ties > 0; --ties) {
        words[number] &= ~(split.inside & (0 - split.inside));  // the lowest bit
        split.inside &= split.inside - 1;
      }
    });
  }
}

void magnitude_prune_(std::vector<Tensor> weights, std::vector<Tensor> masks,
                      std::vector<int64_t> counts) {
  constexpr const char* kOp = "magnitude_prune_";
  const Views views = view_weights(kOp, weights, masks);
  check(counts.size() == weights.size(), kOp, ": counts must hold one number per tensor (got ",
        counts.size(), " for ", weights.size(), ")");
  std::vector<int64_t> alive;
  for (size_t i = 0; i < views.size(); ++i) {
    alive.push_back(alive_in(views[i]));
    check(counts[i] >= 0 && counts[i] <= alive[i], kOp, ": counts[", i,
          "] must lie between 0 and the ", alive[i], " alive weights (got ", counts[i], ")");
    check(counts[i] == 0 || views[i].words != nullptr, kOp, ": masks[", i,
          "] must have bits to clear (got an empty mask)");
  }
  std::vector<Cut> cuts(views.size());  // all of them before any mask changes
  for (size_t i = 0; i < views.size(); ++i) {
    if (counts[i] == 0) continue;
    cuts[i] = with_keys({views[i]}, [&]<typename Key>(Key) {
      return select_smallest<Key>({views[i]}, alive[i], counts[i]);
    });
    check(cuts[i].nan_tensor < 0, kOp, ": alive weights must not be NaN (got NaN in weights[", i,
          "])");
  }
  for (size_t i = 0; i < views.size(); ++i) {
    if (counts[i] == 0) continue;
    with_keys({views[i]}, [&]<typename Key>(Key) { clear_below<Key>({views[i]}, cuts[i]); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
  m.impl("magnitude_shares", TORCH_BOX(&magnitude_shares));
  m.impl("magnitude_prune_", TORCH_BOX(&magnitude_prune_));
}

}  // namespace layer_collapse
