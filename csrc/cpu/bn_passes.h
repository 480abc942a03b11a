// What the passes of a batch-normalised rectifier are: plain data, for any instruction set.
//
// A tensor is [outer, C, inner] in the order of its storage; [C, inner] are its columns. Arrays of
// numbers per channel or column are filled up to whole vectors, see padded().
#pragma once

#include <cstdint>
#include <vector>

#include "core/rectifier.h"
#include "cpu/dispatch.h"

namespace layer_collapse {

// Elements of type V in a vector of 64 bytes; vectors that the T of 64 bytes fill, and elements of
// those (halves are converted 16 at a time, bfloat16 32).
template <typename V>
inline constexpr int64_t kLanes = 64 / sizeof(V);
template <typename T>
inline constexpr int64_t kParts = std::is_same_v<T, BFloat16> ? 2 : 1;
template <typename T>
inline constexpr int64_t kWidth = kParts<T> * kLanes<Compute<T>>;

template <typename V>
std::vector<V> padded(int64_t numbers) {
  return std::vector<V>(numbers + 2 * kLanes<V>, V(0));
}

// Two sums of one channel spread over the lanes of all parts, or of one column per lane.
template <typename T>
struct alignas(64) Sums {
  double first[kWidth<T>] = {}, second[kWidth<T>] = {};
};
// The same for the counters, as wide as a lane. One sees less than 2^31 elements of a task.
template <typename T>
struct alignas(64) LaneCounts {
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Int positive[kWidth<T>] = {}, negative[kWidth<T>] = {}, nan[kWidth<T>] = {};
  Int extra[kWidth<T>] = {};
};
struct Nothing {};

// each_array() shows a pass's arrays of numbers per channel.

// Of each channel: the sums of x - center and of its square.
template <typename T>
struct MomentsPass {
  using Element = T;
  using Totals = Sums<T>;
  const T* x;
  const Compute<T>* center;

  template <typename Each>
  void each_array(const Each& each) {
    each(center);
  }
};

// z = alpha * (x - mean) + beta, in T's precision: what eager code would have stored. Folding the
// mean into beta would save a subtraction and lose digits where the mean is large.
template <typename V>
struct Normalization {
  const V* mean;
  const V* alpha;
  const V* beta;

  template <typename Each>
  void each_array(const Each& each) {
    each(mean);
    each(alpha);
    each(beta);
  }
};

// y = rectifier(z), counted.
template <typename Rectifier, typename T>
struct RectifyPass {
  using Element = T;
  using Totals = LaneCounts<T>;
  const T* x;
  T* y;
  Normalization<Compute<T>> z;
  Compute<T> slope;

  template <typename Each>
  void each_array(const Each& each) {
    z.each_array(each);
  }
};

// Of each channel: the sums of g and of g * (x - mean), g the gradient of z.
template <typename Rectifier, typename T>
struct GradSumsPass {
  using Element = T;
  using Totals = Sums<T>;
  const T* grad;
  const T* x;
  Normalization<Compute<T>> z;
  Compute<T> slope;

  template <typename Each>
  void each_array(const Each& each) {
    z.each_array(each);
  }
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

  template <typename Each>
  void each_array(const Each& each) {
    z.each_array(each);
    each(scale);
    each(tilt);
    each(offset);
  }
};

// The rectifiers; their functors are in bn_steps.h.
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
