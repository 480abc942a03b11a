// magnitude_shares and magnitude_prune_ on CUDA: check, allocate, launch. Both wait for the device
// once, at their end, because they refuse a k out of range and NaN. Weights that are not contiguous
// are copied, as ties go by logical index.
#include "cuda/magnitude_select.h"

#include <numeric>

#include "cuda/mask_arguments.h"
#include "magnitude_arguments.h"

namespace layer_collapse {
namespace {

using Tensors = std::vector<Tensor>;

// A selection and the memory that it uses.
struct Selecting {
  Selection selection;
  Tensors owned;

  template <typename T = int64_t>
  T* own(const Tensor& tensor) {
    owned.push_back(tensor);
    return static_cast<T*>(owned.back().mutable_data_ptr());
  }
};

Selecting selecting(const char* op, const Tensors& weights, const Tensors& masks, bool one_group,
                    void* stream) {
  check_length(op, "masks", masks.size(), weights.size());
  Selecting s;
  s.selection.one_group = one_group;
  s.selection.wide = needs_wide_keys(weights);
  s.selection.threads = kOpThreads;
  s.selection.stream = stream;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_weights(op, "weights", i, weights[i]);
    check_device(op, "weights", i, weights[i], weights[0]);
    void* data = s.own<void>(torch::stable::contiguous(weights[i]));
    s.selection.list.push_back({dtype_of(weights[i].scalar_type()),
                                weights[i].numel(),
                                mask_words_of(op, i, masks[i], weights[i]),
                                {data}});
  }
  const int64_t cells = s.selection.groups() * cut_words() + 1;
  s.selection.cuts = s.own(torch::stable::new_empty(weights[0], {cells}, ScalarType::Long));
  return s;
}

Tensor new_histograms(const Tensor& like, int64_t groups) {
  return torch::stable::new_zeros(like, {groups, kHistogramWords}, ScalarType::Long);
}

Selecting select(const char* op, const Tensors& weights, const Tensors& masks,
                 const std::vector<int64_t>& wanted, bool one_group, void* stream) {
  Selecting s = selecting(op, weights, masks, one_group, stream);
  s.selection.histograms = s.own(new_histograms(weights[0], s.selection.groups()));
  s.selection.wanted = s.own(to_device(wanted, weights[0]));
  check_launch(op, begin_selection(s.selection));
  for (int digit = 0; digit < digits(s.selection.wide); ++digit) {
    check_launch(op, launch_histogram(s.selection, digit));
    check_launch(op, launch_choose(s.selection, digit));
  }
  return s;
}

Tensor magnitude_histogram(Tensors weights, Tensors masks, Tensor prefix, int64_t digit,
                           bool wide) {
  constexpr const char* kOp = "magnitude_histogram";
  check_histogram_arguments(weights, prefix, digit, wide);
  const OnDevice device(weights[0]);
  Selecting s = selecting(kOp, weights, masks, false, device.stream());
  s.selection.wide = wide;
  Tensor histograms = new_histograms(weights[0], s.selection.groups());
  s.selection.histograms = histograms.mutable_data_ptr<int64_t>();
  check_launch(kOp, begin_at(s.selection, prefix.const_data_ptr<int64_t>()));
  check_launch(kOp, launch_histogram(s.selection, static_cast<int>(digit)));
  return histograms;
}

Tensor magnitude_shares(Tensors weights, Tensors masks, int64_t k) {
  constexpr const char* kOp = "magnitude_shares";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  const OnDevice device(weights[0]);
  Selecting s = select(kOp, weights, masks, {k}, true, device.stream());
  const auto count = static_cast<int64_t>(weights.size());
  Tensor shares = torch::stable::new_empty(weights[0], {count}, ScalarType::Long);
  auto* totals = s.own(torch::stable::new_zeros(weights[0], {count, 2}, ScalarType::Long));
  check_launch(kOp, launch_shares(s.selection, totals, shares.mutable_data_ptr<int64_t>()));
  std::vector<FetchedCut> cuts;
  check_launch(kOp, fetch_cuts(s.selection, cuts));
  check(k >= 0 && k <= cuts[0].alive, kOp, ": k must lie between 0 and the ", cuts[0].alive,
        " alive weights (got ", k, ")");
  check(!cuts[0].failed, kOp, ": alive weights must not be NaN (got NaN in weights[",
        cuts[0].nan_tensor, "])");
  return shares;
}

void magnitude_prune_(Tensors weights, Tensors masks, std::vector<int64_t> counts) {
  constexpr const char* kOp = "magnitude_prune_";
  check(counts.size() == weights.size(), kOp, ": counts must hold one number per tensor (got ",
        counts.size(), " for ", weights.size(), ")");
  if (weights.empty()) return;
  const OnDevice device(weights[0]);
  Selecting s = select(kOp, weights, masks, counts, false, device.stream());
  for (size_t i = 0; i < weights.size(); ++i) {
    check(counts[i] == 0 || weights[i].numel() == 0 || s.selection.list[i].words != nullptr, kOp,
          ": masks[", i, "] must have bits to clear (got an empty mask)");
  }
  std::vector<int64_t> bounds{0};
  for (const MaskedData& tensor : s.selection.list) {
    bounds.push_back(bounds.back() + segments(tensor));
  }
  const auto* places = s.own(to_device(bounds, weights[0]));
  auto* ties = s.own(torch::stable::new_zeros(weights[0], {bounds.back()}, ScalarType::Long));
  check_launch(kOp, launch_clear(s.selection, bounds, places, ties));
  std::vector<FetchedCut> cuts;
  check_launch(kOp, fetch_cuts(s.selection, cuts));
  for (size_t i = 0; i < cuts.size(); ++i) {
    check(counts[i] >= 0 && counts[i] <= cuts[i].alive, kOp, ": counts[", i,
          "] must lie between 0 and the ", cuts[i].alive, " alive weights (got ", counts[i], ")");
  }
  for (size_t i = 0; i < cuts.size(); ++i) {
    check(!cuts[i].failed, kOp, ": alive weights must not be NaN (got NaN in weights[", i, "])");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LC_CUDA_LIBRARY, LC_CUDA_KEY, m) {
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
  m.impl("magnitude_shares", TORCH_BOX(&magnitude_shares));
  m.impl("magnitude_prune_", TORCH_BOX(&magnitude_prune_));
}

}  // namespace layer_collapse
