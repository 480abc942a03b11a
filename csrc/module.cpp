// The pybind11 side of layer_collapse._C: what takes no tensor. Ops on tensors are registered with
// torch's dispatcher instead (library.cpp), because only those trace under torch.compile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "checks.h"
#include "core/bitmask.h"
#include "core/budget.h"
#include "cpu/machine.h"
#include "eager.h"

namespace py = pybind11;

namespace layer_collapse {
namespace {

const char* cpu_capability() {
  switch (machine()) {
    case Machine::avx512:
      return "AVX-512";
    case Machine::avx2:
      return "AVX2";
    default:
      return "baseline";
  }
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

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

std::vector<int64_t> budget(const std::vector<double>& entropy,
                            const std::vector<double>& importance, const std::vector<int64_t>& caps,
                            int64_t total) {
  if (entropy.size() != caps.size() || importance.size() != caps.size()) {
    throw py::value_error("entropy, importance and caps must have one entry per layer");
  }
  for (size_t i = 0; i < caps.size(); ++i) {
    if (!std::isfinite(entropy[i]) || !std::isfinite(importance[i]) || importance[i] < 0) {
      throw py::value_error("entropy and mean|w| of layer " + std::to_string(i) +
                            " must be finite; the network holds NaN or infinite values");
    }
  }
  return entropy_budget(entropy, importance, caps, total);
}

std::vector<int64_t> shares(const std::vector<double>& wanted, const std::vector<int64_t>& caps,
                            int64_t total) {
  if (wanted.size() != caps.size())
    throw py::value_error("wanted and caps must have equal lengths");
  return round_to_total(wanted, caps, total);
}

// alive: bool[n] -> int32[ceil(n / 32)]
py::array_t<int32_t> pack(const py::array& alive) {
  check(alive.dtype().kind() == 'b' && alive.ndim() == 1,
        "pack_mask: alive must be a one-dimensional bool array (got ", alive.ndim(),
        " dimensions of dtype ", py::str(alive.dtype()).cast<std::string>(), ")");
  const auto bits = py::array_t<bool, py::array::c_style>::ensure(alive);
  py::array_t<int32_t> words(mask_words(bits.size()));
  pack_mask(bits.data(), bits.size(), reinterpret_cast<uint32_t*>(words.mutable_data()));
  return words;
}

const uint32_t* check_words(const char* function, const py::array& words) {
  check(words.dtype().is(py::dtype::of<int32_t>()) && words.ndim() == 1 &&
            (words.flags() & py::array::c_style) != 0,
        function, ": words must be a contiguous one-dimensional int32 array (got ", words.ndim(),
        " dimensions of dtype ", py::str(words.dtype()).cast<std::string>(), ")");
  return static_cast<const uint32_t*>(words.data());
}

// words: int32[ceil(n / 32)] -> bool[n]
py::array_t<bool> unpack(const py::array& words, int64_t numel) {
  const uint32_t* bits = check_words("unpack_mask", words);
  check(numel >= 0 && words.size() == mask_words(numel),
        "unpack_mask: words must number ceil(n / 32) for n = ", numel, " weights (got ",
        words.size(), ")");
  check(!has_stray_bits(bits, numel), "unpack_mask: words must have no bit set beyond the ", numel,
        " weights (got stray bits in the last word)");
  py::array_t<bool> alive(numel);
  unpack_mask(bits, numel, alive.mutable_data());
  return alive;
}

int64_t alive_in(const py::array& words) {
  return count_alive(check_words("count_alive", words), words.size());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Host-side core of layer_collapse; importing it also registers torch.ops.layer_collapse";
  define_eager(m);
  define_eager_steps(m);
  m.def("build_info", &build_info,
        "Compiler, C++ standard, instruction set in use, torch ABI target");
  m.def("entropy_budget", &budget, py::arg("entropy"), py::arg("importance"), py::arg("caps"),
        py::arg("total"), "Weights to prune per layer by the entropy-guided rule (core/budget.h)");
  m.def("round_to_total", &shares, py::arg("wanted"), py::arg("caps"), py::arg("total"),
        "Largest-remainder rounding to an exact total under caps");
  m.def("pack_mask", &pack, py::arg("alive"), "bool[n] -> int32[ceil(n / 32)], 1 bit per weight");
  m.def("unpack_mask", &unpack, py::arg("words"), py::arg("n"), "int32[ceil(n / 32)] -> bool[n]");
  m.def("count_alive", &alive_in, py::arg("words"), "Number of bits set in int32[...]");
}

}  // namespace layer_collapse
