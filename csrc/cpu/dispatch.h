// How the CPU loops reach wide registers in a binary that also runs on old machines, and how they
// get from a run-time dtype to a C++ type.
//
// LC_CLONES before a non-template function compiles it once per instruction set; the loader picks
// the best one that the machine has. Template bodies are LC_INLINE and are called from such a
// function, because a clone only covers what is inlined into it. Every clone returns the same bits:
// the build forbids contraction (-ffp-contract=off) and all operations used round correctly.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

#include "checks.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LC_CLONES
#endif

#define LC_INLINE inline __attribute__((always_inline))

namespace layer_collapse {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Halves are computed in float and rounded once, when they are stored.
template <typename Weight>
using Compute = std::conditional_t<std::is_same_v<Weight, double>, double, float>;

template <int kBytes>
using IntegerOf = std::conditional_t<
    kBytes == 1, int8_t,
    std::conditional_t<kBytes == 2, int16_t, std::conditional_t<kBytes == 4, int32_t, int64_t>>>;

inline bool is_weight_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// visit(std::type_identity<Weight>{}) for the C++ type of a dtype that is_weight_dtype() accepts.
template <typename Visit>
decltype(auto) visit_weight_type(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Float:
      return visit(std::type_identity<float>{});
    case ScalarType::Double:
      return visit(std::type_identity<double>{});
    case ScalarType::BFloat16:
      return visit(std::type_identity<BFloat16>{});
    case ScalarType::Half:
      return visit(std::type_identity<Half>{});
    default:
      refuse("visit_weight_type: dtype must be float32, float64, bfloat16 or float16 (got ",
             torch::headeronly::toString(dtype), ")");
  }
}

}  // namespace layer_collapse
