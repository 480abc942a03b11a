// layer_entropies: what all ledgers of a model say, in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/entropy.h"

namespace layer_collapse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t channels_of(const Tensor& ledger, int64_t kind, size_t i) {
  check(kind >= 0 && kind < kKinds, "layer_entropies: kinds[", i, "] must be 0 to ", kKinds - 1,
        " (got ", kind, ")");
  const int64_t rows = count_rows(static_cast<Kind>(kind));
  const int64_t cells = ledger.numel() - kLedgerHeader;
  check(ledger.scalar_type() == ScalarType::Long && ledger.is_contiguous() && cells >= 0 &&
            cells % rows == 0,
        "layer_entropies: ledgers[", i, "] must be contiguous int64 of ", kLedgerHeader, " + ",
        rows, " * C words (got ", torch::headeronly::toString(ledger.scalar_type()), " with ",
        ledger.numel(), " words)");
  return cells / rows;
}

std::tuple<Tensor, Tensor, Tensor> layer_entropies(std::vector<Tensor> ledgers,
                                                   std::vector<int64_t> kinds) {
  check(!ledgers.empty(), "layer_entropies: ledgers must hold at least one tensor (got none)");
  check(kinds.size() == ledgers.size(),
        "layer_entropies: kinds must hold one number per ledger (got ", kinds.size(), " for ",
        ledgers.size(), ")");
  std::vector<int64_t> first{0};  // [L + 1]: where the neurons of each ledger begin
  for (size_t i = 0; i < ledgers.size(); ++i) {
    first.push_back(first.back() + channels_of(ledgers[i], kinds[i], i));
  }
  const auto layers = static_cast<int64_t>(ledgers.size());
  constexpr int64_t kColumns = 8;
  using torch::stable::new_zeros;
  Tensor summary = new_zeros(ledgers[0], {layers, kColumns}, ScalarType::Double);
  Tensor bits = new_zeros(ledgers[0], {first.back()}, ScalarType::Double);
  Tensor states = new_zeros(ledgers[0], {first.back()}, ScalarType::Byte);
  auto* rows = summary.mutable_data_ptr<double>();
  auto* neuron_bits = bits.mutable_data_ptr<double>();
  auto* neuron_states = states.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < layers; ++i) {
    const auto* words = ledgers[i].const_data_ptr<int64_t>();
    const LayerEntropy layer =
        layer_entropy(words + kLedgerHeader, first[i + 1] - first[i], words[kPositions],
                      static_cast<Kind>(kinds[i]), [&](int64_t c, const Neuron& neuron) {
                        neuron_bits[first[i] + c] = neuron.bits;
                        neuron_states[first[i] + c] = static_cast<uint8_t>(neuron.state);
                      });
    const std::array<double, kColumns> row{static_cast<double>(words[kPositions]),
                                           layer.all,
                                           layer.active,
                                           static_cast<double>(layer.on),
                                           static_cast<double>(layer.off),
                                           static_cast<double>(layer.saturated),
                                           static_cast<double>(layer.mixed),
                                           static_cast<double>(layer.nonfinite)};
    std::copy(row.begin(), row.end(), rows + i * kColumns);
  }
  return {summary, bits, states};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("layer_entropies", TORCH_BOX(&layer_entropies));
}

}  // namespace layer_collapse
