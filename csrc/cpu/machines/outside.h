// What a machine's code includes and shares with the rest: read before the instruction set changes,
// so that no function of it is compiled for one machine and linked for all.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/rectify.h"
