// Whether a call counts, and which machine's code runs it.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "core/entropy.h"
#include "cpu/ledger_writes.h"
#include "cpu/rectify.h"

namespace layer_collapse {

std::mutex& ledger_mutex() {
  static std::mutex mutex;
  return mutex;
}

Machine machine() {
  static const Machine found = [] {
#if defined(__x86_64__)
    const char* wanted = std::getenv("LAYER_COLLAPSE_CPU");
    const std::string_view limit = wanted ? wanted : "";
    const bool avx2 = __builtin_cpu_supports("x86-64-v3") && limit != "baseline";
    if (__builtin_cpu_supports("x86-64-v4") && avx2 && limit != "avx2") return Machine::avx512;
    if (avx2) return Machine::avx2;
#endif
    return Machine::baseline;
  }();
  return found;
}

void rectify_dense(const RectifyCall& call) {
  int64_t* ledger = call.ledger;
  const bool counted = counts_now(ledger);
  const int64_t positions = call.outer * call.inner;
  if (counted) {
    add_to_cell(ledger + kPositions,
                call.valid ? std::count(call.valid, call.valid + positions, true) : positions);
  }
  if (positions * call.channels == 0) return;
  if (!counted && is_smooth(call.kind)) return;
  int64_t* sums = counted ? ledger + kLedgerHeader : nullptr;
  switch (machine()) {
#if defined(__x86_64__)
    case Machine::avx512:
      avx512::rectify_run(call, sums);
      break;
    case Machine::avx2:
      avx2::rectify_run(call, sums);
      break;
#endif
    default:
      baseline::rectify_run(call, sums);
  }
  if (counted && (ledger[kFlags] & kLive) != 0) {
    const std::lock_guard<std::mutex> lock(ledger_mutex());
    refresh_live(ledger, call.channels, call.kind);
  }
}

}  // namespace layer_collapse
