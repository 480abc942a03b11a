// A tensor seen in the order of its storage, [outer, C, inner], whatever its strides say.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace layer_collapse {

using torch::stable::Tensor;

// x seen in the order of its storage, and the order of its positions in that view.
struct Layout {
  int64_t outer = 1, channels = 1, inner = 1;
  std::vector<int64_t> outer_dims, inner_dims;  // dims of x before and after the channel dim
};

// Dims of a dense tensor from the slowest to the fastest, or nothing if elements leave gaps.
inline std::optional<std::vector<int64_t>> storage_order(const Tensor& x) {
  std::vector<int64_t> order;
  // A dim of size 1 may have any stride: such dims come first, where they change nothing.
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) == 1) order.push_back(dim);
  }
  const auto sized = static_cast<std::ptrdiff_t>(order.size());
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) != 1) order.push_back(dim);
  }
  std::stable_sort(order.begin() + sized, order.end(),
                   [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  if (x.numel() == 0) return order;  // no element, no gap
  int64_t expected = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (x.size(*dim) != 1 && x.stride(*dim) != expected) return std::nullopt;
    expected *= x.size(*dim);
  }
  return order;
}

inline Layout layout_of(const Tensor& x, const std::vector<int64_t>& order, int64_t channel_dim) {
  Layout layout;
  layout.channels = x.size(channel_dim);
  bool after = false;
  for (int64_t dim : order) {
    if (dim == channel_dim) {
      after = true;
    } else if (after) {
      layout.inner *= x.size(dim);
      layout.inner_dims.push_back(dim);
    } else {
      layout.outer *= x.size(dim);
      layout.outer_dims.push_back(dim);
    }
  }
  return layout;
}

// valid, in x's positions (its dims less the channel dim), brought into the order of x's storage.
inline std::unique_ptr<bool[]> valid_in_storage_order(const Tensor& valid, const Tensor& x,
                                                      const Layout& layout, int64_t channel_dim) {
  std::vector<int64_t> dims = layout.outer_dims;
  dims.insert(dims.end(), layout.inner_dims.begin(), layout.inner_dims.end());
  const int64_t positions = layout.outer * layout.inner;
  auto ordered = std::make_unique<bool[]>(positions);
  const bool* source = static_cast<const bool*>(valid.const_data_ptr());
  std::vector<int64_t> index(dims.size(), 0);
  for (int64_t position = 0; position < positions; ++position) {
    int64_t offset = 0;
    for (size_t d = 0; d < dims.size(); ++d) {
      offset += index[d] * valid.stride(dims[d] < channel_dim ? dims[d] : dims[d] - 1);
    }
    ordered[position] = source[offset];
    for (size_t d = dims.size(); d-- > 0;) {  // odometer over the dims
      if (++index[d] < x.size(dims[d])) break;
      index[d] = 0;
    }
  }
  return ordered;
}

}  // namespace layer_collapse
