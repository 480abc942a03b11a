// rectify, rectify_: a rectifier and the counts of its input's signs, in one pass on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/layout.h"
#include "cpu/rectify.h"

namespace layer_collapse {
namespace {

// Torch's own kernel for the rectifiers whose bits differ between layouts and instruction sets.
Tensor smooth(Kind kind, const Tensor& x) {
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
Tensor empty_result(Kind kind, const Tensor& x) {
  if (x.is_contiguous() && kind != Kind::relu6 && kind != Kind::prelu) {
    return torch::stable::new_empty(x, x.sizes());
  }
  return torch::stable::empty_like(x);
}

// Activates x into y (which may be x) and counts. y and x have the same strides and leave no gaps,
// in storage order `order`.
void rectify_into(const Tensor& x, Tensor& y, Tensor& ledger, Kind kind, int64_t channel_dim,
                  double slope, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& valid, const std::vector<int64_t>& order) {
  const Layout layout = layout_of(x, order, channel_dim);
  std::optional<Tensor> slopes;
  if (weight) slopes = torch::stable::contiguous(*weight);
  std::unique_ptr<bool[]> mask;
  if (valid) mask = valid_in_storage_order(*valid, x, layout, channel_dim);
  rectify_dense({kind, x.scalar_type(), layout.outer, layout.channels, layout.inner,
                 x.const_data_ptr(), y.mutable_data_ptr(), mask.get(), slope,
                 slopes ? slopes->const_data_ptr() : nullptr, slopes ? slopes->numel() : 0,
                 static_cast<int64_t*>(ledger.mutable_data_ptr())});
}

int64_t check_arguments(const Tensor& x, const Tensor& ledger, int64_t kind, int64_t channel_dim,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& valid) {
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
  check(ledger.scalar_type() == ScalarType::Long && ledger.is_contiguous() && ledger.is_cpu() &&
            ledger.numel() == words,
        "rectify: ledger must be a contiguous int64 CPU tensor of ", words, " words for ", channels,
        " channels (got ", torch::headeronly::toString(ledger.scalar_type()), " with ",
        ledger.numel(), " words)");
  const bool needs_weight = static_cast<Kind>(kind) == Kind::prelu;
  check(weight.has_value() == needs_weight, "rectify: weight belongs to PReLU and to no other kind",
        needs_weight ? " (got none for PReLU)" : " (got one)");
  check(!weight || (weight->scalar_type() == dtype &&
                    (weight->numel() == 1 || weight->numel() == channels)),
        "rectify: weight must have x's dtype and 1 or ", channels, " elements");
  if (valid) {
    check(valid->scalar_type() == ScalarType::Bool, "rectify: valid must be bool (got ",
          torch::headeronly::toString(valid->scalar_type()), ")");
    bool fits = valid->dim() == x.dim() - 1;
    for (int64_t d = 0; fits && d < valid->dim(); ++d) {
      fits = valid->size(d) == x.size(d < dim ? d : d + 1);
    }
    check(fits, "rectify: valid must have the shape of x without its channel dim");
  }
  return dim;
}

Tensor rectify(Tensor x, Tensor ledger, int64_t kind, int64_t channel_dim, double slope,
               std::optional<Tensor> weight, std::optional<Tensor> valid) {
  const int64_t dim = check_arguments(x, ledger, kind, channel_dim, weight, valid);
  auto order = storage_order(x);
  // A tensor with gaps is copied once, into the layout that its result has anyway.
  Tensor source = order ? x : torch::stable::clone(x);
  if (!order) order = storage_order(source);
  const auto rectifier = static_cast<Kind>(kind);
  Tensor y = is_smooth(rectifier)      ? smooth(rectifier, x)
             : source.get() == x.get() ? empty_result(rectifier, x)
                                       : source;
  rectify_into(source, y, ledger, rectifier, dim, slope, weight, valid, *order);
  return y;
}

void rectify_(Tensor x, Tensor ledger, int64_t kind, int64_t channel_dim, double slope,
              std::optional<Tensor> weight, std::optional<Tensor> valid) {
  const auto rectifier = static_cast<Kind>(kind);
  const int64_t dim = check_arguments(x, ledger, kind, channel_dim, weight, valid);
  for (int64_t d = 0; d < x.dim(); ++d) {
    check(x.stride(d) != 0 || x.size(d) < 2, "rectify_: x must not be expanded (dim ", d,
          " has stride 0)");
  }
  const auto order = storage_order(x);
  if (order && !is_smooth(rectifier)) {
    rectify_into(x, x, ledger, rectifier, dim, slope, weight, valid, *order);
  } else {
    torch::stable::copy_(x, rectify(x, ledger, kind, channel_dim, slope, weight, valid));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("rectify", TORCH_BOX(&rectify));
  m.impl("rectify_", TORCH_BOX(&rectify_));
}

}  // namespace layer_collapse
