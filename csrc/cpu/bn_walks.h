// The walks over memory that apply a pass of bn_passes.h, for the instruction set of the machine.
//
// Not LC_CLONES: the compiler takes vectors that the baseline lacks apart before it makes clones.
// So the loops are compiled once per instruction set instead, by an include each. AVX2 and AVX-512
// fuse products and sums, as torch does: their last bits differ from those of the baseline.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/bn_passes.h"
#include "cpu/dispatch.h"
#include "cpu/machine.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LC_BN_SETS
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call that is not inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // said of GCC 12's own intrinsics
#endif

namespace layer_collapse {

// clang-format off: the order of these includes matters
}  // namespace layer_collapse
#define LC_MACHINE baseline
#include "cpu/pack.h"
#undef LC_MACHINE
#ifdef LC_BN_SETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LC_MACHINE avx2
#define LC_AVX2
#include "cpu/pack.h"
#undef LC_AVX2
#undef LC_MACHINE
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LC_MACHINE avx512
#define LC_AVX512  // the compiler does not define its own macros for this pragma
#include "cpu/pack.h"
#undef LC_AVX512
#undef LC_MACHINE
#pragma GCC pop_options
#endif
namespace layer_collapse {

namespace baseline {
#include "cpu/bn_lanes.h"
#include "cpu/bn_steps.h"
#include "cpu/bn_loops.h"
}

#ifdef LC_BN_SETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LC_AVX2
namespace avx2 {
#include "cpu/bn_lanes.h"
#include "cpu/bn_steps.h"
#include "cpu/bn_loops.h"
}
#undef LC_AVX2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LC_AVX512
namespace avx512 {
#include "cpu/bn_lanes.h"
#include "cpu/bn_steps.h"
#include "cpu/bn_loops.h"
}
#undef LC_AVX512
#pragma GCC pop_options
#endif
// clang-format on

// A group of channels; from one outer index to the next lies `stride`. Each of its rows of `inner`
// elements is one channel's. Adds to totals[0..group).
template <typename Pass>
void walk_planes(const Pass& pass, int64_t outer, int64_t stride, int64_t group, int64_t inner,
                 typename Pass::Totals* totals) {
#ifdef LC_BN_SETS
  switch (machine()) {
    case Machine::avx512:
      return avx512::walk_planes(pass, outer, stride, group, inner, totals);
    case Machine::avx2:
      return avx2::walk_planes(pass, outer, stride, group, inner, totals);
    default:
      break;
  }
#endif
  baseline::walk_planes(pass, outer, stride, group, inner, totals);
}

// Rows of `columns` elements, `stride` apart; every column has its own numbers. A vector of columns
// is taken through several rows at a time, so that what belongs to them stays in registers. Adds to
// totals[0..ceil(columns / kWidth)).
template <typename Pass>
void walk_columns(const Pass& pass, int64_t rows, int64_t stride, int64_t columns,
                  typename Pass::Totals* totals) {
#ifdef LC_BN_SETS
  switch (machine()) {
    case Machine::avx512:
      return avx512::walk_columns(pass, rows, stride, columns, totals);
    case Machine::avx2:
      return avx2::walk_columns(pass, rows, stride, columns, totals);
    default:
      break;
  }
#endif
  baseline::walk_columns(pass, rows, stride, columns, totals);
}

}  // namespace layer_collapse
