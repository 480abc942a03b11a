// rectify, rectify_ on CUDA: check, allocate, launch.
#include "cpu/layout.h"
#include "cuda/on_device.h"
#include "rectify_arguments.h"

// See cpu/rectify.cpp.
namespace torch::autograd {
int get_current_graph_task_id();
}

namespace layer_collapse {
namespace {

// valid as a dense tensor in the order of x's storage.
Tensor valid_in_order(const Tensor& valid, const Layout& layout, int64_t channel_dim) {
  std::vector<int64_t> wanted = layout.outer_dims;
  wanted.insert(wanted.end(), layout.inner_dims.begin(), layout.inner_dims.end());
  std::vector<int64_t> dims(wanted.size());  // of x, that the dims of `ordered` stand for
  for (size_t d = 0; d < dims.size(); ++d) {
    dims[d] = static_cast<int64_t>(d) + (static_cast<int64_t>(d) >= channel_dim);
  }
  Tensor ordered = valid;
  for (size_t d = 0; d < dims.size(); ++d) {
    const auto from = std::find(dims.begin() + d, dims.end(), wanted[d]) - dims.begin();
    ordered = torch::stable::transpose(ordered, static_cast<int64_t>(d), from);
    std::swap(dims[d], dims[from]);
  }
  return torch::stable::contiguous(ordered);
}

// Activates x into y (which may be x) and counts; both dense, in storage order `order`. The flags
// are read on the device; whether this is a replay under activation checkpointing is known here.
void rectify_into(const Tensor& x, void* y, Tensor& ledger, Kind kind, int64_t channel_dim,
                  double slope, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& valid, const std::vector<int64_t>& order) {
  const Layout layout = layout_of(x, order, channel_dim);
  const bool counted = torch::autograd::get_current_graph_task_id() == -1;
  std::optional<Tensor> slopes, mask;
  if (weight) slopes = torch::stable::contiguous(*weight);
  if (valid && counted) mask = valid_in_order(*valid, layout, channel_dim);
  if (slopes && slopes->numel() == 1 && layout.channels != 1) {
    Tensor all = torch::stable::new_empty(*slopes, {layout.channels});
    torch::stable::copy_(all, torch::stable::view(*slopes, {1}));  // one slope for all channels
    slopes = all;
  }
  const RectifyLaunch call{x.const_data_ptr(),
                           y,
                           counted ? static_cast<int64_t*>(ledger.mutable_data_ptr()) : nullptr,
                           mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                           slopes ? slopes->const_data_ptr() : nullptr,
                           slope,
                           layout.outer,
                           layout.channels,
                           layout.inner,
                           dtype_of(x.scalar_type()),
                           kind,
                           kOpThreads};
  check_launch("rectify", launch_rectify(call, OnDevice(x).stream()));
}

Tensor rectify(Tensor x, Tensor ledger, int64_t kind, int64_t channel_dim, double slope,
               std::optional<Tensor> weight, std::optional<Tensor> valid) {
  const int64_t dim = check_arguments(x, ledger, kind, channel_dim, weight, valid);
  const OnDevice device(x);
  auto order = storage_order(x);
  // A tensor with gaps is copied once, into the layout that its result has anyway.
  Tensor source = order ? x : torch::stable::clone(x);
  if (!order) order = storage_order(source);
  const auto rectifier = static_cast<Kind>(kind);
  Tensor y = is_smooth(rectifier)      ? smooth(rectifier, x)
             : source.get() == x.get() ? empty_result(rectifier, x)
                                       : source;
  void* target = is_smooth(rectifier) ? nullptr : y.mutable_data_ptr();
  rectify_into(source, target, ledger, rectifier, dim, slope, weight, valid, *order);
  return y;
}

void rectify_(Tensor x, Tensor ledger, int64_t kind, int64_t channel_dim, double slope,
              std::optional<Tensor> weight, std::optional<Tensor> valid) {
  const auto rectifier = static_cast<Kind>(kind);
  const int64_t dim = check_arguments(x, ledger, kind, channel_dim, weight, valid);
  const OnDevice device(x);
  for (int64_t d = 0; d < x.dim(); ++d) {
    check(x.stride(d) != 0 || x.size(d) < 2, "rectify_: x must not be expanded (dim ", d,
          " has stride 0)");
  }
  const auto order = storage_order(x);
  if (order && !is_smooth(rectifier)) {
    rectify_into(x, x.mutable_data_ptr(), ledger, rectifier, dim, slope, weight, valid, *order);
  } else {
    torch::stable::copy_(x, rectify(x, ledger, kind, channel_dim, slope, weight, valid));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LC_CUDA_LIBRARY, LC_CUDA_KEY, m) {
  m.impl("rectify", TORCH_BOX(&rectify));
  m.impl("rectify_", TORCH_BOX(&rectify_));
}

}  // namespace layer_collapse
