// What a masked step does to the weights of one mask word. A rule has
//   block(base, count, word)  weights base .. base + count; bit j of word: weight base + j is alive
//   prune(base, count)        the same for a word without any alive weight
//   kDense                    whether a fully alive word needs block() at all
//
// Invariant of Masks (layer_collapse/prune/masks.py), set up by apply_masks_: pruned weights and
// their optimiser state are already zero when a step begins. prune() of the optimiser rules
// therefore touches no memory, which is what makes a step cheap at high sparsity; block() writes
// the zeros of a mixed word anyway, so a NaN gradient of a pruned weight never spreads.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/dispatch.h"

namespace layer_collapse {

// 1 or 0. An integer: GCC does not vectorise loops that turn a shifted word into a bool.
LC_INLINE uint32_t is_alive(uint32_t word, int j) { return (word >> j) & 1; }

// value of an alive weight, +0.0 of a pruned one, by masking the bits.
template <typename Real>
LC_INLINE Real keep_alive(Real value, uint32_t alive) {
  using Bits = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;
  return std::bit_cast<Real>(std::bit_cast<Bits>(value) & (Bits{0} - Bits{alive}));
}

// torch.optim.SGD (torch/optim/sgd.py, _single_tensor_sgd).
template <typename Weight>
struct SgdRule {
  using Real = Compute<Weight>;
  static constexpr bool kDense = true;

  Weight* param;                          // [numel]
  const Weight* grad;                     // [numel]
  Weight* buffer;                         // [numel], nullptr without momentum
  Real lr, momentum, gain, weight_decay;  // gain = 1 - dampening
  Real divisor;                           // of the gradients: grad_scale or 1, negative to maximize
  bool decays, nesterov, first_step;

  LC_INLINE void block(int64_t base, int64_t count, uint32_t word) const {
    buffer ? loop<true>(base, count, word) : loop<false>(base, count, word);
  }

  // Choices are written as selects between computed values, which vectorise; branches do not.
  template <bool kMomentum>
  LC_INLINE void loop(int64_t base, int64_t count, uint32_t word) const {
    Weight* __restrict__ params = param + base;
    Weight* __restrict__ buffers = buffer + (kMomentum ? base : 0);
    const Weight* __restrict__ grads = grad + base;
#pragma GCC ivdep  // the tensors never overlap
    for (int j = 0; j < static_cast<int>(count); ++j) {
      const uint32_t alive = is_alive(word, j);
      const Real weight = params[j];
      Real slope = static_cast<Real>(grads[j]) / divisor;
      const Real decayed = slope + weight_decay * weight;
      slope = decays ? decayed : slope;
      if constexpr (kMomentum) {
        const Real later = static_cast<Real>(buffers[j]) * momentum + gain * slope;
        const Real velocity = first_step ? slope : later;
        const Real ahead = slope + momentum * velocity;
        buffers[j] = keep_alive<Real>(velocity, alive);
        slope = nesterov ? ahead : velocity;
      }
      params[j] = keep_alive<Real>(weight - lr * slope, alive);
    }
  }

  // On the first step the buffer's memory is not yet known to be zero.
  LC_INLINE void prune(int64_t base, int64_t count) const {
    if (buffer && first_step) std::fill_n(buffer + base, count, Weight(0.0F));
  }
};

// torch.optim.AdamW (torch/optim/adam.py, _single_tensor_adam with decoupled weight decay).
template <typename Weight>
struct AdamWRule {
  using Real = Compute<Weight>;
  static constexpr bool kDense = true;

  Weight* param;                      // [numel]
  const Weight* grad;                 // [numel]
  Weight* average;                    // [numel] exp_avg
  Weight* square;                     // [numel] exp_avg_sq
  Weight* maximum;                    // [numel] max_exp_avg_sq, nullptr without amsgrad
  Real step_size;                     // lr / (1 - beta1^t)
  Real root_correction;               // sqrt(1 - beta2^t)
  Real decay;                         // 1 - lr * weight_decay, exactly 1 without decay
  Real mix, beta2, square_gain, eps;  // mix = 1 - beta1, square_gain = 1 - beta2
  Real divisor;                       // of the gradients: grad_scale or 1, negative to maximize

  LC_INLINE void block(int64_t base, int64_t count, uint32_t word) const {
    maximum ? loop<true>(base, count, word) : loop<false>(base, count, word);
  }

  template <bool kAmsgrad>
  LC_INLINE void loop(int64_t base, int64_t count, uint32_t word) const {
    Weight* __restrict__ params = param + base;
    Weight* __restrict__ averages = average + base;
    Weight* __restrict__ squares = square + base;
    Weight* __restrict__ maxima = maximum + (kAmsgrad ? base : 0);
    const Weight* __restrict__ grads = grad + base;
#pragma GCC ivdep  // the tensors never overlap
    for (int j = 0; j < static_cast<int>(count); ++j) {
      const uint32_t alive = is_alive(word, j);
      const Real weight = static_cast<Real>(params[j]) * decay;
      const Real slope = static_cast<Real>(grads[j]) / divisor;
      // torch.lerp, which starts from the nearer end.
      const Real before = averages[j];
      const Real gap = slope - before;
      const Real from_before = before + mix * gap;
      const Real from_slope = slope - gap * (Real{1} - mix);
      const Real mean = mix < Real{0.5} ? from_before : from_slope;
      Real spread = static_cast<Real>(squares[j]) * beta2 + square_gain * slope * slope;
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
  }

  LC_INLINE void prune(int64_t, int64_t) const {}
};

// Zeroes what is pruned, whatever stood there. Bits: the unsigned integer of the weight's width,
// as a floating-point zero is all zero bits.
template <typename Bits>
struct ZeroRule {
  static constexpr bool kDense = false;

  Bits* data;  // [numel]

  LC_INLINE void block(int64_t base, int64_t count, uint32_t word) const {
    for (int j = 0; j < static_cast<int>(count); ++j) {
      if (!is_alive(word, j)) data[base + j] = 0;
    }
  }

  LC_INLINE void prune(int64_t base, int64_t count) const {
    std::fill_n(data + base, count, Bits{0});
  }
};

}  // namespace layer_collapse
