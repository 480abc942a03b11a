// A list of tensors with one mask each, and the loops over its words that all threads share. Sparse
// tensors never get here: the dispatcher has no kernel for them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <span>
#include <vector>

#include "checks.h"
#include "core/bitmask.h"
#include "core/strided_walk.h"
#include "cpu/dispatch.h"

namespace layer_collapse {

using torch::stable::Tensor;

// About 32 thousand weights: below that a second thread costs more than it brings.
inline constexpr int64_t kGrainWords = 1024;

struct MaskedTensor {
  ScalarType dtype;
  int64_t numel;
  uint32_t* words;   // nullptr: every weight is alive
  bool contiguous;   // mask order and memory order are the same
  StridedWalk walk;  // otherwise: what the op made of the strides
};

// A shape as messages show it, put into words only if the message is needed.
struct ShapeOf {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
    const char* separator = "[";
    for (int64_t size : shape.tensor.sizes()) {
      out << separator << size;
      separator = ", ";
    }
    return out << (shape.tensor.dim() == 0 ? "[]" : "]");
  }
};

inline void check_length(const char* op, const char* list, size_t length, size_t expected) {
  check(length == expected, op, ": ", list, " must hold one tensor per weight tensor (got ", length,
        " for ", expected, ")");
}

inline void check_weights(const char* op, const char* list, size_t i, const Tensor& tensor) {
  check(is_weight_dtype(tensor.scalar_type()), op, ": ", list, "[", i,
        "] must be float32, float64, bfloat16 or float16 (got ",
        torch::headeronly::toString(tensor.scalar_type()), ")");
}

// words[i] of the mask for `tensor`, or nullptr for an empty mask. The bits stay the caller's.
inline uint32_t* check_mask(const char* op, size_t i, const Tensor& mask, const Tensor& tensor) {
  check(mask.scalar_type() == ScalarType::Int, op, ": masks[", i, "] must be int32 (got ",
        torch::headeronly::toString(mask.scalar_type()), ")");
  if (mask.numel() == 0) return nullptr;
  const int64_t numel = tensor.numel();
  check(mask.dim() == 1 && mask.is_contiguous() && mask.numel() == mask_words(numel), op,
        ": masks[", i, "] must be contiguous of shape [", mask_words(numel), "] for ", numel,
        " weights (got shape ", ShapeOf{mask}, ")");
  auto* words = static_cast<uint32_t*>(mask.data_ptr());
  check(!has_stray_bits(words, numel), op, ": masks[", i, "] must have no bit set beyond its ",
        numel, " weights (got stray bits in the last word)");
  return words;
}

inline std::vector<int64_t> to_vector(torch::headeronly::IntHeaderOnlyArrayRef values) {
  return {values.begin(), values.end()};
}

// For loops along memory: any dense tensor, channels_last included.
inline MaskedTensor view_in_memory_order(const char* op, const char* list, size_t i,
                                         const Tensor& tensor, const Tensor& mask) {
  check_weights(op, list, i, tensor);
  MaskedTensor view{tensor.scalar_type(),
                    tensor.numel(),
                    check_mask(op, i, mask, tensor),
                    tensor.is_contiguous(),
                    {}};
  check(view.contiguous ||
            memory_walk(to_vector(tensor.sizes()), to_vector(tensor.strides()), view.walk),
        op, ": ", list, "[", i, "] must be dense, without gaps or overlaps (got shape ",
        ShapeOf{tensor}, " in a strided view)");
  return view;
}

// For loops along the mask: any strides.
inline MaskedTensor view_in_mask_order(const char* op, const char* list, size_t i,
                                       const Tensor& tensor, const Tensor& mask) {
  check_weights(op, list, i, tensor);
  return {tensor.scalar_type(),
          tensor.numel(),
          check_mask(op, i, mask, tensor),
          tensor.is_contiguous(),
          {to_vector(tensor.sizes()), to_vector(tensor.strides())}};
}

// Words first .. last of a tensor of a list.
struct WordRange {
  int64_t tensor, first, last;
};

// body(ranges) once per thread; together the ranges cover every word of every tensor once, spread
// over the threads as if all tensors were one. The cuts depend on the number of threads, so a body
// must give the same result however its words are cut.
template <typename Tensors, typename Body>
void parallel_word_ranges(const Tensors& tensors, const Body& body) {
  std::vector<int64_t> first{0};  // [tensors + 1]: where each tensor's words begin
  for (const MaskedTensor& tensor : tensors) {
    first.push_back(first.back() + mask_words(tensor.numel));
  }
  torch::stable::parallel_for(0, first.back(), kGrainWords, [&](int64_t begin, int64_t end) {
    std::vector<WordRange> ranges;
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (begin < stop) ranges.push_back({i, begin - first[i], stop - first[i]});
      begin = stop;
    }
    body(std::span<const WordRange>(ranges));
  });
}

}  // namespace layer_collapse
