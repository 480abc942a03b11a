// Starts layer_entropies on a GPU. No torch in here: raw pointers, sizes, a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "core/rectifier.h"

namespace layer_collapse {

// One ledger on the device and its neurons' place among the results' N.
struct LedgerView {
  const int64_t* words;
  int64_t first, channels;
  Kind kind;
};

// summary [L][8], bits [N], states [N] as of the op layer_entropies, each written whole. One kernel
// for up to 160 ledgers. Returns a cudaError_t, 0 for success. threads: a power of two from 32 to
// 256.
int launch_layer_entropies(const std::vector<LedgerView>& ledgers, double* summary, double* bits,
                           uint8_t* states, int threads, void* stream);

}  // namespace layer_collapse
