// Schemas of every op, apart from the kernels. `Tensor(a!)` marks what an op writes.
//
// ledger:  [6 + rows * C] int64 = {flags, positions, live words, counts[rows][C]}
//          (core/rectifier.h)
// masks:   [ceil(n / 32)] int32, one bit per weight, 1 = alive            (core/bitmask.h);
//          an empty mask means that every weight of that tensor is alive
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(layer_collapse, m) {
  // y = rectifier(x); adds the signs of x to the ledger.
  m.def(
      "rectify(Tensor x, Tensor(a!) ledger, int kind, int channel_dim, float slope, "
      "Tensor? weight, Tensor? valid) -> Tensor");
  // The same in place: x becomes y.
  m.def(
      "rectify_(Tensor(b!) x, Tensor(a!) ledger, int kind, int channel_dim, float slope, "
      "Tensor? weight, Tensor? valid) -> ()");
  // y = rectifier(batch_norm(x)), its statistics (mean and 1 / sqrt(var + eps), [C], as it used
  // them) and, in training, the running ones; adds the signs of what lies between to the ledger.
  m.def(
      "bn_rectify(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!) ledger, bool training, float momentum, float eps, "
      "int kind, float slope) -> (Tensor, Tensor, Tensor)");
  // Gradients of x, weight and bias (the last two [C], also where there is no such parameter).
  m.def(
      "bn_rectify_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, bool training, int kind, float slope) -> (Tensor, Tensor, Tensor)");
  // Entropies and neuron states of several ledgers, each of its kind: summary [L, 8] float64
  // {positions, H over all, H over active, on, off, saturated, mixed, nonfinite}; then, with the
  // neurons of all ledgers one after the other, H [N] float64 and state [N] uint8.
  m.def("layer_entropies(Tensor[] ledgers, int[] kinds) -> (Tensor, Tensor, Tensor)");

  // The next step of torch.optim.SGD on the alive weights; pruned weights and their state become 0.
  // The rate is lr times lr_scale, which a graph can be told anew.
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor[] masks, float lr, float momentum, float dampening, float weight_decay, "
      "bool nesterov, bool maximize, bool first_step, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? lr_scale) -> ()");
  // The same for torch.optim.AdamW; steps holds the number of this step per tensor, from 1.
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] masks, Tensor[] steps, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor? lr_scale) -> ()");
  // Sets every element whose mask bit is 0 to zero.
  m.def("apply_masks_(Tensor(a!)[] tensors, Tensor[] masks) -> ()");

  // How many of the k smallest alive |w|, by (|w|, tensor, index), lie in each tensor: [n] int64;
  // and what there is to refuse, [1, 3] (magnitude_arguments.h): all shares are 0 then. No op of a
  // selection waits for the device, so none refuses what only the device knows.
  m.def("magnitude_shares(Tensor[] weights, Tensor[] masks, int k) -> (Tensor, Tensor)");
  // Per tensor, alive |w| by the digit that follows `prefix` ([1] int64, the digits before it): [n,
  // 2049] int64, 2048 buckets and how many of the counted are NaN. |w| are unsigned integers of 31
  // bits (`wide`: 63), their digits 11 bits each, the last one fewer.
  m.def(
      "magnitude_histogram(Tensor[] weights, Tensor[] masks, Tensor prefix, int digit, bool wide) "
      "-> Tensor");
  // Clears the mask bits of the counts[i] smallest alive |w| of tensor i, by (|w|, index). What
  // there is to refuse, [n, 3]: no mask has changed then.
  m.def("magnitude_prune_(Tensor[] weights, Tensor(a!)[] masks, int[] counts) -> Tensor");
  // The same with counts [n] int64 on the weights' device, as magnitude_shares gives them.
  m.def(
      "magnitude_prune_.on_device(Tensor[] weights, Tensor(a!)[] masks, Tensor counts) -> Tensor");
}
