// What a masked step asks of its arguments, on any device, checked before anything is written.
#pragma once

#include <optional>
#include <vector>

#include "cpu/masked_tensors.h"

namespace layer_collapse {

using Tensors = std::vector<Tensor>;

inline bool same_shape(const Tensor& left, const Tensor& right) {
  const auto sizes = left.sizes();
  const auto other = right.sizes();
  return std::equal(sizes.begin(), sizes.end(), other.begin(), other.end());
}

// Whether element i of both lies at the same place in memory, for every i.
inline bool same_layout(const Tensor& left, const Tensor& right) {
  const auto sizes = left.sizes();
  const auto strides = left.strides();
  const auto other = right.strides();
  if (!same_shape(left, right)) return false;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] > 1 && strides[dim] != other[dim]) return false;
  }
  return true;
}

// Momentum and averages: as many as parameters, and each like its own.
inline void check_state(const char* op, const char* list, const Tensors& state,
                        const Tensors& params) {
  check_length(op, list, state.size(), params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check(state[i].scalar_type() == params[i].scalar_type() && same_layout(state[i], params[i]), op,
          ": ", list, "[", i, "] must have the shape, strides and dtype of its parameter (got ",
          ShapeOf{state[i]}, " ", torch::headeronly::toString(state[i].scalar_type()), " for ",
          ShapeOf{params[i]}, " ", torch::headeronly::toString(params[i].scalar_type()), ")");
  }
}

// Gradients in the memory order of their parameters; autograd may deliver another one.
inline Tensors lay_out_grads(const char* op, const Tensors& grads, const Tensors& params) {
  check_length(op, "grads", grads.size(), params.size());
  Tensors result;
  result.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check(same_shape(grads[i], params[i]) && grads[i].scalar_type() == params[i].scalar_type(), op,
          ": grads[", i, "] must have the shape and dtype of its parameter (got ",
          ShapeOf{grads[i]}, " ", torch::headeronly::toString(grads[i].scalar_type()), " for ",
          ShapeOf{params[i]}, " ", torch::headeronly::toString(params[i].scalar_type()), ")");
    if (same_layout(grads[i], params[i])) {
      result.push_back(grads[i]);
    } else {
      Tensor copy = torch::stable::empty_like(params[i]);
      torch::stable::copy_(copy, grads[i]);
      result.push_back(copy);
    }
  }
  return result;
}

// The one number in a float32 or float64 tensor.
inline double read_scalar(const char* op, const char* name, const Tensor& value) {
  check(value.numel() == 1, op, ": ", name, " must hold one number (got ", value.numel(), ")");
  if (value.scalar_type() == ScalarType::Float) return *value.const_data_ptr<float>();
  if (value.scalar_type() == ScalarType::Double) return *value.const_data_ptr<double>();
  refuse(op, ": ", name, " must be float32 or float64 (got ",
         torch::headeronly::toString(value.scalar_type()), ")");
}

inline std::optional<double> read_optional(const char* op, const char* name,
                                           const std::optional<Tensor>& value) {
  if (!value) return std::nullopt;
  return read_scalar(op, name, *value);
}

}  // namespace layer_collapse
