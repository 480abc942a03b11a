// Whether a call counts, and which machine's code runs it.
#include <algorithm>
#include <mutex>

#include "core/entropy.h"
#include "cpu/rectify.h"

// Exported by libtorch_cpu but not part of the stable ABI: -1 outside of a backward pass.
// tests/test_abi.py calls it on every release that is supported.
namespace torch::autograd {
int get_current_graph_task_id();
}

namespace layer_collapse {

std::mutex& ledger_mutex() {
  static std::mutex mutex;
  return mutex;
}

void rectify_dense(const RectifyCall& call) {
  int64_t* ledger = call.ledger;
  const bool counted =
      (ledger[kFlags] & kCount) != 0 && torch::autograd::get_current_graph_task_id() == -1;
  const int64_t positions = call.outer * call.inner;
  if (counted) {
    const std::lock_guard<std::mutex> lock(ledger_mutex());
    ledger[kPositions] +=
        call.valid ? std::count(call.valid, call.valid + positions, true) : positions;
  }
  if (positions * call.channels == 0) return;
  if (!counted && is_smooth(call.kind)) return;
  int64_t* sums = counted ? ledger + kLedgerHeader : nullptr;
#if defined(__x86_64__)
  static const bool has_avx512 = __builtin_cpu_supports("x86-64-v4");
  static const bool has_avx2 = __builtin_cpu_supports("x86-64-v3");
  if (has_avx512) {
    avx512::rectify_run(call, sums);
  } else if (has_avx2) {
    avx2::rectify_run(call, sums);
  } else {
    baseline::rectify_run(call, sums);
  }
#else
  baseline::rectify_run(call, sums);
#endif
  if (counted && (ledger[kFlags] & kLive) != 0) {
    const std::lock_guard<std::mutex> lock(ledger_mutex());
    refresh_live(ledger, call.channels, call.kind);
  }
}

}  // namespace layer_collapse
