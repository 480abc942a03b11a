// What lies below and at the cut of a magnitude selection (cuda/magnitude_digits.cuh): how many per
// tensor, and their mask bits.
#pragma once

#include "cuda/magnitude_digits.cuh"

namespace layer_collapse {

// Words that one warp takes in the kernels below.
inline constexpr int kSegmentWords = 32;

// Segments of that many words in the mask of numel weights.
LC_HOST_DEVICE constexpr int64_t segments_of(int64_t numel) {
  return (mask_words(numel) + kSegmentWords - 1) / kSegmentWords;
}

// visit(tensor, number of the segment in it, first word, last word) for the segments of this warp;
// table.chunk is a multiple of kSegmentWords. All lanes of a warp visit together.
template <typename Visit>
__device__ __forceinline__ void visit_segments(const SelectTable& table, const Visit& visit) {
  const int tensor = tensor_of(table, blockIdx.x);
  const int64_t words = mask_words(table.numel[tensor]);
  const int64_t begin = (blockIdx.x - table.first[tensor]) * table.chunk;
  const int64_t end = begin + table.chunk < words ? begin + table.chunk : words;
  const int64_t stride = static_cast<int64_t>(blockDim.x / kWarp) * kSegmentWords;
  for (int64_t first = begin + threadIdx.x / kWarp * kSegmentWords; first < end; first += stride) {
    const int64_t last = first + kSegmentWords < end ? first + kSegmentWords : end;
    visit(tensor, first / kSegmentWords, first, last);
  }
}

// The key of the weight at this lane's bit of a word, if that is alive.
template <typename Key, typename T>
__device__ __forceinline__ Key key_at(const T* data, uint32_t word, int64_t number) {
  const int lane = threadIdx.x % kWarp;
  if ((word >> lane & 1) == 0) return 0;
  return key_of<Key, T>(widen(data[number * kWordBits + lane]));
}

// Counts the weights below and at the cut. totals [tensors of the list][2], or nullptr; ties: at
// the cut per segment, or nullptr, offsets[j] being the place of the table's tensor j in it.
template <typename T, typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    count_kernel(const __grid_constant__ SelectTable table,
                 const __grid_constant__ TensorNames names, const Cut* cuts, int64_t* totals,
                 const __grid_constant__ TensorNames offsets, int64_t* ties) {
  const Cut& cut = cuts[table.group[tensor_of(table, blockIdx.x)]];
  if (cut.wanted <= 0 || cut.failed != 0) return;
  const auto limit = static_cast<Key>(cut.prefix);
  visit_segments(table, [&](int tensor, int64_t segment, int64_t first, int64_t last) {
    const T* data = static_cast<const T*>(table.data[tensor][0]);
    int32_t below = 0, equal = 0;
    for (int64_t number = first; number < last; ++number) {
      const uint32_t word = word_of(table.words[tensor], number, table.numel[tensor]);
      if (word == 0) continue;  // the same in every lane
      const Key key = key_at<Key>(data, word, number);
      const bool alive = (word >> (threadIdx.x % kWarp) & 1) != 0;
      below += alive && key < limit;
      equal += alive && key == limit;
    }
    below = warp_sum(below);
    equal = warp_sum(equal);
    if (threadIdx.x % kWarp != 0) return;
    if (ties) ties[offsets.number[tensor] + segment] = equal;
    if (totals) {
      add_to(totals + 2 * names.number[tensor], below);
      add_to(totals + 2 * names.number[tensor] + 1, equal);
    }
  });
}

// shares[n]: what lies below the cut, and the ties in the order of the tensors; clears the totals.
// One thread.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    shares_kernel(const Cut* cut, int64_t* totals, int64_t tensors, int64_t* shares) {
  if (threadIdx.x != 0) return;
  int64_t left = cut->wanted > 0 && cut->failed == 0 ? cut->left : 0;
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t equal = totals[2 * i + 1], taken = left < equal ? left : equal;
    shares[i] = totals[2 * i] + taken;
    left -= taken;
    totals[2 * i] = totals[2 * i + 1] = 0;
  }
}

// The ties of each segment -> those before it in its tensor. One block per tensor of the table.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    scan_kernel(const __grid_constant__ SelectTable table,
                const __grid_constant__ TensorNames offsets, const Cut* cuts, int64_t* ties) {
  const Cut& cut = cuts[table.group[blockIdx.x]];
  if (cut.wanted <= 0 || cut.failed != 0) return;  // nothing was counted
  using Sums = int64_t[kMaxWarps + 1];
  LC_SHARED(Sums, sums);  // of each warp, then of all before it; last: of the whole round
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  int64_t* counts = ties + offsets.number[blockIdx.x];
  const int64_t last = segments_of(table.numel[blockIdx.x]);
  int64_t carried = 0;
  for (int64_t base = 0; base < last; base += blockDim.x) {
    const int64_t place = base + threadIdx.x;
    const int64_t own = place < last ? counts[place] : 0;
    int64_t upto = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0U, upto, distance);
      if (lane >= distance) upto += other;
    }
    if (lane == kWarp - 1) sums[warp] = upto;
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t sum = 0;
      for (int i = 0; i < warps; ++i) {
        const int64_t here = sums[i];
        sums[i] = sum;
        sum += here;
      }
      sums[kMaxWarps] = sum;
    }
    __syncthreads();
    if (place < last) counts[place] = carried + sums[warp] + upto - own;
    carried += sums[kMaxWarps];
    __syncthreads();  // before the next round writes the sums
  }
}

// Clears the bits of each tensor's cut; the first `left` ties by index. Nothing if any cut failed.
template <typename T, typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    clear_kernel(const __grid_constant__ SelectTable table, const Cut* cuts,
                 const int64_t* failures, const __grid_constant__ TensorNames offsets,
                 const int64_t* ties) {
  const Cut& cut = cuts[table.group[tensor_of(table, blockIdx.x)]];
  if (cut.wanted <= 0 || *failures != 0) return;
  const auto limit = static_cast<Key>(cut.prefix);
  const int lane = threadIdx.x % kWarp;
  visit_segments(table, [&](int tensor, int64_t segment, int64_t first, int64_t last) {
    const T* data = static_cast<const T*>(table.data[tensor][0]);
    auto* words = const_cast<uint32_t*>(table.words[tensor]);
    int64_t left = cut.left - ties[offsets.number[tensor] + segment];  // ties yet to take
    for (int64_t number = first; number < last; ++number) {
      const uint32_t word = word_of(words, number, table.numel[tensor]);
      if (word == 0) continue;
      const Key key = key_at<Key>(data, word, number);
      const bool alive = (word >> lane & 1) != 0;
      const uint32_t equal = __ballot_sync(~0U, alive && key == limit);
      const int earlier = __popc(equal & ((1U << lane) - 1));
      const bool goes = alive && (key < limit || (key == limit && earlier < left));
      const uint32_t cleared = __ballot_sync(~0U, goes);
      if (lane == 0 && cleared != 0) words[number] = word & ~cleared;
      left -= __popc(equal);
    }
  });
}

}  // namespace layer_collapse
