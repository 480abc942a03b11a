// magnitude_shares and magnitude_prune_ on the CPU: the exact k smallest |w| among alive weights,
// in the order of a stable sort by (|w|, tensor, index), index in C order of the logical shape. As
// on CUDA, what is wrong with the weights themselves is told, not refused (magnitude_arguments.h).
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

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

// Room for what a selection tells of its groups, a row each (magnitude_arguments.h).
using Info = std::array<int64_t, kInfoWords>;
Tensor new_info(const Tensor& like, size_t groups) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(groups), kInfoWords},
                                  ScalarType::Long);
}
Info* rows_of(Tensor& info) { return static_cast<Info*>(info.mutable_data_ptr()); }

// The cut at the wanted-th smallest weight, if any are wanted and nothing is to be refused.
std::optional<Cut> find_cut(const Views& views, int64_t wanted, Info& info) {
  info = {wanted, 0, -1};
  if (wanted == 0) return std::nullopt;
  for (const Weights& view : views) info[1] += alive_in(view);
  if (wanted < 0 || wanted > info[1]) return std::nullopt;
  Cut cut = with_keys(
      views, [&]<typename Key>(Key) { return select_smallest<Key>(views, info[1], wanted); });
  info[2] = cut.nan_tensor;
  if (cut.nan_tensor >= 0) return std::nullopt;
  return cut;
}

std::tuple<Tensor, Tensor> magnitude_shares(std::vector<Tensor> weights, std::vector<Tensor> masks,
                                            int64_t k) {
  constexpr const char* kOp = "magnitude_shares";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  const Views views = view_weights(kOp, weights, masks);
  Tensor shares = torch::stable::new_zeros(weights[0], {static_cast<int64_t>(weights.size())},
                                           ScalarType::Long);
  Tensor info = new_info(weights[0], 1);
  const std::optional<Cut> found = find_cut(views, k, *rows_of(info));
  if (!found) return {shares, info};
  const Cut& cut = *found;
  int64_t ties = cut.ties;
  auto* result = shares.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < views.size(); ++i) {
    const int64_t taken = std::min(ties, cut.equal[i]);
    result[i] = cut.below[i] + taken;
    ties -= taken;
  }
  return {shares, info};
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

Tensor magnitude_prune_(std::vector<Tensor> weights, std::vector<Tensor> masks,
                        std::vector<int64_t> counts) {
  constexpr const char* kOp = "magnitude_prune_";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  const Views views = view_weights(kOp, weights, masks);
  check(counts.size() == weights.size(), kOp, ": counts must hold one number per tensor (got ",
        counts.size(), " for ", weights.size(), ")");
  for (size_t i = 0; i < views.size(); ++i) {
    check(counts[i] == 0 || views[i].numel == 0 || views[i].words != nullptr, kOp, ": masks[", i,
          "] must have bits to clear (got an empty mask)");
  }
  Tensor info = new_info(weights[0], views.size());
  std::vector<std::optional<Cut>> cuts;  // all of them before any mask changes
  bool refused = false;
  for (size_t i = 0; i < views.size(); ++i) {
    Info& row = rows_of(info)[i];
    cuts.push_back(find_cut({views[i]}, counts[i], row));
    if (row[2] >= 0) row[2] = static_cast<int64_t>(i);  // of all weights, not of this group's
    refused |= counts[i] != 0 && !cuts[i];
  }
  for (size_t i = 0; i < views.size() && !refused; ++i) {
    if (!cuts[i]) continue;
    with_keys({views[i]}, [&]<typename Key>(Key) { clear_below<Key>({views[i]}, *cuts[i]); });
  }
  return info;
}

Tensor magnitude_prune_on_device(std::vector<Tensor> weights, std::vector<Tensor> masks,
                                 Tensor counts) {
  check_counts_on_device(weights, masks, counts);
  const auto* numbers = counts.const_data_ptr<int64_t>();
  return magnitude_prune_(weights, masks, {numbers, numbers + counts.numel()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
  m.impl("magnitude_shares", TORCH_BOX(&magnitude_shares));
  m.impl("magnitude_prune_", TORCH_BOX(&magnitude_prune_));
  m.impl("magnitude_prune_.on_device", TORCH_BOX(&magnitude_prune_on_device));
}

}  // namespace layer_collapse
