// What the ops of a selection ask of their arguments and tell of the rest, on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace layer_collapse {

// 2048 buckets, then how many of the counted keys are NaN.
inline constexpr int64_t kHistogramWords = 2049;

// Of a group of weights, which is what one number to select belongs to: that number; the group's
// alive weights (0 if the number is 0: nobody looked); the first tensor with an alive NaN, or -1. A
// number below 0 or above the alive weights, or a NaN, is for the caller to refuse.
inline constexpr int64_t kInfoWords = 3;

// Whether keys of 32 bits cannot order these weights.
inline bool needs_wide_keys(const std::vector<torch::stable::Tensor>& weights) {
  return std::any_of(weights.begin(), weights.end(), [](const torch::stable::Tensor& weight) {
    return weight.scalar_type() == torch::headeronly::ScalarType::Double;
  });
}

inline void check_histogram_arguments(const std::vector<torch::stable::Tensor>& weights,
                                      const torch::stable::Tensor& prefix, int64_t digit,
                                      bool wide) {
  constexpr const char* kOp = "magnitude_histogram";
  using torch::headeronly::ScalarType;
  check(!weights.empty(), kOp, ": weights must hold at least one tensor (got none)");
  check(prefix.scalar_type() == ScalarType::Long && prefix.numel() == 1, kOp,
        ": prefix must be one int64 (got ", torch::headeronly::toString(prefix.scalar_type()),
        " with ", prefix.numel(), " numbers)");
  check(prefix.get_device_index() == weights[0].get_device_index() &&
            prefix.is_cuda() == weights[0].is_cuda(),
        kOp, ": prefix must be on the device of the weights (got another device)");
  check(digit >= 0 && digit < (wide ? 6 : 3), kOp, ": digit must be 0 to ", wide ? 5 : 2, " (got ",
        digit, ")");
  check(wide || !needs_wide_keys(weights), kOp,
        ": wide must be true with a float64 tensor (got false)");
}

// counts of magnitude_prune_.on_device; what they are is not known here.
inline void check_counts_on_device(const std::vector<torch::stable::Tensor>& weights,
                                   const std::vector<torch::stable::Tensor>& masks,
                                   const torch::stable::Tensor& counts) {
  constexpr const char* kOp = "magnitude_prune_";
  using torch::headeronly::ScalarType;
  check(masks.size() == weights.size(), kOp, ": masks must hold one tensor per weight tensor (got ",
        masks.size(), " for ", weights.size(), ")");
  check(counts.scalar_type() == ScalarType::Long && counts.dim() == 1 && counts.is_contiguous() &&
            counts.numel() == static_cast<int64_t>(weights.size()),
        kOp, ": counts must be contiguous int64 of shape [", weights.size(), "] (got ",
        torch::headeronly::toString(counts.scalar_type()), " with ", counts.numel(), " numbers)");
  for (size_t i = 0; i < weights.size(); ++i) {
    check(weights[i].numel() == 0 || masks[i].numel() != 0, kOp, ": masks[", i,
          "] must have bits to clear (got an empty mask)");
  }
}

}  // namespace layer_collapse
