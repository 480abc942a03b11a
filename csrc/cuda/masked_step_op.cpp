// masked_sgd_, masked_adamw_ and apply_masks_ on CUDA: check, allocate, launch. Numbers that live
// on the device (grad_scale, found_inf, lr_scale, steps) are read there, so nothing waits.
#include "cuda/masked_step.h"

#include "cpu/step_arguments.h"
#include "cuda/mask_arguments.h"

namespace layer_collapse {
namespace {

// A list in the order of its tensors' memory, and the masks that were reordered for it.
struct Listed {
  std::vector<MaskedData> list;
  std::vector<Tensor> owned;
};

// Dimensions that lie side by side in both orders, as one; false if more than 8 are left.
bool merge(std::vector<int64_t>& sizes, std::vector<int64_t>& strides) {
  for (size_t dim = sizes.size(); dim-- > 1;) {
    if (strides[dim - 1] != sizes[dim] * strides[dim]) continue;
    sizes[dim - 1] *= sizes[dim];
    strides[dim - 1] = strides[dim];
    sizes.erase(sizes.begin() + static_cast<std::ptrdiff_t>(dim));
    strides.erase(strides.begin() + static_cast<std::ptrdiff_t>(dim));
  }
  return sizes.size() <= 8;
}

Listed list_of(const char* op, const char* name, const Tensors& tensors, const Tensors& masks,
               void* stream) {
  check_length(op, "masks", masks.size(), tensors.size());
  Listed result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check_weights(op, name, i, tensor);
    check_device(op, name, i, tensor, tensors[0]);
    const uint32_t* words = mask_words_of(op, i, masks[i], tensor);
    StridedWalk walk;
    const bool dense = tensor.is_contiguous() ||
                       memory_walk(to_vector(tensor.sizes()), to_vector(tensor.strides()), walk);
    check(dense, op, ": ", name, "[", i, "] must be dense, without gaps or overlaps (got shape ",
          ShapeOf{tensor}, " in a strided view)");
    if (words && !tensor.is_contiguous() && tensor.numel() > 0) {
      check(merge(walk.sizes, walk.strides), op, ": ", name, "[", i,
            "] must have at most 8 dims in an order of their own (got ", walk.sizes.size(), ")");
      Tensor reordered = torch::stable::empty_like(masks[i]);
      auto* target = static_cast<uint32_t*>(reordered.mutable_data_ptr());
      check_launch(op, launch_reorder_mask(walk.sizes, walk.strides, words, tensor.numel(), target,
                                           kOpThreads, stream));
      words = target;
      result.owned.push_back(reordered);
    }
    result.list.push_back({dtype_of(tensor.scalar_type()), tensor.numel(), words, {}});
  }
  return result;
}

void add_data(Listed& listed, const Tensors& tensors) {
  for (size_t i = 0; i < listed.list.size(); ++i) {
    listed.list[i].data.push_back(tensors.empty() ? nullptr : tensors[i].data_ptr());
  }
}

void check_devices(const char* op, const char* name, const Tensors& tensors, const Tensor& first) {
  for (size_t i = 0; i < tensors.size(); ++i) check_device(op, name, i, tensors[i], first);
}

ScalarArgument scalar_of(const char* op, const char* name, const std::optional<Tensor>& value,
                         const Tensor& first) {
  if (!value) return {};
  check(value->numel() == 1, op, ": ", name, " must hold one number (got ", value->numel(), ")");
  const bool wide = value->scalar_type() == ScalarType::Double;
  check(wide || value->scalar_type() == ScalarType::Float, op, ": ", name,
        " must be float32 or float64 (got ", torch::headeronly::toString(value->scalar_type()),
        ")");
  check(same_device(*value, first), op, ": ", name,
        " must be on the weights' device (got another device)");
  return {value->const_data_ptr(), wide};
}

void masked_sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors masks, double lr,
                 double momentum, double dampening, double weight_decay, bool nesterov,
                 bool maximize, bool first_step, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf, std::optional<Tensor> lr_scale) {
  constexpr const char* kOp = "masked_sgd_";
  if (params.empty()) return;
  const OnDevice device(params[0]);
  check_devices(kOp, "grads", grads, params[0]);
  check_devices(kOp, "momentum_buffers", momentum_buffers, params[0]);
  Listed listed = list_of(kOp, "params", params, masks, device.stream());
  const Tensors slopes = lay_out_grads(kOp, grads, params);
  if (momentum != 0) {
    check_state(kOp, "momentum_buffers", momentum_buffers, params);
  } else {
    check(momentum_buffers.empty(), kOp, ": momentum_buffers must be empty without momentum (got ",
          momentum_buffers.size(), ")");
  }
  const SgdOptions options{
      {lr, weight_decay, maximize, scalar_of(kOp, "grad_scale", grad_scale, params[0]),
       scalar_of(kOp, "found_inf", found_inf, params[0]),
       scalar_of(kOp, "lr_scale", lr_scale, params[0])},
      momentum,
      dampening,
      nesterov,
      first_step};
  add_data(listed, params);
  add_data(listed, slopes);
  add_data(listed, momentum_buffers);
  check_launch(kOp, launch_masked_sgd(listed.list, options, kOpThreads, device.stream()));
}

