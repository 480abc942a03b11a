// The rectifier on raw memory: what the ops and the way past them (eager.cpp) share.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "core/rectifier.h"

namespace layer_collapse {

struct RectifyCall {
  Kind kind;  // of GELU and SiLU only the signs are counted
  torch::headeronly::ScalarType dtype;
  int64_t outer, channels, inner;  // x in the order of its storage, without gaps
  const void* x;
  void* y;              // may be x; not written for GELU and SiLU
  const bool* valid;    // [outer * inner], null: every position counts
  double slope;         // of LeakyReLU
  const void* slopes;   // [slope_count] of x's dtype for PReLU, else null
  int64_t slope_count;  // 1 or channels
  int64_t* ledger;      // of this kind and number of channels
};

// Activates x into y and adds the signs of x to the ledger. Nothing is counted while the ledger's
// flag is off, nor when autograd replays a forward under activation checkpointing.
void rectify_dense(const RectifyCall& call);

// rectify_run.h, once per machine. sums: the counts of the ledger, null when nothing is counted.
namespace avx512 {
void rectify_run(const RectifyCall& call, int64_t* sums);
}
namespace avx2 {
void rectify_run(const RectifyCall& call, int64_t* sums);
}
namespace baseline {
void rectify_run(const RectifyCall& call, int64_t* sums);
}

}  // namespace layer_collapse
