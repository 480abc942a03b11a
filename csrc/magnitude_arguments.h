// What magnitude_histogram asks of its arguments, on the CPU and on CUDA alike.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace layer_collapse {

// 2048 buckets, then how many of the counted keys are NaN.
inline constexpr int64_t kHistogramWords = 2049;

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

}  // namespace layer_collapse
