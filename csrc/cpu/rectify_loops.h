// The fused loops: activate and count in one traversal. One functor per rectifier, one loop per
// layout; a new rectifier is a functor here and a case in rectify.cpp.
//
// A tensor is seen as [outer, C, inner] in the order of its storage. inner > 1 is a plane layout
// (NCHW): a row of `inner` elements belongs to one channel. inner == 1 is channel-fastest (token
// major [.., C], channels_last): every channel of a row has its own counter.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/rectifier.h"
#include "cpu/dispatch.h"

namespace layer_collapse {

// `v < 0 ? 0 : v` and not max(v, 0): it keeps NaN and -0.0, as torch.relu does.
struct Relu {
  static constexpr Kind kind = Kind::relu;
  template <typename V>
  static LC_INLINE V apply(V v, V) {
    return v < V(0) ? V(0) : v;
  }
};
struct Relu6 {
  static constexpr Kind kind = Kind::relu6;
  template <typename V>
  static LC_INLINE V apply(V v, V) {
    v = v < V(0) ? V(0) : v;
    return v > V(6) ? V(6) : v;
  }
};
struct LeakyRelu {
  static constexpr Kind kind = Kind::leaky_relu;
  template <typename V>
  static LC_INLINE V apply(V v, V slope) {
    return v > V(0) ? v : v * slope;
  }
};
struct Hardswish {
  static constexpr Kind kind = Kind::hardswish;
  template <typename V>
  static LC_INLINE V apply(V v, V) {
    return v * Relu6::apply(v + V(3), V(0)) / V(6);
  }
};
// Counts alone, for rectifiers whose output torch computes (GELU, SiLU).
struct CountOnly {
  static constexpr Kind kind = Kind::gelu;
};

// What the extra row of ReLU6 and Hardswish counts.
template <typename Rectifier, typename V>
LC_INLINE bool in_extra_row(V v) {
  if constexpr (Rectifier::kind == Kind::relu6) return v > V(6);
  return v > V(-3) && v < V(3);  // Hardswish
}

struct RowCounts {
  int64_t positive = 0, negative = 0, nan = 0, extra = 0;
};

// One row of one channel. valid: [n] bool or null (every position counts). y may be x.
template <typename Rectifier, typename T, bool kMasked>
LC_CLONES RowCounts rectify_row(const T* x, T* y, const bool* valid, int64_t n, Compute<T> slope) {
  using V = Compute<T>;
  // 32-bit sums vectorise; rows are cut into segments well below 2^31 elements (rectify.cpp).
  int32_t positive = 0, negative = 0, nan = 0, extra = 0;
  for (int64_t i = 0; i < n; ++i) {
    const V v = static_cast<V>(x[i]);
    if constexpr (!std::is_same_v<Rectifier, CountOnly>) {
      y[i] = static_cast<T>(Rectifier::apply(v, slope));
    }
    const int32_t one = kMasked ? valid[i] : 1;
    positive += v > V(0) ? one : 0;
    negative += v < V(0) ? one : 0;
    nan += v != v ? one : 0;
    if constexpr (count_rows(Rectifier::kind) > 3) extra += in_extra_row<Rectifier>(v) ? one : 0;
  }
  return {positive, negative, nan, extra};
}

// One row of all channels: x, y [C]; slopes [C] for PReLU, else null; counts [rows][C].
template <typename Rectifier, typename T>
LC_CLONES void rectify_channels(const T* x, T* y, const Compute<T>* slopes, Compute<T> slope,
                                int32_t* counts, int64_t channels, bool counted) {
  using V = Compute<T>;
  const int32_t one = counted;
  int32_t* positive = counts;
  int32_t* negative = counts + channels;
  int32_t* nan = counts + 2 * channels;
  int32_t* extra = counts + 3 * channels;
  for (int64_t c = 0; c < channels; ++c) {
    const V v = static_cast<V>(x[c]);
    if constexpr (!std::is_same_v<Rectifier, CountOnly>) {
      y[c] = static_cast<T>(Rectifier::apply(v, slopes ? slopes[c] : slope));
    }
    positive[c] += v > V(0) ? one : 0;
    negative[c] += v < V(0) ? one : 0;
    nan[c] += v != v ? one : 0;
    if constexpr (count_rows(Rectifier::kind) > 3) {
      extra[c] += in_extra_row<Rectifier>(v) ? one : 0;
    }
  }
}

}  // namespace layer_collapse
