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
#include <cmath>

#include "cpu/dispatch.h"

namespace layer_collapse {

LC_INLINE bool is_alive(uint32_t word, int64_t j) { return (word >> j) & 1; }

// torch.optim.SGD (torch/optim/sgd.py, _single_tensor_sgd).
template <typename Weight>
struct SgdRule {
  using Real = Compute<Weight>;
  static constexpr bool kDense = true;

  Weight* param;       // [numel]
  const Weight* grad;  // [numel]
  Weight* buffer;      // [numel], nullptr without momentum
  Real lr, momentum, gain, weight_decay, grad_scale;  // gain = 1 - dampening
  bool nesterov, maximize, first_step, scaled;

  LC_INLINE void block(int64_t base, int64_t count, uint32_t word) const {
    Weight* __restrict__ params = param + base;
    Weight* __restrict__ buffers = buffer + (buffer ? base : 0);
    const Weight* __restrict__ grads = grad + base;
    for (int64_t j = 0; j < count; ++j) {
      const bool alive = is_alive(word, j);
      const Real weight = params[j];
      Real slope = grads[j];
      if (scaled) slope /= grad_scale;
      if (maximize) slope = -slope;
      if (weight_decay != 0) slope += weight_decay * weight;
      if (buffer) {
        const Real velocity =
            first_step ? slope : static_cast<Real>(buffers[j]) * momentum + gain * slope;
        buffers[j] = alive ? velocity : Real{0};
        slope = nesterov ? slope + momentum * velocity : velocity;
      }
      params[j] = alive ? weight - lr * slope : Real{0};
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

  Weight* param;       // [numel]
  const Weight* grad;  // [numel]
  Weight* average;     // [numel] exp_avg
  Weight* square;      // [numel] exp_avg_sq
  Weight* maximum;     // [numel] max_exp_avg_sq, nullptr without amsgrad
  Real step_size;      // lr / (1 - beta1^t)
  Real root_correction;  // sqrt(1 - beta2^t)
  Real decay;            // 1 - lr * weight_decay
  Real mix, beta2, square_gain, eps, grad_scale;  // mix = 1 - beta1, square_gain = 1 - beta2
  bool decays, maximize, scaled;

  LC_INLINE void block(int64_t base, int64_t count, uint32_t word) const {
    Weight* __restrict__ params = param + base;
    Weight* __restrict__ averages = average + base;
    Weight* __restrict__ squares = square + base;
    Weight* __restrict__ maxima = maximum + (maximum ? base : 0);
    const Weight* __restrict__ grads = grad + base;
    for (int64_t j = 0; j < count; ++j) {
      const bool alive = is_alive(word, j);
      Real weight = params[j];
      Real slope = grads[j];
      if (scaled) slope /= grad_scale;
      if (maximize) slope = -slope;
      if (decays) weight *= decay;
      // torch.lerp, which starts from the nearer end.
      const Real before = averages[j];
      const Real gap = slope - before;
      const Real mean = mix < Real{0.5} ? before + mix * gap : slope - gap * (Real{1} - mix);
      Real spread = static_cast<Real>(squares[j]) * beta2 + square_gain * slope * slope;
      averages[j] = alive ? mean : Real{0};
      squares[j] = alive ? spread : Real{0};
      if (maximum) {
        const Real largest = maxima[j];
        spread = largest >= spread || largest != largest ? largest : spread;  // keeps NaN
        maxima[j] = alive ? spread : Real{0};
      }
      const Real divisor = std::sqrt(spread) / root_correction + eps;
      params[j] = alive ? weight - step_size * mean / divisor : Real{0};
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
    for (int64_t j = 0; j < count; ++j) {
      if (!is_alive(word, j)) data[base + j] = 0;
    }
  }

  LC_INLINE void prune(int64_t base, int64_t count) const {
    std::fill_n(data + base, count, Bits{0});
  }
};

}  // namespace layer_collapse
