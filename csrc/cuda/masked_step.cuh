// Masked optimiser steps over lists of tensors, and what they need of masks.
//
// A thread takes 16 bytes of weights (one weight where a tensor is not aligned), a warp therefore
// those of 32 / (32 / values) words; threads whose word is zero load and store nothing, so a warp
// of pruned words touches its mask alone. The rules are those of cpu/masked_rules.h, with its
// invariant: pruned weights and their state are zero before a step.
#pragma once

#include "cuda/tensor_list.cuh"

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

// Zeroes what is pruned. Bits: the unsigned integer of the weight's width.
template <typename Bits>
struct DeviceZero {
  Bits* data;

  template <int kValues>
  __device__ __forceinline__ void block(int64_t place, uint32_t alive) const {
    if (alive == 0) return prune<kValues>(place);
    LC_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if ((alive >> i & 1) == 0) data[place + i] = 0;
    }
  }

  template <int kValues>
  __device__ __forceinline__ void prune(int64_t place) const {
    if constexpr (kValues == 1) {
      data[place] = 0;
    } else {
      *reinterpret_cast<uint4*>(data + place) = uint4{};
    }
  }
};

// Runs a rule over this block's words. kValues weights fill 16 bytes; what does not fill them, or
// is not aligned, is visited weight by weight.
template <int kValues, typename Rule>
__device__ __forceinline__ void run_rule(const Rule& rule, const uint32_t* words, int64_t numel,
                                         int64_t begin, int64_t end, bool aligned) {
  const int64_t last = end * kWordBits < numel ? end : numel / kWordBits;  // whole words
  const int64_t whole = aligned ? (last > begin ? last : begin) : begin;
  walk_words<kValues>(words, numel, begin, whole, [&](uint32_t word, int64_t place) {
    if (word == 0) {
      rule.template prune<kValues>(place);
    } else {
      constexpr uint32_t kShare = kValues == kWordBits ? ~0U : (1U << kValues) - 1;
      rule.template block<kValues>(place, word >> place % kWordBits & kShare);
    }
  });
  walk_words<1>(words, numel, whole, end, [&](uint32_t word, int64_t place) {
    if (place >= numel) return;
    if (word == 0) {
      rule.template prune<1>(place);
    } else {
      rule.template block<1>(place, word >> place % kWordBits & 1);
    }
  });
}

// Whether all pointers of a tensor allow 16-byte accesses.
template <int kData>
__device__ __forceinline__ bool is_aligned(const TensorTable<kData>& table, int tensor, int data) {
  uintptr_t places = 0;
  for (int i = 0; i < data; ++i) places |= reinterpret_cast<uintptr_t>(table.data[tensor][i]);
  return places % sizeof(uint4) == 0;
}

// The words that this block has of its tensor.
struct WordRange {
  int64_t begin, end;
};
template <int kData>
__device__ __forceinline__ WordRange words_of_block(const TensorTable<kData>& table, int tensor) {
  const int64_t words = mask_words(table.numel[tensor]);
  const int64_t begin = (blockIdx.x - table.first[tensor]) * table.chunk;
  return {begin, begin + table.chunk < words ? begin + table.chunk : words};
}

inline constexpr int kSgdData = 3, kAdamWData = 6, kZeroData = 1;

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

// table.group: 1 if the step's number is float64. A step below 1 leaves its tensor unchanged.
template <typename T, bool kAmsgrad>
__global__ void __launch_bounds__(kThreads)
    masked_adamw(const __grid_constant__ TensorTable<kAdamWData> table, const AdamWArguments a) {
  using Real = typename Numeric<T>::Real;
  if (a.step.found_inf.get(0.0) != 0.0) return;
  const int tensor = tensor_of(table, blockIdx.x);
  void* const* data = table.data[tensor];
  using Corrections = double[2];
  LC_SHARED(Corrections, corrections);  // 1 - beta^t; once per block, as the powers take a while
  if (threadIdx.x < 2) {
    const DeviceScalar step{data[5], table.group[tensor] != 0};
    const auto number = static_cast<int64_t>(step.get(0.0));
    corrections[threadIdx.x] = 1 - power(threadIdx.x == 0 ? a.beta1 : a.beta2, number);
  }
  __syncthreads();
  if (corrections[0] == 0) return;
  const double rate = a.step.rate();
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

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    apply_masks(const __grid_constant__ TensorTable<kZeroData> table) {
  const int tensor = tensor_of(table, blockIdx.x);
  if (!table.words[tensor]) return;
  const DeviceZero<Bits> rule{static_cast<Bits*>(table.data[tensor][0])};
  const WordRange range = words_of_block(table, tensor);
  run_rule<static_cast<int>(sizeof(uint4) / sizeof(Bits))>(rule, table.words[tensor],
                                                           table.numel[tensor], range.begin,
                                                           range.end, is_aligned(table, tensor, 1));
}

// The order of a tensor's memory: sizes from the slowest dimension, and how far one step in each
// moves the logical index. Dimensions beyond kMemoryDims must have been merged.
inline constexpr int kMemoryDims = 8;
struct MemoryOrder {
  int dims;
  int64_t sizes[kMemoryDims], strides[kMemoryDims];
};

// reordered: the mask of the weights in the order of their memory. A warp per word.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reorder_mask(const __grid_constant__ MemoryOrder order, const uint32_t* words, int64_t numel,
                 uint32_t* reordered) {
  const int64_t count = mask_words(numel);
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t number = blockIdx.x * static_cast<int64_t>(blockDim.x / kWarp) + threadIdx.x / kWarp;
       number < count; number += warps) {
    int64_t place = number * kWordBits + lane;
    bool alive = place < numel;
    if (alive) {
      int64_t logical = 0;
      LC_UNROLL
      for (int dim = kMemoryDims; dim-- > 0;) {
        if (dim >= order.dims) continue;
        logical += place % order.sizes[dim] * order.strides[dim];
        place /= order.sizes[dim];
      }
      alive = (words[logical / kWordBits] >> logical % kWordBits & 1) != 0;
    }
    const uint32_t word = __ballot_sync(~0U, alive);
    if (lane == 0) reordered[number] = word;
  }
}

}  // namespace layer_collapse
