// What the op rectify asks of its arguments, and what its result is, on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>

#include "checks.h"
#include "core/rectifier.h"
#include "cpu/dispatch.h"

namespace layer_collapse {

using torch::stable::Tensor;

inline bool same_device(const Tensor& left, const Tensor& right) {
  return left.is_cpu() == right.is_cpu() && left.get_device_index() == right.get_device_index();
}

// Torch's own kernel for the rectifiers whose bits differ between layouts and instruction sets.
inline Tensor smooth(Kind kind, const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(x), 0};
  if (kind == Kind::silu) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::silu", "", stack.data(), TORCH_ABI_VERSION));
  } else {
    stack[1] = from(std::string(kind == Kind::gelu_tanh ? "tanh" : "none"));
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Torch's result strides: where x is contiguous, most kernels give dims of size 1 (whose stride
// says nothing) the plain one and not x's. A convolution chooses its layout by them.
inline Tensor empty_result(Kind kind, const Tensor& x) {
  if (x.is_contiguous() && kind != Kind::relu6 && kind != Kind::prelu) {
    return torch::stable::new_empty(x, x.sizes());
  }
  return torch::stable::empty_like(x);
}

// The channel dim, from 0.
inline int64_t check_arguments(const Tensor& x, const Tensor& ledger, int64_t kind,
                               int64_t channel_dim, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& valid) {
  check(kind >= 0 && kind < kKinds, "rectify: kind must be 0 to ", kKinds - 1, " (got ", kind, ")");
  const auto dtype = x.scalar_type();
  check(is_weight_dtype(dtype), "rectify: x must be float32, float64, bfloat16 or float16 (got ",
        torch::headeronly::toString(dtype), ")");
  check(x.dim() >= 1, "rectify: x must have a channel dim (got a tensor of no dims)");
  check(channel_dim >= -x.dim() && channel_dim < x.dim(),
        "rectify: channel_dim must be a dim of x, ", -x.dim(), " to ", x.dim() - 1, " (got ",
        channel_dim, ")");
  const int64_t dim = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
  const int64_t channels = x.size(dim);
  const int64_t words = kLedgerHeader + count_rows(static_cast<Kind>(kind)) * channels;
  check(ledger.scalar_type() == ScalarType::Long && ledger.is_contiguous() &&
            same_device(ledger, x) && ledger.numel() == words,
        "rectify: ledger must be a contiguous int64 tensor on x's device of ", words, " words for ",
        channels, " channels (got ", torch::headeronly::toString(ledger.scalar_type()), " with ",
        ledger.numel(), " words)");
  const bool needs_weight = static_cast<Kind>(kind) == Kind::prelu;
  check(weight.has_value() == needs_weight, "rectify: weight belongs to PReLU and to no other kind",
        needs_weight ? " (got none for PReLU)" : " (got one)");
  check(!weight || (weight->scalar_type() == dtype && same_device(*weight, x) &&
                    (weight->numel() == 1 || weight->numel() == channels)),
        "rectify: weight must have x's dtype and device and 1 or ", channels, " elements");
  if (valid) {
    check(valid->scalar_type() == ScalarType::Bool && same_device(*valid, x),
          "rectify: valid must be bool on x's device (got ",
          torch::headeronly::toString(valid->scalar_type()), ")");
    bool fits = valid->dim() == x.dim() - 1;
    for (int64_t d = 0; fits && d < valid->dim(); ++d) {
      fits = valid->size(d) == x.size(d < dim ? d : d + 1);
    }
    check(fits, "rectify: valid must have the shape of x without its channel dim");
  }
  return dim;
}

}  // namespace layer_collapse
