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

  // visit(j, offset, length, stride) for elements start + j, 0 <= j < count, in C order of `sizes`,
  // a stretch of the last dimension at a time: `length` elements from j on lie `stride` apart.
  template <typename Visit>
  void stretches(int64_t start, int64_t count, const Visit& visit) const {
    if (sizes.empty()) {
      if (count > 0) visit(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{1});
      return;
    }
    std::array<int64_t, kMaxDims> index;
    int64_t offset = 0;
    for (size_t dim = sizes.size(); dim-- > 0;) {
      index[dim] = start % sizes[dim];
      start /= sizes[dim];
      offset += index[dim] * strides[dim];
    }
    const size_t inner = sizes.size() - 1;
    for (int64_t j = 0; j < count;) {
      const int64_t length = std::min(sizes[inner] - index[inner], count - j);
      visit(j, offset, length, strides[inner]);
      j += length;
      offset -= index[inner] * strides[inner];
      index[inner] = 0;
      for (size_t dim = inner; dim-- > 0;) {  // odometer over the outer dimensions
        offset += strides[dim];
        if (++index[dim] < sizes[dim]) break;
        offset -= sizes[dim] * strides[dim];
        index[dim] = 0;
      }
    }
  }

  // visit(j, offset) for each of these elements.
  template <typename Visit>
  void run(int64_t start, int64_t count, const Visit& visit) const {
    stretches(start, count, [&](int64_t j, int64_t offset, int64_t length, int64_t stride) {
      for (int64_t i = 0; i < length; ++i) visit(j + i, offset + i * stride);
    });
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
