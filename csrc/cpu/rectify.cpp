// rectify, rectify_: a rectifier and the counts of its input's signs, in one pass on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "cpu/layout.h"
#include "cpu/rectify.h"
#include "rectify_arguments.h"

namespace layer_collapse {
namespace {

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
