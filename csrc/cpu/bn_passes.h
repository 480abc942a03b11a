// What the passes of a batch-normalised rectifier are: plain data, for any instruction set.
//
// A tensor is [outer, C, inner] in the order of its storage. walk_planes (NCHW) runs over a group
// of channels whose rows of `inner` elements lie side by side; walk_channels (inner == 1:
// channels_last, [N, C]) over rows of all channels. Arrays of numbers per channel are filled up to
// whole vectors, see per_channel().
#pragma once

#include <cstdint>
#include <vector>

#include "core/rectifier.h"
#include "cpu/dispatch.h"

namespace layer_collapse {

// Elements of type V in a vector of 64 bytes.
template <typename V>
inline constexpr int64_t kLanes = 64 / sizeof(V);

template <typename V>
std::vector<V> per_channel(int64_t channels) {
  return std::vector<V>(channels + kLanes<V>, V(0));
}

// Two sums of one channel spread over the lanes, or of one channel per lane.
template <typename V>
struct Sums {
  double first[kLanes<V>] = {}, second[kLanes<V>] = {};
};
// The same for the counters, which are as wide as V. A lane sees less than 2^31 elements of a task.
template <typename V>
struct LaneCounts {
  using Int = std::conditional_t<sizeof(V) == 8, int64_t, int32_t>;
  Int positive[kLanes<V>] = {}, negative[kLanes<V>] = {}, nan[kLanes<V>] = {};
  Int extra[kLanes<V>] = {};
};
struct Nothing {};

// Of each channel: the sums of x - center and of its square.
template <typename T>
struct MomentsPass {
  using Element = T;
  using Totals = Sums<Compute<T>>;
  const T* x;
  const Compute<T>* center;
};

// z = alpha * (x - mean) + beta, in T's precision: what eager code would have stored. Folding the
// mean into beta would save a subtraction and lose digits where the mean is large.
template <typename V>
struct Normalization {
  const V* mean;
  const V* alpha;
  const V* beta;
};

// y = rectifier(z), counted.
template <typename Rectifier, typename T>
struct RectifyPass {
  using Element = T;
  using Totals = LaneCounts<Compute<T>>;
  const T* x;
  T* y;
  Normalization<Compute<T>> z;
  Compute<T> slope;
};

// Of each channel: the sums of g and of g * (x - mean), g the gradient of z.
template <typename Rectifier, typename T>
struct GradSumsPass {
  using Element = T;
  using Totals = Sums<Compute<T>>;
  const T* grad;
  const T* x;
  Normalization<Compute<T>> z;
  Compute<T> slope;
};

// dx = scale * g + tilt * (x - mean) + offset
template <typename Rectifier, typename T>
struct GradPass {
  using Element = T;
  using Totals = Nothing;
  const T* grad;
  const T* x;
  T* dx;
  Normalization<Compute<T>> z;
  const Compute<T>* scale;
  const Compute<T>* tilt;
  const Compute<T>* offset;
  Compute<T> slope;
};

// The rectifiers, whose functors are in bn_loops.h.
struct BnRelu {
  static constexpr Kind kind = Kind::relu;
};
struct BnRelu6 {
  static constexpr Kind kind = Kind::relu6;
};
struct BnLeakyRelu {
  static constexpr Kind kind = Kind::leaky_relu;
};
struct BnHardswish {
  static constexpr Kind kind = Kind::hardswish;
};

}  // namespace layer_collapse
