// What the CUDA ops ask of masks. Bits beyond the weights cannot be refused without waiting for the
// device; the kernels ignore them.
#pragma once

#include "cpu/masked_tensors.h"
#include "cuda/on_device.h"

namespace layer_collapse {

// The words of the mask for `tensor`, or nullptr for an empty mask. The bits stay the caller's.
inline uint32_t* mask_words_of(const char* op, size_t i, const Tensor& mask, const Tensor& tensor) {
  check(mask.scalar_type() == ScalarType::Int, op, ": masks[", i, "] must be int32 (got ",
        torch::headeronly::toString(mask.scalar_type()), ")");
  if (mask.numel() == 0) return nullptr;
  check_device(op, "masks", i, mask, tensor);
  const int64_t numel = tensor.numel();
  check(mask.dim() == 1 && mask.is_contiguous() && mask.numel() == mask_words(numel), op,
        ": masks[", i, "] must be contiguous of shape [", mask_words(numel), "] for ", numel,
        " weights (got shape ", ShapeOf{mask}, ")");
  return static_cast<uint32_t*>(mask.data_ptr());
}

}  // namespace layer_collapse
