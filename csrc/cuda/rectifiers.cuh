// What a rectifier makes of a pack and how it counts it, and what both kernels are told.
#pragma once

#include "core/rectifier.h"
#include "cuda/marks.cuh"

namespace layer_collapse {

// A rectifier: y of a pack of x, and whether it writes one. slopes(i) is the slope of value i.
struct DeviceRelu {
  static constexpr Kind kind = Kind::relu;
  static constexpr bool kWrites = true;
  template <typename Pack, typename Slopes>
  static __device__ __forceinline__ Pack apply(Pack v, const Slopes&) {
    return rectified(v);
  }
};
struct DeviceRelu6 {
  static constexpr Kind kind = Kind::relu6;
  static constexpr bool kWrites = true;
  template <typename Pack, typename Slopes>
  static __device__ __forceinline__ Pack apply(Pack v, const Slopes&) {
    return if_above(v, 6.0F, filled<Pack>(6.0F), rectified(v));
  }
};
struct DeviceLeakyRelu {  // PReLU too
  static constexpr Kind kind = Kind::leaky_relu;
  static constexpr bool kWrites = true;
  template <typename Pack, typename Slopes>
  static __device__ __forceinline__ Pack apply(Pack v, const Slopes& slopes) {
    const Pack scaled = transform(v, [&](auto value, int i) { return value * slopes(i); });
    return if_above(v, 0.0F, v, scaled);
  }
};
// As torch's CUDA kernel rounds: x * min(max(x + 3, 0), 6) * (1 / 6).
struct DeviceHardswish {
  static constexpr Kind kind = Kind::hardswish;
  static constexpr bool kWrites = true;
  template <typename Pack, typename Slopes>
  static __device__ __forceinline__ Pack apply(Pack v, const Slopes&) {
    return transform(v, [](auto value, int) {
      using Real = decltype(value);
      Real gate = value + Real(3);
      gate = gate > Real(0) ? gate : Real(0);  // a NaN value stays one by the product
      gate = gate < Real(6) ? gate : Real(6);
      return value * gate * Real(1.0 / 6.0);
    });
  }
};
// Counts alone, for rectifiers whose output torch computes (GELU, SiLU).
struct DeviceCountOnly {
  static constexpr Kind kind = Kind::gelu;
  static constexpr bool kWrites = false;
  template <typename Pack, typename Slopes>
  static __device__ __forceinline__ Pack apply(Pack v, const Slopes&) {
    return v;
  }
};

// Counts a pack in the bits of `keep`, in a counter per row.
template <typename Rectifier, typename T, int kRows, typename Pack>
__device__ __forceinline__ void count(Pack v, uint32_t keep, uint32_t (&rows)[kRows]) {
  const Marks marks = marks_of(v);
  LC_UNROLL
  for (int row = 0; row < 3; ++row) tally<T>(rows[row], marks.rows[row] & keep);
  if constexpr (Rectifier::kind == Kind::relu6) tally<T>(rows[3], mark_above(v, 6.0F) & keep);
  if constexpr (Rectifier::kind == Kind::hardswish) tally<T>(rows[3], mark_inside(v, 3.0F) & keep);
}

// Arguments of both kernels. Strides are in elements.
template <typename T>
struct RectifyArguments {
  const T* x;
  T* y;                  // may be x
  int64_t* ledger;       // nullptr: do not count (a replay under activation checkpointing)
  const uint8_t* valid;  // [outer * inner] in the order of x's storage, true if not 0; or nullptr
  const T* slopes;       // [C] of a PReLU; or nullptr: `slope` for all
  double slope;
  int64_t outer, channels, inner;
  Kind kind;         // for the live words
  int lanes;         // planes: threads per row; channels: threads per row of a tile
  unsigned slices;   // blocks per channel, or per tile of channels
  int64_t segment;   // planes: elements of a row that one visit takes
  int64_t segments;  // planes: visits per row
  int share;         // channels: rows per block
  int step;          // channels: rows that a block walks at once
  int64_t stride;    // channels: elements between those
};

// Vectors of one thread that are loaded before the first is needed, as registers allow.
template <typename Rectifier, typename T>
constexpr int batch() {
  if (LC_BFLOAT16 == 0 && std::is_same_v<T, BFloat16>) return 1;  // computed value by value
  if (count_rows(Rectifier::kind) > 3) return sizeof(T) == 2 ? 1 : 2;
  return kOnes<typename Numeric<T>::Pack> ? 4 : 2;
}

}  // namespace layer_collapse
