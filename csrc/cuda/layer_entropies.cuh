// What all ledgers of a model say: a block per ledger, one launch per 160 ledgers (kMaxLedgers).
#pragma once

#include "cuda/entropy.cuh"

namespace layer_collapse {

// The ledgers of a launch; a kernel parameter, so at most 4 KB.
inline constexpr int kMaxLedgers = 160;
inline constexpr int kEntropyColumns = 8;
struct LedgerTable {
  const int64_t* ledgers[kMaxLedgers];
  int64_t first[kMaxLedgers + 1];  // neuron number `first` of the results is the ledger's first
  uint8_t kinds[kMaxLedgers];
};

// One block per ledger. summary [L][8], bits [N], states [N] as of the op layer_entropies.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    layer_entropies_kernel(const __grid_constant__ LedgerTable table, double* summary, double* bits,
                           uint8_t* states) {
  const int64_t* ledger = table.ledgers[blockIdx.x];
  const int64_t first = table.first[blockIdx.x];
  const int64_t channels = table.first[blockIdx.x + 1] - first;
  const int64_t positions = ledger[kPositions];
  const Kind kind = static_cast<Kind>(table.kinds[blockIdx.x]);
  for (int64_t c = threadIdx.x; positions <= 0 && c < channels; c += blockDim.x) {
    bits[first + c] = 0.0;
    states[first + c] = 0;
  }
  const LayerEntropy layer = layer_entropy_of_block(
      ledger + kLedgerHeader, channels, positions, kind, [&](int64_t c, const Neuron& neuron) {
        bits[first + c] = neuron.bits;
        states[first + c] = static_cast<uint8_t>(neuron.state);
      });
  if (threadIdx.x == 0) {
    double* row = summary + blockIdx.x * kEntropyColumns;
    row[0] = static_cast<double>(positions);
    row[1] = layer.all;
    row[2] = layer.active;
    row[3] = static_cast<double>(layer.on);
    row[4] = static_cast<double>(layer.off);
    row[5] = static_cast<double>(layer.saturated);
    row[6] = static_cast<double>(layer.mixed);
    row[7] = static_cast<double>(layer.nonfinite);
  }
}

}  // namespace layer_collapse
