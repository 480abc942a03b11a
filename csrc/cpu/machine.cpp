#include "cpu/machine.h"

#include <cstdlib>
#include <string_view>

namespace layer_collapse {

Machine machine() {
  static const Machine found = [] {
#if defined(__x86_64__)
    const char* wanted = std::getenv("LAYER_COLLAPSE_CPU");
    const std::string_view limit = wanted ? wanted : "";
    const bool avx2 = __builtin_cpu_supports("x86-64-v3") && limit != "baseline";
    if (__builtin_cpu_supports("x86-64-v4") && avx2 && limit != "avx2") return Machine::avx512;
    if (avx2) return Machine::avx2;
#endif
    return Machine::baseline;
  }();
  return found;
}

}  // namespace layer_collapse
