// Counts of the signs of packs (cuda/numeric.cuh).
//
// Counting goes through marks, one 32-bit word per pack and row, added up in 32-bit counters:
//   masks  all bits of the values for which something holds (pairs of halves compare so in one
//          instruction). Subtracting one counts: -0xffffffff adds 1, and for pairs -0x0000ffff and
//          -0xffff0000 leave the low count in the low 16 bits and (high - low) in the high ones.
//   ones   1 in the low bit of each such value, made by minima, which are cheaper than comparing
//          and adding for float, and all that bfloat16 has before sm_90. Adding one counts.
// A pair's counter must see fewer than 2^16 packs; the launchers see to it.
#pragma once

#include "cuda/numeric.cuh"

namespace layer_collapse {

// The marks of a pack's signs. Their sums are the rows of a ledger after rows_of_sums.
struct Marks {
  uint32_t rows[3];
};
template <typename Pack>
__device__ __forceinline__ Marks marks_of(Pack v) {
  if constexpr (kOnes<Pack>) {  // of v > 0; v > 0 or NaN; v != 0 or NaN
    return {ones_of(largest(v, Pack{})), ones_of(positive_or_nan(v)), ones_of(magnitude(v))};
  } else {
    return {greater(v, Pack{}), greater(Pack{}, v), is_nan(v)};
  }
}
template <typename Pack>
__device__ __forceinline__ void rows_of_sums(int32_t* sums) {  // [3]: z > 0, z < 0, NaN
  if constexpr (kOnes<Pack>) {
    const int32_t positive = sums[0], positive_or_nan = sums[1], not_zero = sums[2];
    sums[1] = not_zero - positive_or_nan;
    sums[2] = positive_or_nan - positive;
  }
}

// The mark of v > bound, for bound > 0; numbers >= 0 are ordered and differ as their bits do.
template <typename Pack>
__device__ __forceinline__ uint32_t mark_above(Pack v, float bound) {
  const Pack edge = filled<Pack>(bound);
  if constexpr (kOnes<Pack>) {
    return ones_of(bits_as<Pack>(bits_as<uint32_t>(largest(v, edge)) - bits_as<uint32_t>(edge)));
  } else {
    return greater(v, edge);
  }
}
// The mark of |v| < bound.
template <typename Pack>
__device__ __forceinline__ uint32_t mark_inside(Pack v, float bound) {
  const Pack edge = filled<Pack>(bound);
  if constexpr (kOnes<Pack>) {
    return ones_of(
        bits_as<Pack>(bits_as<uint32_t>(edge) - bits_as<uint32_t>(least(magnitude(v), edge))));
  } else {
    return greater(edge, magnitude(v));
  }
}

// Counts a mark of packs of T.
template <typename T>
__device__ __forceinline__ void tally(uint32_t& counter, uint32_t mark) {
  kOnes<typename Numeric<T>::Pack> ? counter += mark : counter -= mark;
}

// The number that a counter has counted in value i of its packs, and in all of them.
template <typename T>
__device__ __forceinline__ int32_t counted_in(uint32_t counter, int i) {
  using Pack = typename Numeric<T>::Pack;
  if constexpr (Numeric<T>::kPack == 1) {
    return static_cast<int32_t>(counter);
  } else {
    const uint32_t low = counter & 0xffffU, high = counter >> 16;
    return static_cast<int32_t>(i == 0 ? low : kOnes<Pack> ? high : (high + low) & 0xffffU);
  }
}
template <typename T>
__device__ __forceinline__ int32_t counted(uint32_t counter) {
  int32_t sum = 0;
  LC_UNROLL
  for (int i = 0; i < Numeric<T>::kPack; ++i) sum += counted_in<T>(counter, i);
  return sum;
}

}  // namespace layer_collapse
