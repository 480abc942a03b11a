// Lists of tensors with one mask each, as kernels see them, and what they share about mask words.
//
// A launch takes a table of tensors as its parameter, so nothing is copied to the device for it and
// a CUDA graph can hold it. Blocks take runs of `chunk` words of one tensor each.
#pragma once

#include "core/bitmask.h"
#include "cuda/numeric.cuh"

namespace layer_collapse {

// kData: pointers per tensor (weights, gradients, state). A launch takes 4 KB of parameters in all.
template <int kData>
struct TensorTable {
  static constexpr int kBytes = kData == 1 ? 2600 : 3800;  // selection passes more beside it
  static constexpr int kTensors = kBytes / (8 * kData + 32);
  int tensors;
  int64_t chunk;                // mask words per block
  int64_t first[kTensors + 1];  // number of each tensor's first block
  int64_t numel[kTensors];
  const uint32_t* words[kTensors];  // nullptr: every weight is alive
  void* data[kTensors][kData];
  int64_t group[kTensors];  // whatever the kernel says
};

// The tensor of the table that block number `block` works on.
template <int kData>
__device__ __forceinline__ int tensor_of(const TensorTable<kData>& table, int64_t block) {
  int low = 0, high = table.tensors;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Word `number` of a mask for numel weights, without bits beyond them.
__device__ __forceinline__ uint32_t word_of(const uint32_t* words, int64_t number, int64_t numel) {
  const uint32_t all = full_word(weights_in_word(number, numel));
  return words ? words[number] & all : all;
}

// The same where all of its weights exist.
__device__ __forceinline__ uint32_t whole_word_of(const uint32_t* words, int64_t number) {
  return words ? words[number] : ~0U;
}

// visit(word, first weight) for the words of this block, one per kWordBits / kValues consecutive
// threads: each of them has kValues of the word's weights, the first being `first weight`. If that
// is more than one, all weights of the words must exist.
template <int kValues, typename Visit>
__device__ __forceinline__ void walk_words(const uint32_t* words, int64_t numel, int64_t begin,
                                           int64_t end, const Visit& visit) {
  constexpr int kShare = kWordBits / kValues;  // threads per word
  LC_NO_UNROLL
  for (int64_t number = begin + threadIdx.x / kShare; number < end; number += blockDim.x / kShare) {
    visit(kValues > 1 ? whole_word_of(words, number) : word_of(words, number, numel),
          number * kWordBits + static_cast<int64_t>(threadIdx.x % kShare) * kValues);
  }
}

}  // namespace layer_collapse
