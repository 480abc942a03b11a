// masked_sgd_, masked_adamw_ and apply_masks_ on the CPU: arguments checked, then masked_step.h.
#include "cpu/masked_step.h"

#include <torch/csrc/stable/library.h>

#include "cpu/step_arguments.h"

namespace layer_collapse {
namespace {

// Weights, gradients and masks of a step, without state. `slopes` keeps the gradients alive.
std::vector<StepTensor> view_step(const char* op, const Tensors& params, const Tensors& grads,
                                  const Tensors& masks, Tensors& slopes) {
  check_length(op, "masks", masks.size(), params.size());
  std::vector<StepTensor> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    tensors.push_back({view_in_memory_order(op, "params", i, params[i], masks[i]),
                       params[i].mutable_data_ptr(),
                       nullptr,
                       {},
                       0});
  }
  slopes = lay_out_grads(op, grads, params);
  for (size_t i = 0; i < params.size(); ++i) tensors[i].grad = slopes[i].const_data_ptr();
  return tensors;
}

void add_state(const char* op, const char* list, const Tensors& state, const Tensors& params,
               int place, std::vector<StepTensor>& tensors) {
  check_state(op, list, state, params);
  for (size_t i = 0; i < params.size(); ++i) tensors[i].state[place] = state[i].mutable_data_ptr();
}

void masked_sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors masks, double lr,
                 double momentum, double dampening, double weight_decay, bool nesterov,
                 bool maximize, bool first_step, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf, std::optional<Tensor> lr_scale) {
  constexpr const char* kOp = "masked_sgd_";
  Tensors slopes;
  std::vector<StepTensor> tensors = view_step(kOp, params, grads, masks, slopes);
  if (momentum != 0) {
    add_state(kOp, "momentum_buffers", momentum_buffers, params, 0, tensors);
  } else {
    check(momentum_buffers.empty(), kOp, ": momentum_buffers must be empty without momentum (got ",
          momentum_buffers.size(), ")");
  }
  const std::optional<double> scale = read_optional(kOp, "grad_scale", grad_scale);
  const double rate = lr * read_optional(kOp, "lr_scale", lr_scale).value_or(1);
  if (read_optional(kOp, "found_inf", found_inf).value_or(0) != 0) return;

  // Skipped lines must hold zeros; before the first step the buffers' memory may hold anything.
  if (first_step) {
    for (Tensor& buffer : momentum_buffers) torch::stable::zero_(buffer);
  }
  sgd_step(tensors,
           {rate, momentum, dampening, weight_decay, nesterov, maximize, first_step, scale});
}

void masked_adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors max_exp_avg_sqs, Tensors masks, Tensors steps, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<Tensor> lr_scale) {
  constexpr const char* kOp = "masked_adamw_";
  Tensors slopes;
  std::vector<StepTensor> tensors = view_step(kOp, params, grads, masks, slopes);
  add_state(kOp, "exp_avgs", exp_avgs, params, 0, tensors);
  add_state(kOp, "exp_avg_sqs", exp_avg_sqs, params, 1, tensors);
  if (!max_exp_avg_sqs.empty()) {
    add_state(kOp, "max_exp_avg_sqs", max_exp_avg_sqs, params, 2, tensors);
  }
  check_length(kOp, "steps", steps.size(), params.size());
  const std::optional<double> scale = read_optional(kOp, "grad_scale", grad_scale);
  for (size_t i = 0; i < params.size(); ++i) {
    tensors[i].step = read_scalar(kOp, "steps", steps[i]);
    check(tensors[i].step >= 1, kOp, ": steps[", i, "] must be at least 1 (got ", tensors[i].step,
          ")");
  }
  const double rate = lr * read_optional(kOp, "lr_scale", lr_scale).value_or(1);
  if (read_optional(kOp, "found_inf", found_inf).value_or(0) != 0) return;
  adamw_step(tensors, {rate, beta1, beta2, eps, weight_decay, maximize, scale});
}

void apply_masks_(Tensors tensors, Tensors masks) {
  constexpr const char* kOp = "apply_masks_";
  check_length(kOp, "masks", masks.size(), tensors.size());
  std::vector<ZeroTensor> views;
  views.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.push_back({view_in_memory_order(kOp, "tensors", i, tensors[i], masks[i]),
                     tensors[i].mutable_data_ptr()});
  }
  zero_pruned(views);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
  m.impl("apply_masks_", TORCH_BOX(&apply_masks_));
}

}  // namespace layer_collapse
