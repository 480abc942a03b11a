// Masked optimiser steps over lists of tensors.
//
// A thread takes 16 bytes of weights (one weight where a tensor is not aligned), a warp therefore
// those of 32 / (32 / values) words; threads whose word is zero load and store nothing, so a warp
// of pruned words touches its mask alone. The rules are those of cpu/masked_rules.h, with its
// invariant: pruned weights and their state are zero before a step.
#pragma once

#include "cuda/masked_walk.cuh"

namespace layer_collapse {

// One number on the device, float32 or float64; absent: nullptr.
struct DeviceScalar {
  const void* data = nullptr;
  bool wide = false;

  __device__ __forceinline__ double get(double absent) const {
    if (!data) return absent;
    return wide ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

// What both optimisers have in common.
struct StepArguments {
  double lr, weight_decay;
  bool maximize;
  DeviceScalar grad_scale, found_inf, lr_scale;

  __device__ __forceinline__ double rate() const { return lr * lr_scale.get(1.0); }
};

template <typename Real>
__device__ __forceinline__ Real root(Real v) {
  return sqrt(v);
}
__device__ __forceinline__ float root(float v) { return sqrtf(v); }

// What gradients are multiplied by: a division per weight would cost more than the step. The
// inverse of GradScaler's scales, powers of two, is exact.
__device__ __forceinline__ double gradient_factor(const StepArguments& step) {
  const double inverse = 1 / step.grad_scale.get(1.0);
  return step.maximize ? -inverse : inverse;
}

// mean / denominator; approximate to 2 units in the last place of a float where a half is stored.
template <typename T, typename Real>
__device__ __forceinline__ Real ratio(Real mean, Real denominator) {
  if constexpr (sizeof(T) < sizeof(Real)) {
    return __fdividef(mean, denominator);
  } else {
    return mean / denominator;
  }
}

// torch.optim.SGD; data: weights, gradients, momentum buffers.
struct SgdArguments {
  StepArguments step;
  double momentum, dampening;
  bool nesterov, first_step;
};

template <typename T, bool kMomentum>
struct DeviceSgd {
  using Real = typename Numeric<T>::Real;
  T* param;
  const T* grad;
  T* buffer;
  Real lr, momentum, gain, weight_decay;
  Real factor;  // of the gradients
  bool nesterov, first_step;

  template <int kValues>
  __device__ __forceinline__ void block(int64_t place, uint32_t alive) const {
    using Values = Vector<T, kValues>;
    Values weights = Values::load(param + place);
    const Values gradients = Values::load(grad + place);
    Values velocities{};
    if constexpr (kMomentum) {
      if (!first_step) velocities = Values::load(buffer + place);
    }
    LC_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const bool lives = (alive >> i & 1) != 0;
      const Real weight = weights.get(i);
      Real slope = gradients.get(i) * factor;
      if (weight_decay != 0) slope += weight_decay * weight;
      if constexpr (kMomentum) {
        const Real velocity = first_step ? slope : velocities.get(i) * momentum + gain * slope;
        velocities.set(i, lives ? velocity : Real(0));
        slope = nesterov ? slope + momentum * velocity : velocity;
      }
      weights.set(i, lives ? weight - lr * slope : Real(0));
    }
    weights.store(param + place);
    if constexpr (kMomentum) velocities.store(buffer + place);
  }

  // On the first step the buffer's memory is not yet known to be zero.
  template <int kValues>
  __device__ __forceinline__ void prune(int64_t place) const {
    if constexpr (kMomentum) {
      if (first_step) Vector<T, kValues>{}.store(buffer + place);
    }
  }
};

// torch.optim.AdamW; data: weights, gradients, exp_avg, exp_avg_sq, max_exp_avg_sq, the step.
struct AdamWArguments {
  StepArguments step;
  double beta1, beta2, eps;
};

template <typename T, bool kAmsgrad>
struct DeviceAdamW {
  using Real = typename Numeric<T>::Real;
  T* param;
  const T* grad;
  T* average;
  T* square;
  T* maximum;
  Real step_size, root_factor, decay, mix, beta2, square_gain, eps;
  Real factor;  // of the gradients

