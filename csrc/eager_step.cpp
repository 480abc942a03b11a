// The masked steps past the dispatcher: layer_collapse/ops/eager_step.py says when.
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "cpu/masked_step.h"
#include "eager.h"

namespace layer_collapse {
namespace {

// One tensor of a step as Python packs it, addresses as integers; 0 for what the step does without.
struct PackedTensor {
  int64_t param, words, numel, dtype, state[3];
  int64_t step;  // of a float32 that counts the steps taken
};

// The tensors of tensors: bytes of PackedTensor[n], contiguous in C order; grads: n addresses.
std::vector<StepTensor> unpack(PyObject* tensors, PyObject* grads) {
  const size_t count = PyList_GET_SIZE(grads);
  std::vector<StepTensor> result(count);
  const char* packed = PyBytes_AS_STRING(tensors);
  for (size_t i = 0; i < count; ++i) {
    PackedTensor from;
    std::memcpy(&from, packed + i * sizeof(from), sizeof(from));
    const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
    StepTensor& to = result[i];
    to.dtype = static_cast<ScalarType>(from.dtype);
    to.numel = from.numel;
    to.words = static_cast<uint32_t*>(pointer(from.words));
    to.contiguous = true;
    to.param = pointer(from.param);
    to.grad = PyLong_AsVoidPtr(PyList_GET_ITEM(grads, i));
    for (int k = 0; k < 3; ++k) to.state[k] = pointer(from.state[k]);
    if (auto* taken = static_cast<float*>(pointer(from.step))) to.step = *taken += 1;
  }
  return result;
}

// Whether args are bytes, a list of as many addresses as the bytes hold tensors, and `numbers`
// more.
bool check_arguments(const char* name, PyObject* const* args, Py_ssize_t count,
                     Py_ssize_t numbers) {
  if (count == 2 + numbers && PyBytes_Check(args[0]) && PyList_Check(args[1]) &&
      PyBytes_GET_SIZE(args[0]) ==
          PyList_GET_SIZE(args[1]) * static_cast<Py_ssize_t>(sizeof(PackedTensor))) {
    return true;
  }
  PyErr_Format(PyExc_TypeError, "%s: expected packed tensors, as many gradients and %zd numbers",
               name, numbers);
  return false;
}

template <typename Step>
PyObject* unlocked(const Step& step) {
  if (PyErr_Occurred()) return nullptr;
  try {
    const pybind11::gil_scoped_release unlocked;
    step();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// masked_sgd_memory(tensors, grads, lr, momentum, dampening, weight_decay, nesterov, maximize)
PyObject* masked_sgd_memory(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!check_arguments("masked_sgd_memory", args, count, 6)) return nullptr;
  const auto number = [&](int i) { return PyFloat_AsDouble(args[2 + i]); };
  const SgdOptions how{number(0),      number(1),      number(2), number(3),
                       number(4) != 0, number(5) != 0, false,     std::nullopt};
  if (PyErr_Occurred()) return nullptr;
  const std::vector<StepTensor> tensors = unpack(args[0], args[1]);
  return unlocked([&] { sgd_step(tensors, how); });
}

// masked_adamw_memory(tensors, grads, lr, beta1, beta2, eps, weight_decay, maximize); counts the
// steps up.
PyObject* masked_adamw_memory(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!check_arguments("masked_adamw_memory", args, count, 6)) return nullptr;
  const auto number = [&](int i) { return PyFloat_AsDouble(args[2 + i]); };
  const AdamWOptions how{number(0), number(1),      number(2),   number(3),
                         number(4), number(5) != 0, std::nullopt};
  if (PyErr_Occurred()) return nullptr;
  const std::vector<StepTensor> tensors = unpack(args[0], args[1]);
  return unlocked([&] { adamw_step(tensors, how); });
}

PyCFunction as_function(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef definitions[] = {
    {"masked_sgd_memory", as_function(&masked_sgd_memory), METH_FASTCALL,
     "masked_sgd_ on raw memory; see csrc/eager_step.cpp"},
    {"masked_adamw_memory", as_function(&masked_adamw_memory), METH_FASTCALL,
     "masked_adamw_ on raw memory; see csrc/eager_step.cpp"},
};

}  // namespace

void define_eager_steps(pybind11::module_& m) {
  for (PyMethodDef& definition : definitions) {
    m.attr(definition.ml_name) =
        pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, nullptr));
  }
}

}  // namespace layer_collapse
