// magnitude_shares and magnitude_prune_ on the CPU: the exact k smallest |w| among alive weights,
// in the order of a stable sort by (|w|, tensor, index), index in C order of the logical shape.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/magnitude_cut.h"

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

// below[tensors], equal[tensors]: alive weights of each tensor whose key is smaller or the same.
template <typename Key>
void count_by_tensor(const Views& views, Key limit, std::vector<std::atomic<int64_t>>& below,
                     std::vector<std::atomic<int64_t>>& equal) {
  parallel_word_ranges(views, [&](std::span<const WordRange> ranges) {
    for (const auto& [i, first, last] : ranges) {
      int64_t smaller = 0;
      int64_t same = 0;
      Key largest = 0;
      scan_words<Key>(views[i], first, last, {limit, 1}, largest,
                      [&](int64_t, Split split, const auto&) {
                        smaller += std::popcount(split.below);
                        same += std::popcount(split.inside);
                      });
      below[i] += smaller;
      equal[i] += same;
    }
  });
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

  std::vector<std::atomic<int64_t>> below(views.size());
  std::vector<std::atomic<int64_t>> equal(views.size());
  const Cut cut = with_keys(views, [&]<typename Key>(Key) {
    const Cut found = select_smallest<Key>(views, alive, k);
    check(found.nan_tensor < 0, kOp, ": alive weights must not be NaN (got NaN in weights[",
          found.nan_tensor, "])");
    count_by_tensor<Key>(views, static_cast<Key>(found.limit), below, equal);
    return found;
  });
  int64_t ties = cut.ties;
  auto* result = shares.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < views.size(); ++i) {
    const int64_t taken = std::min<int64_t>(ties, equal[i]);
    result[i] = below[i] + taken;
    ties -= taken;
  }
  return shares;
}

// Clears the bits of the cut in one tensor's mask.
template <typename Key>
void clear_below(const Views& one, const Cut& cut) {
  const KeyRange<Key> limit{static_cast<Key>(cut.limit), 1};
  const Weights& weights = one[0];
  uint32_t* words = weights.words;
  parallel_word_ranges(one, [&](std::span<const WordRange> ranges) {
    for (const auto& [i, first, last] : ranges) {
      Key largest = 0;
      scan_words<Key>(
          weights, first, last, limit, largest,
          [&](int64_t number, Split split, const auto&) { words[number] &= ~split.below; });
    }
  });
  // Ties go by index, hence in one thread; the walk ends with the last tie that is taken.
  int64_t ties = cut.ties;
  for (int64_t first = 0; ties > 0; first += kGrainWords) {
    Key largest = 0;
    scan_words<Key>(weights, first, std::min(first + kGrainWords, mask_words(weights.numel)), limit,
                    largest, [&](int64_t number, Split split, const auto&) {
                      for (; split.inside != 0 && ties > 0; --ties) {
                        const uint32_t lowest = split.inside & (0 - split.inside);
                        words[number] &= ~lowest;
                        split.inside ^= lowest;
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
  m.impl("magnitude_shares", TORCH_BOX(&magnitude_shares));
  m.impl("magnitude_prune_", TORCH_BOX(&magnitude_prune_));
}

}  // namespace layer_collapse
