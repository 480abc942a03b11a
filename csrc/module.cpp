// The pybind11 side of layer_collapse._C: what takes no tensor. Ops on tensors are registered with
// torch's dispatcher instead (library.cpp), because only those trace under torch.compile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "core/bitmask.h"
#include "core/budget.h"
#include "core/entropy.h"

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

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Kind checked_kind(int64_t kind, const Array<int64_t>& counts) {
  if (kind < 0 || kind >= kKinds) {
    throw py::value_error("kind must be 0 to " + std::to_string(kKinds - 1) + " (got " +
                          std::to_string(kind) + ")");
  }
  const int64_t rows = count_rows(static_cast<Kind>(kind));
  if (counts.ndim() != 2 || counts.shape(0) != rows) {
    throw py::value_error("counts must be [" + std::to_string(rows) + ", channels] for kind " +
                          std::to_string(kind));
  }
  return static_cast<Kind>(kind);
}

py::dict entropy_from_counts(const Array<int64_t>& counts, int64_t positions, int64_t kind) {
  const LayerEntropy layer =
      layer_entropy(counts.data(), counts.shape(1), positions, checked_kind(kind, counts));
  py::dict result;
  result["all"] = layer.all;
  result["active"] = layer.active;
  result["on"] = layer.on;
  result["off"] = layer.off;
  result["saturated"] = layer.saturated;
  result["mixed"] = layer.mixed;
  result["nonfinite"] = layer.nonfinite;
  return result;
}

std::tuple<Array<double>, Array<uint8_t>> neurons_from_counts(const Array<int64_t>& counts,
                                                              int64_t positions, int64_t kind) {
  const Kind rectifier = checked_kind(kind, counts);
  if (positions <= 0) throw py::value_error("neurons have a state once a position was counted");
  const int64_t channels = counts.shape(1);
  Array<double> bits(channels);
  Array<uint8_t> states(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const Neuron neuron = neuron_of(counts.data(), channels, c, positions, rectifier);
    bits.mutable_at(c) = neuron.bits;
    states.mutable_at(c) = static_cast<uint8_t>(neuron.state);
  }
  return {bits, states};
}

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
  m.def("build_info", &build_info,
        "Compiler, C++ standard, instruction set in use, torch ABI target");
  m.def("entropy_from_counts", &entropy_from_counts, py::arg("counts"), py::arg("positions"),
        py::arg("kind"),
        "Layer entropy in bits (all, active) and numbers of neurons per state from counts "
        "[rows, channels] int64");
  m.def("neurons_from_counts", &neurons_from_counts, py::arg("counts"), py::arg("positions"),
        py::arg("kind"),
        "Per neuron: entropy in bits [channels] float64 and state [channels] uint8 "
        "(0 mixed, 1 on, 2 off, 3 saturated, 4 nonfinite)");
  m.def("entropy_budget", &budget, py::arg("entropy"), py::arg("importance"), py::arg("caps"),
        py::arg("total"), "Weights to prune per layer by the entropy-guided rule (core/budget.h)");
  m.def("round_to_total", &shares, py::arg("wanted"), py::arg("caps"), py::arg("total"),
        "Largest-remainder rounding to an exact total under caps");
  m.def("pack_mask", &pack, py::arg("alive"), "bool[n] -> int32[ceil(n / 32)], 1 bit per weight");
  m.def("unpack_mask", &unpack, py::arg("words"), py::arg("n"), "int32[ceil(n / 32)] -> bool[n]");
  m.def("count_alive", &alive_in, py::arg("words"), "Number of bits set in int32[...]");
}

}  // namespace layer_collapse
