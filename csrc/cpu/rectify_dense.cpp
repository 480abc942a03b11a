// Whether a call counts; the loops are those of the machine.
#include <algorithm>

#include "cpu/ledger_writes.h"
#include "cpu/machine.h"
#include "cpu/rectify.h"

namespace layer_collapse {

std::mutex& ledger_mutex() {
  static std::mutex mutex;
  return mutex;
}

namespace {

void run(const RectifyCall& call, int64_t* sums) { LC_ON_MACHINE(rectify_run(call, sums)) }

}  // namespace

void rectify_dense(const RectifyCall& call) {
  int64_t* ledger = call.ledger;
  const bool counted = counts_now(ledger);
  const int64_t positions = call.outer * call.inner;
  if (counted) {
    add_positions(ledger,
                  call.valid ? std::count(call.valid, call.valid + positions, true) : positions);
  }
  if (positions * call.channels == 0) return;
  if (!counted && is_smooth(call.kind)) return;
  int64_t* sums = counted ? ledger + kLedgerHeader : nullptr;
  run(call, sums);
  if (counted) refresh_if_live(ledger, call.channels, call.kind);
}

}  // namespace layer_collapse
