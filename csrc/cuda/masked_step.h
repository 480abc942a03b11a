// Starts masked steps on a GPU. No torch in here: raw pointers, sizes, a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/rectify.h"

namespace layer_collapse {

// A tensor of a list. Its data lie in one order of memory without gaps, and so do its mask's bits.
struct MaskedData {
  Dtype dtype;
  int64_t numel;
  const uint32_t* words;  // [mask_words(numel)] on the device, or nullptr: every weight is alive
  std::vector<void*> data;
  bool wide_step = false;  // AdamW: whether the step's number is float64
};

// One number on the device; nullptr: absent.
struct ScalarArgument {
  const void* data = nullptr;
  bool wide = false;  // float64, else float32
};

struct StepOptions {
  double lr, weight_decay;
  bool maximize;
  ScalarArgument grad_scale, found_inf, lr_scale;
};
struct SgdOptions {
  StepOptions step;
  double momentum, dampening;
  bool nesterov, first_step;
};
struct AdamWOptions {
  StepOptions step;
  double beta1, beta2, eps;
};

// All return a cudaError_t, 0 for success, and start one kernel per dtype and per table of tensors
// (58 for SGD, 39 for AdamW, 72 for masks). threads: a power of two from 32 to 256.

// data: weights, gradients, momentum buffer (or nullptr without momentum).
int launch_masked_sgd(const std::vector<MaskedData>& list, const SgdOptions& options, int threads,
                      void* stream);
// data: weights, gradients, exp_avg, exp_avg_sq, max_exp_avg_sq (or nullptr), the step's number.
int launch_masked_adamw(const std::vector<MaskedData>& list, const AdamWOptions& options,
                        bool amsgrad, int threads, void* stream);
// data: the tensor.
int launch_apply_masks(const std::vector<MaskedData>& list, int threads, void* stream);

// reordered [mask_words(n)]: bits in the order of memory, given the dimensions from the slowest on,
// their sizes and how far a step in each moves the logical index. At most 8 dimensions.
int launch_reorder_mask(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                        const uint32_t* words, int64_t numel, uint32_t* reordered, int threads,
                        void* stream);

}  // namespace layer_collapse
