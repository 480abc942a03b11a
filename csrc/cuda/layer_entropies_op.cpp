// layer_entropies on CUDA: check, allocate, launch. One launch for a model of up to 160 rectifiers,
// as many as fit into 4 KB of kernel parameters; one more for every further 160.
#include "cuda/layer_entropies.h"

#include "cuda/on_device.h"

namespace layer_collapse {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_entropies(std::vector<Tensor> ledgers,
                                                   std::vector<int64_t> kinds) {
  constexpr const char* kOp = "layer_entropies";
  check(!ledgers.empty(), kOp, ": ledgers must hold at least one tensor (got none)");
  check(kinds.size() == ledgers.size(), kOp, ": kinds must hold one number per ledger (got ",
        kinds.size(), " for ", ledgers.size(), ")");
  std::vector<LedgerView> views;
  int64_t neurons = 0;
  for (size_t i = 0; i < ledgers.size(); ++i) {
    check(kinds[i] >= 0 && kinds[i] < kKinds, kOp, ": kinds[", i, "] must be 0 to ", kKinds - 1,
          " (got ", kinds[i], ")");
    const int64_t rows = count_rows(static_cast<Kind>(kinds[i]));
    const int64_t cells = ledgers[i].numel() - kLedgerHeader;
    check(ledgers[i].scalar_type() == ScalarType::Long && ledgers[i].is_contiguous() &&
              cells >= 0 && cells % rows == 0,
          kOp, ": ledgers[", i, "] must be contiguous int64 of ", kLedgerHeader, " + ", rows,
          " * C words (got ", torch::headeronly::toString(ledgers[i].scalar_type()), " with ",
          ledgers[i].numel(), " words)");
    check_device(kOp, "ledgers", i, ledgers[i], ledgers[0]);
    views.push_back(
        {ledgers[i].const_data_ptr<int64_t>(), neurons, cells / rows, static_cast<Kind>(kinds[i])});
    neurons += cells / rows;
  }
  const OnDevice device(ledgers[0]);
  using torch::stable::new_empty;
  const auto layers = static_cast<int64_t>(ledgers.size());
  Tensor summary = new_empty(ledgers[0], {layers, 8}, ScalarType::Double);
  Tensor bits = new_empty(ledgers[0], {neurons}, ScalarType::Double);
  Tensor states = new_empty(ledgers[0], {neurons}, ScalarType::Byte);
  check_launch(kOp, launch_layer_entropies(
                        views, summary.mutable_data_ptr<double>(), bits.mutable_data_ptr<double>(),
                        states.mutable_data_ptr<uint8_t>(), kOpThreads, device.stream()));
  return {summary, bits, states};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LC_CUDA_LIBRARY, LC_CUDA_KEY, m) {
  m.impl("layer_entropies", TORCH_BOX(&layer_entropies));
}

}  // namespace layer_collapse
