// What a machine's code includes and shares with the rest: read before the instruction set changes,
// so that no function of it is compiled for one machine and linked for all.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <type_traits>
#include <variant>
#include <vector>

#include "core/bitmask.h"
#include "cpu/dispatch.h"
#include "cpu/ledger_writes.h"
#include "cpu/masked_step.h"
#include "cpu/rectify.h"
