// Neuron entropy and neuron states from integer counts (TMLR 2026, section 3; EGP, ICCVW 2023).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "core/rectifier.h"

namespace layer_collapse {

// What a neuron did over all counted positions. Zero belongs to both sides: a neuron in {0, +} is
// `on` and one in {0, -} `off`. `saturated` is ReLU6 above its knee.
enum class NeuronState : uint8_t { mixed = 0, on = 1, off = 2, saturated = 3, nonfinite = 4 };

struct Neuron {
  double bits;  // H = -sum p log2 p, from the summed counts
  NeuronState state;
};

LC_HOST_DEVICE inline double entropy_term(int64_t count, int64_t total) {
  if (count <= 0) return 0.0;
  const double p = static_cast<double>(count) / static_cast<double>(total);
  return -p * std::log2(p);
}

// The column of one neuron in counts [rows][channels]; positions > 0.
LC_HOST_DEVICE inline Neuron neuron_of(const int64_t* counts, int64_t channels, int64_t channel,
                                       int64_t positions, Kind kind) {
  const int64_t positive = counts[channel], negative = counts[channels + channel];
  const int64_t nan = counts[2 * channels + channel];
  const int64_t extra = count_rows(kind) > 3 ? counts[3 * channels + channel] : 0;
  if (nan > 0) return {std::numeric_limits<double>::quiet_NaN(), NeuronState::nonfinite};

  if (kind == Kind::relu6) {
    if (positive == 0) return {0.0, NeuronState::off};
    if (extra == positions) return {0.0, NeuronState::saturated};
    if (negative == 0 && extra == 0) return {0.0, NeuronState::on};
    // three pieces: below 0, between, above 6
    return {entropy_term(positions - positive, positions) +
                entropy_term(positive - extra, positions) + entropy_term(extra, positions),
            NeuronState::mixed};
  }
  const bool one_sided = positive == 0 || negative == 0;
  const double bits =
      one_sided ? 0.0
                : entropy_term(positive, positions) + entropy_term(positions - positive, positions);
  // Hardswish bends between -3 and 3: one sign alone does not make it linear.
  const bool linear = one_sided && (kind != Kind::hardswish || extra == 0);
  if (!linear) return {bits, NeuronState::mixed};
  return {bits, positive == 0 ? NeuronState::off : NeuronState::on};
}

struct LayerEntropy {
  double all = 0.0;     // mean H over all neurons, bits
  double active = 0.0;  // mean H over neurons with H > 0, bits; 0 without one
  int64_t on = 0, off = 0, saturated = 0, mixed = 0, nonfinite = 0;
};

// counts [rows][channels]. Without a position there is no entropy: NaN, and no neuron has a state.
// each(channel, neuron) sees every neuron that has one.
template <typename Each>
LayerEntropy layer_entropy(const int64_t* counts, int64_t channels, int64_t positions, Kind kind,
                           const Each& each) {
  LayerEntropy layer;
  if (positions <= 0 || channels <= 0) {
    layer.all = layer.active = std::numeric_limits<double>::quiet_NaN();
    return layer;
  }
  double sum = 0.0;
  int64_t with_entropy = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const Neuron neuron = neuron_of(counts, channels, c, positions, kind);
    each(c, neuron);
    sum += neuron.bits;
    with_entropy += neuron.bits != 0.0;  // NaN counts, and makes the sum NaN
    switch (neuron.state) {
      case NeuronState::mixed:
        ++layer.mixed;
        break;
      case NeuronState::on:
        ++layer.on;
        break;
      case NeuronState::off:
        ++layer.off;
        break;
      case NeuronState::saturated:
        ++layer.saturated;
        break;
      case NeuronState::nonfinite:
        ++layer.nonfinite;
        break;
    }
  }
  layer.all = sum / static_cast<double>(channels);
  layer.active = with_entropy == 0 ? 0.0 : sum / static_cast<double>(with_entropy);
  return layer;
}

// Writes the live words of a ledger from its counts.
inline void refresh_live(int64_t* ledger, int64_t channels, Kind kind) {
  const LayerEntropy layer = layer_entropy(ledger + kLedgerHeader, channels, ledger[kPositions],
                                           kind, [](int64_t, const Neuron&) {});
  ledger[kLiveAll] = std::bit_cast<int64_t>(layer.all);
  ledger[kLiveActive] = std::bit_cast<int64_t>(layer.active);
  ledger[kLiveMixed] = layer.mixed;
}

}  // namespace layer_collapse
