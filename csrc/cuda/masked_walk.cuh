// How a block of a launch over tensors with masks walks its words.
#pragma once

#include "cuda/tensor_list.cuh"

namespace layer_collapse {

// Runs a rule over this block's words. kValues weights fill 16 bytes; what does not fill them, or
// is not aligned, is visited weight by weight.
template <int kValues, typename Rule>
__device__ __forceinline__ void run_rule(const Rule& rule, const uint32_t* words, int64_t numel,
                                         int64_t begin, int64_t end, bool aligned) {
  const int64_t last = end * kWordBits < numel ? end : numel / kWordBits;  // whole words
  const int64_t whole = aligned ? (last > begin ? last : begin) : begin;
  walk_words<kValues>(words, numel, begin, whole, [&](uint32_t word, int64_t place) {
    if (word == 0) {
      rule.template prune<kValues>(place);
    } else {
      constexpr uint32_t kShare = kValues == kWordBits ? ~0U : (1U << kValues) - 1;
      rule.template block<kValues>(place, word >> place % kWordBits & kShare);
    }
  });
  walk_words<1>(words, numel, whole, end, [&](uint32_t word, int64_t place) {
    if (place >= numel) return;
    if (word == 0) {
      rule.template prune<1>(place);
    } else {
      rule.template block<1>(place, word >> place % kWordBits & 1);
    }
  });
}

// Whether all pointers of a tensor allow 16-byte accesses.
template <int kData>
__device__ __forceinline__ bool is_aligned(const TensorTable<kData>& table, int tensor, int data) {
  uintptr_t places = 0;
  for (int i = 0; i < data; ++i) places |= reinterpret_cast<uintptr_t>(table.data[tensor][i]);
  return places % sizeof(uint4) == 0;
}

// The words that this block has of its tensor.
struct WordRange {
  int64_t begin, end;
};
template <int kData>
__device__ __forceinline__ WordRange words_of_block(const TensorTable<kData>& table, int tensor) {
  const int64_t words = mask_words(table.numel[tensor]);
  const int64_t begin = (blockIdx.x - table.first[tensor]) * table.chunk;
  return {begin, begin + table.chunk < words ? begin + table.chunk : words};
}

}  // namespace layer_collapse
