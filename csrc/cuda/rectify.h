// Starts the fused rectifier on a GPU. No torch in here: raw pointers, sizes, a stream.
#pragma once

#include <cstdint>

#include "core/rectifier.h"

namespace layer_collapse {

enum class Dtype { float32, float64, bfloat16, float16 };

struct RectifyLaunch {
  const void* x;
  void* y;               // may be x; not written by GELU and SiLU, whose output torch computes
  int64_t* ledger;       // nullptr: do not count
  const uint8_t* valid;  // [outer * inner] in storage order, or nullptr: every position counts
  const void* slopes;    // [C] of x's dtype, or nullptr: `slope` for all channels
  double slope;
  int64_t outer, channels, inner;  // x and y in the order of their storage, without gaps
  Dtype dtype;
  Kind kind;
  int threads;  // of a block, a power of two from 32 to 256
};

// y = rectifier(x); counts unless the ledger's flags forbid it; the live words if they ask for it.
// One kernel; no element: no kernel, or one that counts positions if there are any.
// Returns a cudaError_t, 0 for success.
int launch_rectify(const RectifyLaunch& call, void* stream);

}  // namespace layer_collapse
