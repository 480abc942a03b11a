// Fills tables of tensors (cuda/tensor_list.cuh) from a list, as many as one launch takes.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/masked_step.h"
#include "cuda/tensor_list.cuh"

namespace layer_collapse {

// Work for about this many blocks, but no block with less than kMinChunk words.
inline constexpr int64_t kTableBlocks = 1024;
inline constexpr int64_t kMinChunk = 64;

// start(table, indices, blocks) for tables of those tensors of the list for which take(tensor);
// indices[j] is the place in the list of the table's tensor j. Stops at the first error. most:
// about how many blocks.
template <int kData, typename Take, typename Start>
int for_each_table(const std::vector<MaskedData>& list, const Take& take, const Start& start,
                   int64_t most = kTableBlocks) {
  int64_t words = 0;
  for (const MaskedData& tensor : list) words += mask_words(tensor.numel);
  const int64_t wanted = (words + most - 1) / most;
  TensorTable<kData> table{};
  table.chunk = std::max(kMinChunk, (wanted + 31) / 32 * 32);
  std::vector<size_t> indices;
  const auto flush = [&] {
    if (indices.empty()) return 0;
    table.tensors = static_cast<int>(indices.size());
    const int error = start(table, indices, table.first[table.tensors]);
    indices.clear();
    return error;
  };
  for (size_t i = 0; i < list.size(); ++i) {
    const MaskedData& tensor = list[i];
    if (tensor.numel == 0 || !take(tensor)) continue;
    const size_t slot = indices.size();
    table.numel[slot] = tensor.numel;
    table.words[slot] = tensor.words;
    std::copy(tensor.data.begin(), tensor.data.end(), table.data[slot]);
    table.group[slot] = tensor.wide_step ? 1 : 0;
    const int64_t blocks = (mask_words(tensor.numel) + table.chunk - 1) / table.chunk;
    table.first[slot + 1] = table.first[slot] + blocks;
    indices.push_back(i);
    if (indices.size() == TensorTable<kData>::kTensors) {
      if (const int error = flush()) return error;
    }
  }
  return flush();
}

}  // namespace layer_collapse
