// Visits the elements of an index space in C order and says where each lies in another order.
//
// Two uses: the masked step runs along a channels_last tensor's memory and needs the mask bit of
// every element (sizes in memory order, strides of the logical index); magnitude selection runs
// along the mask and needs the memory offset of every weight (logical sizes, memory strides).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace layer_collapse {

struct StridedWalk {
  static constexpr size_t kMaxDims = 64;  // torch's own limit

  std::vector<int64_t> sizes;    // outermost first
  std::vector<int64_t> strides;  // of the same dimensions, in elements of the other order

  // visit(j, offset) for elements start + j, 0 <= j < count, in C order of `sizes`.
  template <typename Visit>
  void run(int64_t start, int64_t count, const Visit& visit) const {
    std::array<int64_t, kMaxDims> index;
    int64_t offset = 0;
    for (size_t dim = sizes.size(); dim-- > 0;) {
      index[dim] = start % sizes[dim];
      start /= sizes[dim];
      offset += index[dim] * strides[dim];
    }
    for (int64_t j = 0; j < count; ++j) {
      visit(j, offset);
      for (size_t dim = sizes.size(); dim-- > 0;) {  // odometer: the last dimension turns first
        offset += strides[dim];
        if (++index[dim] < sizes[dim]) break;
        offset -= sizes[dim] * strides[dim];
        index[dim] = 0;
      }
    }
  }
};

// Whether the elements fill one piece of memory, each place once, in whatever order of dimensions.
// If so, `walk` runs along that memory and yields the logical index of each element.
inline bool memory_walk(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                        StridedWalk& walk) {
  std::vector<int64_t> logical(sizes.size());
  int64_t numel = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    logical[dim] = numel;
    numel *= sizes[dim];
  }
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::erase_if(order, [&](size_t dim) { return sizes[dim] == 1; });  // their strides mean nothing
  std::sort(order.begin(), order.end(),
            [&](size_t left, size_t right) { return strides[left] > strides[right]; });
  int64_t expected = 1;
  for (size_t position = order.size(); position-- > 0;) {
    if (strides[order[position]] != expected) return false;
    expected *= sizes[order[position]];
  }
  walk = {};
  for (size_t dim : order) {
    walk.sizes.push_back(sizes[dim]);
    walk.strides.push_back(logical[dim]);
  }
  return true;
}

}  // namespace layer_collapse
