// LC_CLONES: the function is compiled for AVX-512, AVX2 and the baseline, and the loader picks one,
// so that a portable wheel still uses the machine. What it calls must inline into it (LC_INLINE).
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LC_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LC_CLONES
#endif

#define LC_INLINE inline __attribute__((always_inline))
