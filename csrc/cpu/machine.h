// Which instructions the CPU loops use. Each loop is compiled once per machine, in a namespace of
// that name (machines/*.cpp), and chosen at run time: the binary also runs on old machines.
#pragma once

namespace layer_collapse {

// The machine's best, or fewer if LAYER_COLLAPSE_CPU is "avx2" or "baseline" (read once; for tests
// and for comparing).
enum class Machine { baseline, avx2, avx512 };
Machine machine();

// The call in the namespace of the machine that this is.
#if defined(__x86_64__)
#define LC_ON_MACHINE(call)  \
  switch (machine()) {       \
    case Machine::avx512:    \
      return avx512::call;   \
    case Machine::avx2:      \
      return avx2::call;     \
    default:                 \
      return baseline::call; \
  }
#else
#define LC_ON_MACHINE(call) return baseline::call
#endif

}  // namespace layer_collapse
