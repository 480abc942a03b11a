// A way past the dispatcher for eager calls on plain CPU tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace layer_collapse {

// Adds rectify_memory to the module: a builtin function, because pybind11's own call costs as much
// as torch.relu does on a small tensor.
void define_eager(pybind11::module_& m);

// Adds masked_sgd_memory and masked_adamw_memory.
void define_eager_steps(pybind11::module_& m);

}  // namespace layer_collapse
