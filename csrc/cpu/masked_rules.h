// What a masked step does to one cache line of weights. Part of a machine's code: see masked_run.h.
// A rule has
//   Weight                    what the tensor holds
//   kIdle                     mask bits of a weight that asks for no work: a line of only such
//                             weights is skipped, its memory untouched
//   prefetch(base)            asks for the line that begins at weight `base`
//   block(base, count, bits)  does the work; bit j of bits: weight base + j is alive
//
// Invariant of Masks (layer_collapse/prune/masks.py), set up by apply_masks_: pruned weights and
// their optimiser state are already zero when a step begins, so optimiser rules skip what is
// pruned; that makes a step cheap at high sparsity. block() writes the zeros of a mixed line
// anyway, so a NaN gradient of a pruned weight never spreads.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/halves.h"

namespace layer_collapse {
namespace LC_MACHINE {

// 1 or 0. An integer: GCC does not vectorise loops that turn a shifted word into a bool.
LC_INLINE uint32_t is_alive(uint32_t bits, int j) { return (bits >> j) & 1; }

template <typename Real>
using WordOf = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

// value of an alive weight, +0.0 of a pruned one, by masking the bits.
template <typename Real>
LC_INLINE Real keep_alive(Real value, uint32_t alive) {
  using Bits = WordOf<Real>;
  return std::bit_cast<Real>(std::bit_cast<Bits>(value) & (Bits{0} - Bits{alive}));
}

// A yes or no that holds for a whole step. As bits: a loop without branches is compiled once, not
// once per combination of them.
template <typename Real>
struct Choice {
  WordOf<Real> mask;  // all ones or 0

  explicit Choice(bool yes) : mask(yes ? ~WordOf<Real>{0} : WordOf<Real>{0}) {}

  LC_INLINE Real pick(Real if_yes, Real if_no) const {
    using Bits = WordOf<Real>;
    return std::bit_cast<Real>((std::bit_cast<Bits>(if_yes) & mask) |
                               (std::bit_cast<Bits>(if_no) & ~mask));
  }
};

LC_INLINE void prefetch_line(const void* address) { __builtin_prefetch(address); }

// What a step takes for the gradient: divided by grad_scale, turned around to maximize.
template <typename Real>
struct Gradient {
  Real sign;     // 1 or -1
  Real divisor;  // grad_scale
  bool scaled;   // whether there is one: a division less per weight

  template <bool kScaled>
  LC_INLINE Real at(Real grad) const {
    return sign * (kScaled ? grad / divisor : grad);
  }
};

// torch.optim.SGD (torch/optim/sgd.py, _single_tensor_sgd).
template <typename WeightType>
struct SgdRule {
  using Weight = WeightType;
  using Real = Compute<Weight>;
  static constexpr uint32_t kIdle = 0;

  Weight* param;       // [numel]
  const Weight* grad;  // [numel]
  Weight* buffer;      // [numel], nullptr without momentum
  Real lr, momentum, weight_decay;
  Real keep, gain;  // of buffer and gradient: momentum and 1 - dampening; 0 and 1 in a first step
  bool nesterov;
  Gradient<Real> slope_of;
  Choice<Real> decays;

  LC_INLINE void prefetch(int64_t base) const {
    prefetch_line(param + base);
    prefetch_line(grad + base);
    if (buffer) prefetch_line(buffer + base);
  }

  enum class Momentum { none, heavy_ball, nesterov };

  LC_INLINE void block(int64_t base, int64_t count, uint32_t bits) const {
    if (!buffer) return scale<Momentum::none>(base, count, bits);
    if (nesterov) return scale<Momentum::nesterov>(base, count, bits);
    scale<Momentum::heavy_ball>(base, count, bits);
  }

  template <Momentum kind>
  LC_INLINE void scale(int64_t base, int64_t count, uint32_t bits) const {
    slope_of.scaled ? loop<kind, true>(base, count, bits) : loop<kind, false>(base, count, bits);
  }

