#include "cuda/apply_masks.cuh"
#include "cuda/masked_step.cuh"

#include "cuda/table.h"

namespace layer_collapse {
namespace {

StepArguments to_arguments(const StepOptions& options) {
  return {options.lr,
          options.weight_decay,
          options.maximize,
          {options.grad_scale.data, options.grad_scale.wide},
          {options.found_inf.data, options.found_inf.wide},
          {options.lr_scale.data, options.lr_scale.wide}};
}

// Starts `kernel` over all tensors of one dtype.
template <int kData, typename Kernel, typename... Arguments>
int run(const std::vector<MaskedData>& list, Dtype dtype, Kernel kernel, int threads, void* stream,
        const Arguments&... arguments) {
  return for_each_table<kData>(
      list, [dtype](const MaskedData& tensor) { return tensor.dtype == dtype; },
      [&](const TensorTable<kData>& table, const std::vector<size_t>&, int64_t blocks) {
        return launch(kernel, blocks, threads, stream, table, arguments...);
      });
}

int first_error(std::initializer_list<int> errors) {
  for (const int error : errors) {
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace

int launch_masked_sgd(const std::vector<MaskedData>& list, const SgdOptions& options, int threads,
                      void* stream) {
  const SgdArguments a{to_arguments(options.step), options.momentum, options.dampening,
                       options.nesterov, options.first_step};
  const bool momentum = options.momentum != 0;
  const auto over = [&](Dtype dtype, auto with, auto without) {
    return run<kSgdData>(list, dtype, momentum ? with : without, threads, stream, a);
  };
  return first_error({
      over(Dtype::float32, masked_sgd<float, true>, masked_sgd<float, false>),
      over(Dtype::float64, masked_sgd<double, true>, masked_sgd<double, false>),
      over(Dtype::bfloat16, masked_sgd<BFloat16, true>, masked_sgd<BFloat16, false>),
      over(Dtype::float16, masked_sgd<Half, true>, masked_sgd<Half, false>),
  });
}

int launch_masked_adamw(const std::vector<MaskedData>& list, const AdamWOptions& options,
                        bool amsgrad, int threads, void* stream) {
  const AdamWArguments a{to_arguments(options.step), options.beta1, options.beta2, options.eps};
  const auto over = [&](Dtype dtype, auto with, auto without) {
    return run<kAdamWData>(list, dtype, amsgrad ? with : without, threads, stream, a);
  };
  return first_error({
      over(Dtype::float32, masked_adamw<float, true>, masked_adamw<float, false>),
      over(Dtype::float64, masked_adamw<double, true>, masked_adamw<double, false>),
      over(Dtype::bfloat16, masked_adamw<BFloat16, true>, masked_adamw<BFloat16, false>),
      over(Dtype::float16, masked_adamw<Half, true>, masked_adamw<Half, false>),
  });
}

int launch_apply_masks(const std::vector<MaskedData>& list, int threads, void* stream) {
  return first_error({
      run<kZeroData>(list, Dtype::float32, apply_masks<uint32_t>, threads, stream),
      run<kZeroData>(list, Dtype::float64, apply_masks<uint64_t>, threads, stream),
      run<kZeroData>(list, Dtype::bfloat16, apply_masks<uint16_t>, threads, stream),
      run<kZeroData>(list, Dtype::float16, apply_masks<uint16_t>, threads, stream),
  });
}

int launch_reorder_mask(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                        const uint32_t* words, int64_t numel, uint32_t* reordered, int threads,
                        void* stream) {
  if (numel == 0) return 0;
  MemoryOrder order{static_cast<int>(sizes.size()), {}, {}};
  std::copy(sizes.begin(), sizes.end(), order.sizes);
  std::copy(strides.begin(), strides.end(), order.strides);
  const int64_t warps = threads / kWarp;
  const int64_t blocks = std::min<int64_t>((mask_words(numel) + warps - 1) / warps, kTableBlocks);
  return launch(reorder_mask, blocks, threads, stream, order, words, numel, reordered);
}

}  // namespace layer_collapse
