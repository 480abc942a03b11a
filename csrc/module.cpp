// The pybind11 side of layer_collapse._C: what takes no tensor. Ops on tensors are registered with
// torch's dispatcher instead (library.cpp), because only those trace under torch.compile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace layer_collapse {
namespace {

// Instruction set that the dispatched loops (cpu/dispatch.h) run with on this machine.
const char* cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "baseline";
}

py::dict build_info() {
  py::dict info;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["cpu_capability"] = cpu_capability();
  info["torch_target"] = "2.10";
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side core of layer_collapse; importing it also registers torch.ops.layer_collapse";
  m.def("build_info", &build_info, "Compiler, C++ standard, instruction set in use, torch ABI target");
}

}  // namespace layer_collapse
