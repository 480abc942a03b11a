#include "cuda/layer_entropies.h"

#include <algorithm>

#include "cuda/layer_entropies.cuh"

namespace layer_collapse {

int launch_layer_entropies(const std::vector<LedgerView>& ledgers, double* summary, double* bits,
                           uint8_t* states, int threads, void* stream) {
  for (size_t begin = 0; begin < ledgers.size(); begin += kMaxLedgers) {
    const size_t count = std::min<size_t>(kMaxLedgers, ledgers.size() - begin);
    LedgerTable table{};
    for (size_t i = 0; i < count; ++i) {
      const LedgerView& ledger = ledgers[begin + i];
      table.ledgers[i] = ledger.words;
      table.first[i] = ledger.first;
      table.first[i + 1] = ledger.first + ledger.channels;
      table.kinds[i] = static_cast<uint8_t>(ledger.kind);
    }
    const int error = launch(layer_entropies_kernel, static_cast<int64_t>(count), threads, stream,
                             table, summary + begin * kEntropyColumns, bits, states);
    if (error) return error;
  }
  return 0;
}

}  // namespace layer_collapse