  template <Momentum kind, bool kScaled>
  LC_INLINE void loop(int64_t base, int64_t count, uint32_t bits) const {
    constexpr bool kMomentum = kind != Momentum::none;
    Numbers<Weight> weights, velocities, slopes;
    Real* __restrict__ params = weights.open(param + base, count);
    Real* __restrict__ buffers = kMomentum ? velocities.open(buffer + base, count) : nullptr;
    const Real* __restrict__ grads = slopes.open(grad + base, count);
#pragma GCC ivdep  // the tensors never overlap
    for (int j = 0; j < static_cast<int>(count); ++j) {
      const uint32_t alive = is_alive(bits, j);
      const Real weight = params[j];
      Real slope = slope_of.template at<kScaled>(grads[j]);
      const Real decayed = slope + weight_decay * weight;
      slope = decays.pick(decayed, slope);
      if constexpr (kMomentum) {
        const Real velocity = buffers[j] * keep + gain * slope;
        buffers[j] = keep_alive<Real>(velocity, alive);
        slope = kind == Momentum::nesterov ? slope + momentum * velocity : velocity;
      }
      params[j] = keep_alive<Real>(weight - lr * slope, alive);
    }
    weights.close(param + base, count);
    if constexpr (kMomentum) velocities.close(buffer + base, count);
  }
};

// torch.optim.AdamW (torch/optim/adam.py, _single_tensor_adam with decoupled weight decay).
template <typename WeightType>
struct AdamWRule {
  using Weight = WeightType;
  using Real = Compute<Weight>;
  static constexpr uint32_t kIdle = 0;

  Weight* param;                      // [numel]
  const Weight* grad;                 // [numel]
  Weight* average;                    // [numel] exp_avg
  Weight* square;                     // [numel] exp_avg_sq
  Weight* maximum;                    // [numel] max_exp_avg_sq, nullptr without amsgrad
  Real step_size;                     // lr / (1 - beta1^t)
  Real root_correction;               // sqrt(1 - beta2^t)
  Real decay;                         // 1 - lr * weight_decay, exactly 1 without decay
  Real mix, beta2, square_gain, eps;  // mix = 1 - beta1, square_gain = 1 - beta2
  Choice<Real> near_before;           // mix < 0.5
  Gradient<Real> slope_of;

  LC_INLINE void prefetch(int64_t base) const {
    prefetch_line(param + base);
    prefetch_line(grad + base);
    prefetch_line(average + base);
    prefetch_line(square + base);
    if (maximum) prefetch_line(maximum + base);
  }

  LC_INLINE void block(int64_t base, int64_t count, uint32_t bits) const {
    if (slope_of.scaled)
      return maximum ? loop<true, true>(base, count, bits) : loop<false, true>(base, count, bits);
    maximum ? loop<true, false>(base, count, bits) : loop<false, false>(base, count, bits);
  }

  template <bool kAmsgrad, bool kScaled>
  LC_INLINE void loop(int64_t base, int64_t count, uint32_t bits) const {
    Numbers<Weight> weights, means, spreads, largests, slopes;
    Real* __restrict__ params = weights.open(param + base, count);
    Real* __restrict__ averages = means.open(average + base, count);
    Real* __restrict__ squares = spreads.open(square + base, count);
    Real* __restrict__ maxima = kAmsgrad ? largests.open(maximum + base, count) : nullptr;
    const Real* __restrict__ grads = slopes.open(grad + base, count);
#pragma GCC ivdep  // the tensors never overlap
    for (int j = 0; j < static_cast<int>(count); ++j) {
      const uint32_t alive = is_alive(bits, j);
      const Real weight = params[j] * decay;
      const Real slope = slope_of.template at<kScaled>(grads[j]);
      // torch.lerp, which starts from the nearer end.
      const Real before = averages[j];
      const Real gap = slope - before;
      const Real from_before = before + mix * gap;
      const Real from_slope = slope - gap * (Real{1} - mix);
      const Real mean = near_before.pick(from_before, from_slope);
      Real spread = squares[j] * beta2 + square_gain * slope * slope;
      averages[j] = keep_alive<Real>(mean, alive);
      squares[j] = keep_alive<Real>(spread, alive);
      if constexpr (kAmsgrad) {
        const Real largest = maxima[j];
        spread = spread <= largest || largest != largest ? largest : spread;  // keeps NaN
        maxima[j] = keep_alive<Real>(spread, alive);
      }
      const Real denominator = std::sqrt(spread) / root_correction + eps;
      params[j] = keep_alive<Real>(weight - step_size * mean / denominator, alive);
    }
    weights.close(param + base, count);
    means.close(average + base, count);
    spreads.close(square + base, count);
    if constexpr (kAmsgrad) largests.close(maximum + base, count);
  }
};

// Zeroes what is pruned, whatever stood there. Bits: the unsigned integer of the weight's width,
// as a floating-point zero is all zero bits.
template <typename Bits>
struct ZeroRule {
  using Weight = Bits;
  static constexpr uint32_t kIdle = ~uint32_t{0};

  Bits* data;  // [numel]

  LC_INLINE void prefetch(int64_t base) const { prefetch_line(data + base); }

  LC_INLINE void block(int64_t base, int64_t count, uint32_t bits) const {
    for (int j = 0; j < static_cast<int>(count); ++j) {
      data[base + j] *= static_cast<Bits>(is_alive(bits, j));
    }
  }
};

}  // namespace LC_MACHINE
}  // namespace layer_collapse
