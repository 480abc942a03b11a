// Sums over the threads of a block, and the last block of a launch to finish.
//
// Every function here holds block-wide barriers: all threads of the block must call it.
#pragma once

#include "cuda/device.cuh"

namespace layer_collapse {

// The sum over the warp, in every lane; of doubles in a fixed order.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0U, value, distance);
  }
  return value;
}

// values[n] summed over the block, in thread 0 (others hold nothing of use).
template <typename T, int n>
__device__ __forceinline__ void block_sums(T (&values)[n]) {
  using Partials = T[n][kMaxWarps];
  LC_SHARED(Partials, partials);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  LC_UNROLL
  for (int i = 0; i < n; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) partials[i][warp] = values[i];
  }
  __syncthreads();
  if (warp == 0) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    LC_UNROLL
    for (int i = 0; i < n; ++i) {
      values[i] = warp_sum(lane < warps ? partials[i][lane] : T(0));
    }
  }
  __syncthreads();  // before the next call writes the partials
}

// Whether this is the last block of the grid to get here; what the others wrote before is visible
// to it. *ticket must be 0 before the launch, and is 0 again afterwards. Launches that share a
// ticket must not overlap: as any tensor that is written, a ledger belongs to one stream at a time.
__device__ __forceinline__ bool is_last_block(int64_t* ticket) {
  LC_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned long long before =
        atomicAdd(reinterpret_cast<unsigned long long*>(ticket), 1ULL);
    last = before + 1 == gridDim.x;
    if (last) *ticket = 0;
  }
  __syncthreads();
  const bool result = last;
  if (result) __threadfence();
  return result;
}

}  // namespace layer_collapse
