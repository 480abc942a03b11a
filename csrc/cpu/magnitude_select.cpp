// magnitude_shares and magnitude_prune_ on the CPU: the exact k smallest |w| among alive weights,
// in the order of a stable sort by (|w|, tensor, index), index in C order of the logical shape.
#include <torch/csrc/stable/library.h>

#include "cpu/radix_select.h"

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

  const Cut cut = select_by_dtype(views, k);
  check(cut.nan_tensor < 0, kOp, ": alive weights must not be NaN (got NaN in weights[",
        cut.nan_tensor, "])");
  std::vector<std::atomic<int64_t>> below(views.size());
  std::vector<std::atomic<int64_t>> equal(views.size());
  const auto count = [&]<typename Key>(Key limit) {
    parallel_ranges(views, [&](size_t i, int64_t first, int64_t last) {
      int64_t smaller = 0;
      int64_t same = 0;
      visit_alive<Key>(views[i], first, last, [&](int64_t, int, Key key) {
        smaller += key < limit;
        same += key == limit;
      });
      below[i] += smaller;
      equal[i] += same;
    });
  };
  if (needs_wide_keys(views)) {
    count(cut.limit);
  } else {
    count(static_cast<uint32_t>(cut.limit));
  }
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
void clear_below(const Weights& weights, const Cut& cut) {
  const auto limit = static_cast<Key>(cut.limit);
  uint32_t* words = weights.words;
  const Views views{weights};
  parallel_ranges(views, [&](size_t, int64_t first, int64_t last) {
    visit_alive<Key>(weights, first, last, [&](int64_t number, int bit, Key key) {
      if (key < limit) words[number] &= ~(uint32_t{1} << bit);
    });
  });
  // Ties go by index, hence in one thread; the walk ends with the last tie that is taken.
  int64_t ties = cut.ties;
  for (int64_t number = 0; ties > 0; ++number) {
    visit_alive<Key>(weights, number, number + 1, [&](int64_t, int bit, Key key) {
      if (key != limit || ties == 0) return;
      words[number] &= ~(uint32_t{1} << bit);
      --ties;
    });
  }
}

void magnitude_prune_(std::vector<Tensor> weights, std::vector<Tensor> masks,
                      std::vector<int64_t> counts) {
  constexpr const char* kOp = "magnitude_prune_";
  const Views views = view_weights(kOp, weights, masks);
  check(counts.size() == weights.size(), kOp, ": counts must hold one number per tensor (got ",
        counts.size(), " for ", weights.size(), ")");
  for (size_t i = 0; i < views.size(); ++i) {
    const int64_t alive = alive_in(views[i]);
    check(counts[i] >= 0 && counts[i] <= alive, kOp, ": counts[", i,
          "] must lie between 0 and the ", alive, " alive weights (got ", counts[i], ")");
    check(counts[i] == 0 || views[i].words != nullptr, kOp, ": masks[", i,
          "] must have bits to clear (got an empty mask)");
  }
  std::vector<Cut> cuts(views.size());  // all of them before any mask changes
  for (size_t i = 0; i < views.size(); ++i) {
    if (counts[i] == 0) continue;
    cuts[i] = select_by_dtype({views[i]}, counts[i]);
    check(cuts[i].nan_tensor < 0, kOp, ": alive weights must not be NaN (got NaN in weights[", i,
          "])");
  }
  for (size_t i = 0; i < views.size(); ++i) {
    if (counts[i] == 0) continue;
    if (needs_wide_keys({views[i]})) {
      clear_below<uint64_t>(views[i], cuts[i]);
    } else {
      clear_below<uint32_t>(views[i], cuts[i]);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("magnitude_shares", TORCH_BOX(&magnitude_shares));
  m.impl("magnitude_prune_", TORCH_BOX(&magnitude_prune_));
}

}  // namespace layer_collapse
