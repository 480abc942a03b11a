// The loops with the instructions of x86-64-v4; chosen at run time.
#if defined(__x86_64__)
#include "cpu/machines/outside.h"

#define LC_MACHINE avx512
#define LC_AVX512  // the pragma defines no macro in C++
#pragma GCC target("arch=x86-64-v4")
#include "cpu/masked_run.h"
#include "cpu/rectify_run.h"
#endif
