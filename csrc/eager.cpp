#include "eager.h"

#include <torch/headeronly/core/ScalarType.h>

#include <utility>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/rectify.h"

namespace layer_collapse {
namespace {

// rectify_memory(ledger, channels, kind, slope, x, y, shape, channel_dim, dtype, channels_last)
//
// ledger, x, y: addresses. x and y are of `shape` and dense: C-contiguous, or channels_last with
// the channels on dim 1. dtype: the code of a ScalarType. Returns False, with nothing done, if
// shape[channel_dim] is not `channels`.
constexpr Py_ssize_t kArguments = 10;

PyObject* rectify_memory(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kArguments || !PyTuple_Check(args[6])) {
    PyErr_SetString(PyExc_TypeError, "rectify_memory: expected 10 arguments, the 7th a shape");
    return nullptr;
  }
  const auto number = [&](int i) { return PyLong_AsLongLong(args[i]); };
  const Py_ssize_t dims = PyTuple_GET_SIZE(args[6]);
  Py_ssize_t channel_dim = number(7);
  if (channel_dim < 0) channel_dim += dims;
  RectifyCall call{};
  call.outer = call.channels = call.inner = 1;
  for (Py_ssize_t dim = 0; dim < dims; ++dim) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(args[6], dim));
    (dim < channel_dim ? call.outer : dim == channel_dim ? call.channels : call.inner) *= size;
  }
  call.kind = static_cast<Kind>(number(2));
  call.slope = PyFloat_AsDouble(args[3]);
  call.ledger = static_cast<int64_t*>(PyLong_AsVoidPtr(args[0]));
  call.x = PyLong_AsVoidPtr(args[4]);
  call.y = PyLong_AsVoidPtr(args[5]);
  call.dtype = static_cast<ScalarType>(number(8));
  if (args[9] == Py_True) call.outer *= std::exchange(call.inner, 1);
  if (PyErr_Occurred()) return nullptr;
  if (channel_dim < 0 || channel_dim >= dims || call.channels != number(1)) Py_RETURN_FALSE;
  try {
    const pybind11::gil_scoped_release unlocked;
    rectify_dense(call);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_TRUE;
}

PyMethodDef definition{
    "rectify_memory", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rectify_memory)),
    METH_FASTCALL, "The rectifier and its counts on raw memory; see csrc/eager.cpp"};

}  // namespace

void define_eager(pybind11::module_& m) {
  m.attr("rectify_memory") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, nullptr));
}

}  // namespace layer_collapse
