// layer_collapse._C_cuda: importing it registers the CUDA implementations of the ops.
#include <Python.h>

namespace {
PyModuleDef definition{
    PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
}

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