  template <int kValues>
  __device__ __forceinline__ void block(int64_t place, uint32_t alive) const {
    using Values = Vector<T, kValues>;
    Values weights = Values::load(param + place);
    const Values gradients = Values::load(grad + place);
    Values averages = Values::load(average + place);
    Values squares = Values::load(square + place);
    Values maxima{};
    if constexpr (kAmsgrad) maxima = Values::load(maximum + place);
    LC_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const bool lives = (alive >> i & 1) != 0;
      const Real slope = gradients.get(i) * factor;
      const Real before = averages.get(i);  // torch.lerp, which starts from the nearer end
      const Real mean = mix < Real(0.5) ? before + mix * (slope - before)
                                        : slope - (slope - before) * (Real(1) - mix);
      Real spread = squares.get(i) * beta2 + square_gain * slope * slope;
      averages.set(i, lives ? mean : Real(0));
      squares.set(i, lives ? spread : Real(0));
      if constexpr (kAmsgrad) {
        const Real largest = maxima.get(i);
        spread = spread <= largest || largest != largest ? largest : spread;  // keeps NaN
        maxima.set(i, lives ? spread : Real(0));
      }
      const Real denominator = root(spread) * root_factor + eps;
      const Real moved = weights.get(i) * decay - ratio<T>(step_size * mean, denominator);
      weights.set(i, lives ? moved : Real(0));
    }
    weights.store(param + place);
    averages.store(average + place);
    squares.store(square + place);
    if constexpr (kAmsgrad) maxima.store(maximum + place);
  }

  template <int kValues>
  __device__ __forceinline__ void prune(int64_t) const {}
};

inline constexpr int kSgdData = 3, kAdamWData = 6;

template <typename T, bool kMomentum>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    masked_sgd(const __grid_constant__ TensorTable<kSgdData> table, const SgdArguments a) {
  using Real = typename Numeric<T>::Real;
  if (a.step.found_inf.get(0.0) != 0.0) return;
  const int tensor = tensor_of(table, blockIdx.x);
  void* const* data = table.data[tensor];
  const DeviceSgd<T, kMomentum> rule{static_cast<T*>(data[0]),
                                     static_cast<const T*>(data[1]),
                                     static_cast<T*>(data[2]),
                                     static_cast<Real>(a.step.rate()),
                                     static_cast<Real>(a.momentum),
                                     static_cast<Real>(1 - a.dampening),
                                     static_cast<Real>(a.step.weight_decay),
                                     static_cast<Real>(gradient_factor(a.step)),
                                     a.nesterov,
                                     a.first_step};
  const WordRange range = words_of_block(table, tensor);
  run_rule<kVectorValues<T>>(rule, table.words[tensor], table.numel[tensor], range.begin, range.end,
                             is_aligned(table, tensor, kMomentum ? 3 : 2));
}

// base^exponent for a whole number; a library call would need a stack.
__device__ __forceinline__ double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0) result *= base;
    base *= base;
  }
  return result;
}

// Left alone, ptxas takes 80 registers for doubles on sm_75; held to fewer elsewhere, it spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LC_ADAMW_BOUNDS __launch_bounds__(kThreads, kBlocksPerSm)
#else
#define LC_ADAMW_BOUNDS __launch_bounds__(kThreads)
#endif

// table.group: 1 if the step's number is float64. A step below 1 leaves its tensor unchanged.
template <typename T, bool kAmsgrad>
__global__ void LC_ADAMW_BOUNDS masked_adamw(const __grid_constant__ TensorTable<kAdamWData> table,
                                             const AdamWArguments a) {
  using Real = typename Numeric<T>::Real;
  if (a.step.found_inf.get(0.0) != 0.0) return;
  const int tensor = tensor_of(table, blockIdx.x);
  void* const* data = table.data[tensor];
  using Corrections = double[3];
  // 1 - beta^t, and the rate; once per block, as the powers take a while and registers are few.
  LC_SHARED(Corrections, corrections);
  if (threadIdx.x < 2) {
    const DeviceScalar step{data[5], table.group[tensor] != 0};
    const auto number = static_cast<int64_t>(step.get(0.0));
    corrections[threadIdx.x] = 1 - power(threadIdx.x == 0 ? a.beta1 : a.beta2, number);
  }
  if (threadIdx.x == 2) corrections[2] = a.step.rate();
  __syncthreads();
  if (corrections[0] == 0) return;
  const double rate = corrections[2];
  const DeviceAdamW<T, kAmsgrad> rule{static_cast<T*>(data[0]),
                                      static_cast<const T*>(data[1]),
                                      static_cast<T*>(data[2]),
                                      static_cast<T*>(data[3]),
                                      static_cast<T*>(data[4]),
                                      static_cast<Real>(rate / corrections[0]),
                                      static_cast<Real>(1 / sqrt(corrections[1])),
                                      static_cast<Real>(1 - rate * a.step.weight_decay),
                                      static_cast<Real>(1 - a.beta1),
                                      static_cast<Real>(a.beta2),
                                      static_cast<Real>(1 - a.beta2),
                                      static_cast<Real>(a.eps),
                                      static_cast<Real>(gradient_factor(a.step))};
  const WordRange range = words_of_block(table, tensor);
  run_rule<kVectorValues<T>>(rule, table.words[tensor], table.numel[tensor], range.begin, range.end,
                             is_aligned(table, tensor, kAmsgrad ? 5 : 4));
}

}  // namespace layer_collapse
