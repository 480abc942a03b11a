// The entropy of a layer by one block, from a ledger that other blocks have filled. Double sums run
// in an order that depends on the block size alone, so a ledger always gives the same bits.
#pragma once

#include "core/entropy.h"
#include "cuda/reduce.cuh"

namespace layer_collapse {

// layer_entropy (core/entropy.h) by all threads of a block; the result is thread 0's.
// each(channel, neuron) runs in the thread that has the channel.
template <typename Each>
__device__ __forceinline__ LayerEntropy layer_entropy_of_block(const int64_t* counts,  // [rows][C]
                                                               int64_t channels, int64_t positions,
                                                               Kind kind, const Each& each) {
  const int64_t rows = count_rows(kind);
  double sum[1] = {0.0};
  // neurons by state, then those with entropy
  int32_t found[6] = {};
  LC_NO_UNROLL
  for (int64_t c = threadIdx.x; positions > 0 && c < channels; c += blockDim.x) {
    // past the first-level cache, which may hold what was there before other blocks wrote
    int64_t column[4];
    LC_UNROLL
    for (int row = 0; row < 4; ++row) {
      column[row] = row < rows ? __ldcg(counts + row * channels + c) : 0;
    }
    const Neuron neuron = neuron_of(column, 1, 0, positions, kind);
    each(c, neuron);
    sum[0] += neuron.bits;
    LC_UNROLL
    for (int state = 0; state < 5; ++state) found[state] += static_cast<int>(neuron.state) == state;
    found[5] += neuron.bits != 0.0;  // NaN counts, and makes the sum NaN
  }
  block_sums(sum);
  block_sums(found);
  LayerEntropy layer;
  if (positions <= 0 || channels <= 0) {
    layer.all = layer.active = std::numeric_limits<double>::quiet_NaN();
    return layer;
  }
  layer.all = sum[0] / static_cast<double>(channels);
  layer.active = found[5] == 0 ? 0.0 : sum[0] / found[5];
  layer.mixed = found[static_cast<int>(NeuronState::mixed)];
  layer.on = found[static_cast<int>(NeuronState::on)];
  layer.off = found[static_cast<int>(NeuronState::off)];
  layer.saturated = found[static_cast<int>(NeuronState::saturated)];
  layer.nonfinite = found[static_cast<int>(NeuronState::nonfinite)];
  return layer;
}

// Called by every block after it has added to the ledger: the last one writes the live words.
__device__ __forceinline__ void refresh_live_in_last_block(int64_t* ledger, int64_t channels,
                                                           Kind kind) {
  if (!is_last_block(ledger + kTicket)) return;
  const LayerEntropy layer =
      layer_entropy_of_block(ledger + kLedgerHeader, channels, __ldcg(ledger + kPositions), kind,
                             [](int64_t, const Neuron&) {});
  if (threadIdx.x == 0) {
    ledger[kLiveAll] = bits_as<int64_t>(layer.all);
    ledger[kLiveActive] = bits_as<int64_t>(layer.active);
    ledger[kLiveMixed] = layer.mixed;
  }
}

}  // namespace layer_collapse
