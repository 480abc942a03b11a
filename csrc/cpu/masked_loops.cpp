// The loops of masked_step.h on the machine that this is.
#include "cpu/machine.h"
#include "cpu/masked_step.h"

namespace layer_collapse {

void sgd_step(std::span<const StepTensor> tensors, const SgdOptions& how) {
  LC_ON_MACHINE(sgd_run(tensors, how))
}

void adamw_step(std::span<const StepTensor> tensors, const AdamWOptions& how) {
  LC_ON_MACHINE(adamw_run(tensors, how))
}

void zero_pruned(std::span<const ZeroTensor> tensors) { LC_ON_MACHINE(zero_run(tensors)) }

}  // namespace layer_collapse