void masked_adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors max_exp_avg_sqs, Tensors masks, Tensors steps, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<Tensor> lr_scale) {
  constexpr const char* kOp = "masked_adamw_";
  if (params.empty()) return;
  const OnDevice device(params[0]);
  const bool amsgrad = !max_exp_avg_sqs.empty();
  check_devices(kOp, "grads", grads, params[0]);
  check_devices(kOp, "exp_avgs", exp_avgs, params[0]);
  check_devices(kOp, "exp_avg_sqs", exp_avg_sqs, params[0]);
  check_devices(kOp, "max_exp_avg_sqs", max_exp_avg_sqs, params[0]);
  Listed listed = list_of(kOp, "params", params, masks, device.stream());
  const Tensors slopes = lay_out_grads(kOp, grads, params);
  check_state(kOp, "exp_avgs", exp_avgs, params);
  check_state(kOp, "exp_avg_sqs", exp_avg_sqs, params);
  if (amsgrad) check_state(kOp, "max_exp_avg_sqs", max_exp_avg_sqs, params);
  check_length(kOp, "steps", steps.size(), params.size());
  const AdamWOptions options{
      {lr, weight_decay, maximize, scalar_of(kOp, "grad_scale", grad_scale, params[0]),
       scalar_of(kOp, "found_inf", found_inf, params[0]),
       scalar_of(kOp, "lr_scale", lr_scale, params[0])},
      beta1,
      beta2,
      eps};
  add_data(listed, params);
  add_data(listed, slopes);
  add_data(listed, exp_avgs);
  add_data(listed, exp_avg_sqs);
  add_data(listed, max_exp_avg_sqs);
  for (size_t i = 0; i < steps.size(); ++i) {
    const ScalarArgument step =
        scalar_of(kOp, ("steps[" + std::to_string(i) + "]").c_str(), steps[i], params[0]);
    listed.list[i].data.push_back(const_cast<void*>(step.data));
    listed.list[i].wide_step = step.wide;
  }
  check_launch(kOp,
               launch_masked_adamw(listed.list, options, amsgrad, kOpThreads, device.stream()));
}

void apply_masks_(Tensors tensors, Tensors masks) {
  constexpr const char* kOp = "apply_masks_";
  if (tensors.empty()) return;
  const OnDevice device(tensors[0]);
  Listed listed = list_of(kOp, "tensors", tensors, masks, device.stream());
  add_data(listed, tensors);
  check_launch(kOp, launch_apply_masks(listed.list, kOpThreads, device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LC_CUDA_LIBRARY, LC_CUDA_KEY, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
  m.impl("apply_masks_", TORCH_BOX(&apply_masks_));
}

}  // namespace layer_collapse
