// Zeroes what masks prune, and brings masks into the order of their tensor's memory.
#pragma once

#include "cuda/masked_walk.cuh"

namespace layer_collapse {

// Zeroes what is pruned. Bits: the unsigned integer of the weight's width.
template <typename Bits>
struct DeviceZero {
  Bits* data;

  template <int kValues>
  __device__ __forceinline__ void block(int64_t place, uint32_t alive) const {
    if (alive == 0) return prune<kValues>(place);
    LC_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if ((alive >> i & 1) == 0) data[place + i] = 0;
    }
  }

  template <int kValues>
  __device__ __forceinline__ void prune(int64_t place) const {
    if constexpr (kValues == 1) {
      data[place] = 0;
    } else {
      *reinterpret_cast<uint4*>(data + place) = uint4{};
    }
  }
};

inline constexpr int kZeroData = 1;

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    apply_masks(const __grid_constant__ TensorTable<kZeroData> table) {
  const int tensor = tensor_of(table, blockIdx.x);
  if (!table.words[tensor]) return;
  const DeviceZero<Bits> rule{static_cast<Bits*>(table.data[tensor][0])};
  const WordRange range = words_of_block(table, tensor);
  run_rule<static_cast<int>(sizeof(uint4) / sizeof(Bits))>(rule, table.words[tensor],
                                                           table.numel[tensor], range.begin,
                                                           range.end, is_aligned(table, tensor, 1));
}

// The order of a tensor's memory: sizes from the slowest dimension, and how far one step in each
// moves the logical index. Dimensions beyond kMemoryDims must have been merged.
inline constexpr int kMemoryDims = 8;
struct MemoryOrder {
  int dims;
  int64_t sizes[kMemoryDims], strides[kMemoryDims];
};

// reordered: the mask of the weights in the order of their memory. A warp per word.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reorder_mask(const __grid_constant__ MemoryOrder order, const uint32_t* words, int64_t numel,
                 uint32_t* reordered) {
  const int64_t count = mask_words(numel);
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t number = blockIdx.x * static_cast<int64_t>(blockDim.x / kWarp) + threadIdx.x / kWarp;
       number < count; number += warps) {
    int64_t place = number * kWordBits + lane;
    bool alive = place < numel;
    if (alive) {
      int64_t logical = 0;
      LC_UNROLL
      for (int dim = kMemoryDims; dim-- > 0;) {
        if (dim >= order.dims) continue;
        logical += place % order.sizes[dim] * order.strides[dim];
        place /= order.sizes[dim];
      }
      alive = (words[logical / kWordBits] >> logical % kWordBits & 1) != 0;
    }
    const uint32_t word = __ballot_sync(~0U, alive);
    if (lane == 0) reordered[number] = word;
  }
}

}  // namespace layer_collapse
