// The masked steps on raw memory: what the ops and the way past the dispatcher share. Nothing is
// checked here.
#pragma once

#include <optional>
#include <span>

#include "cpu/masked_tensors.h"

namespace layer_collapse {

// A weight tensor, and gradient and state that lie in memory as it does.
struct StepTensor : MaskedTensor {
  void* param;       // [numel]
  const void* grad;  // [numel]
  void* state[3];    // [numel] each; nullptr for what the step does without:
                     //   SGD: momentum buffer; AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq
  double step;       // AdamW: which step this is, from 1
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first_step;  // the momentum buffers, all zeros, are set to the gradient
  std::optional<double> grad_scale;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  std::optional<double> grad_scale;
};

// Both expect zeros wherever a weight is pruned, see masked_rules.h.
void sgd_step(std::span<const StepTensor> tensors, const SgdOptions& how);
void adamw_step(std::span<const StepTensor> tensors, const AdamWOptions& how);

struct ZeroTensor : MaskedTensor {
  void* data;  // [numel]
};

// Zeroes what is pruned, whatever stood there.
void zero_pruned(std::span<const ZeroTensor> tensors);

// masked_run.h, once per machine.
namespace avx512 {
void sgd_run(std::span<const StepTensor> tensors, const SgdOptions& how);
void adamw_run(std::span<const StepTensor> tensors, const AdamWOptions& how);
void zero_run(std::span<const ZeroTensor> tensors);
}  // namespace avx512
namespace avx2 {
void sgd_run(std::span<const StepTensor> tensors, const SgdOptions& how);
void adamw_run(std::span<const StepTensor> tensors, const AdamWOptions& how);
void zero_run(std::span<const ZeroTensor> tensors);
}  // namespace avx2
namespace baseline {
void sgd_run(std::span<const StepTensor> tensors, const SgdOptions& how);
void adamw_run(std::span<const StepTensor> tensors, const AdamWOptions& how);
void zero_run(std::span<const ZeroTensor> tensors);
}  // namespace baseline

}  // namespace layer_collapse
