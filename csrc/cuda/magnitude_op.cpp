// magnitude_shares and magnitude_prune_ on CUDA: check, allocate, launch. Nothing waits for the
// device: a number out of range and NaN, which only it knows, are told in a tensor
// (magnitude_arguments.h) that the caller may read. Weights that are not contiguous are copied, as
// ties go by logical index.
#include "cuda/magnitude_select.h"

#include <tuple>

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

Tensor new_words(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Long);
}

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
  s.selection.cuts = s.own(new_words(weights[0], {cells}));
  return s;
}

// Finds the cuts of all groups, given how many each is to select.
void select(const char* op, Selecting& s, const int64_t* wanted, Tensor& info) {
  s.selection.histograms = s.own(new_words(info, {s.selection.groups(), kHistogramWords}));
  s.selection.wanted = wanted;
  s.selection.info = info.mutable_data_ptr<int64_t>();
  check_launch(op, begin_selection(s.selection));
  for (int digit = 0; digit < digits(s.selection.wide); ++digit) {
    check_launch(op, launch_histogram(s.selection, digit));
    check_launch(op, launch_choose(s.selection, digit));
  }
}

int64_t* on_device(const char* op, Selecting& s, const std::vector<int64_t>& numbers,
                   const Tensor& like) {
  auto* target = s.own(new_words(like, {static_cast<int64_t>(numbers.size())}));
  check_launch(op, launch_numbers(numbers, target, kOpThreads, s.selection.stream));
  return target;
}

Tensor magnitude_histogram(Tensors weights, Tensors masks, Tensor prefix, int64_t digit,
                           bool wide) {
  constexpr const char* kOp = "magnitude_histogram";
  check_histogram_arguments(weights, prefix, digit, wide);
  const OnDevice device(weights[0]);
  Selecting s = selecting(kOp, weights, masks, false, device.stream());
  s.selection.wide = wide;
  Tensor histograms = new_words(weights[0], {s.selection.groups(), kHistogramWords});
  s.selection.histograms = histograms.mutable_data_ptr<int64_t>();
  check_launch(kOp, begin_at(s.selection, prefix.const_data_ptr<int64_t>()));
  check_launch(kOp, launch_histogram(s.selection, static_cast<int>(digit)));
  return histograms;
}

std::tuple<Tensor, Tensor> magnitude_shares(Tensors weights, Tensors masks, int64_t k) {
  constexpr const char* kOp = "magnitude_shares";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  const OnDevice device(weights[0]);
  Selecting s = selecting(kOp, weights, masks, true, device.stream());
  Tensor info = new_words(weights[0], {1, kInfoWords});
  select(kOp, s, on_device(kOp, s, {k}, info), info);
  const auto count = static_cast<int64_t>(weights.size());
  Tensor shares = new_words(weights[0], {count});
  auto* totals = s.own(torch::stable::new_zeros(weights[0], {count, 2}, ScalarType::Long));
  check_launch(kOp, launch_shares(s.selection, totals, shares.mutable_data_ptr<int64_t>()));
  return {shares, info};
}

// Clears what the cuts take.
void clear(const char* op, Selecting& s, const Tensor& like) {
  std::vector<int64_t> first_tie{0};
  for (const MaskedData& tensor : s.selection.list) {
    first_tie.push_back(first_tie.back() + segments(tensor));
  }
  auto* ties = s.own(new_words(like, {first_tie.back()}));
  check_launch(op, launch_clear(s.selection, first_tie, ties));
}

Tensor magnitude_prune_(Tensors weights, Tensors masks, std::vector<int64_t> counts) {
  constexpr const char* kOp = "magnitude_prune_";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  check(counts.size() == weights.size(), kOp, ": counts must hold one number per tensor (got ",
        counts.size(), " for ", weights.size(), ")");
  const OnDevice device(weights[0]);
  Selecting s = selecting(kOp, weights, masks, false, device.stream());
  for (size_t i = 0; i < weights.size(); ++i) {
    check(counts[i] == 0 || weights[i].numel() == 0 || s.selection.list[i].words != nullptr, kOp,
          ": masks[", i, "] must have bits to clear (got an empty mask)");
  }
  Tensor info = new_words(weights[0], {s.selection.groups(), kInfoWords});
  select(kOp, s, on_device(kOp, s, counts, info), info);
  clear(kOp, s, info);
  return info;
}

Tensor magnitude_prune_on_device(Tensors weights, Tensors masks, Tensor counts) {
  constexpr const char* kOp = "magnitude_prune_";
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  check_counts_on_device(weights, masks, counts);
  check(same_device(counts, weights[0]), kOp,
        ": counts must be on the device of the weights (got another device)");
  const OnDevice device(weights[0]);
  Selecting s = selecting(kOp, weights, masks, false, device.stream());
  Tensor info = new_words(weights[0], {s.selection.groups(), kInfoWords});
  select(kOp, s, counts.const_data_ptr<int64_t>(), info);
  clear(kOp, s, info);
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LC_CUDA_LIBRARY, LC_CUDA_KEY, m) {
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
  m.impl("magnitude_shares", TORCH_BOX(&magnitude_shares));
  m.impl("magnitude_prune_", TORCH_BOX(&magnitude_prune_));
  m.impl("magnitude_prune_.on_device", TORCH_BOX(&magnitude_prune_on_device));
}

}  // namespace layer_collapse
