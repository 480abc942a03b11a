// What every CPU op that writes a ledger does alike: whether it counts at all, and that it adds
// while nobody else does.
#pragma once

#include <cstdint>
#include <mutex>

#include "core/entropy.h"
#include "core/rectifier.h"

// Exported by libtorch_cpu but not part of the stable ABI: -1 outside of a backward pass.
// tests/test_abi.py calls it on every release that is supported.
namespace torch::autograd {
int get_current_graph_task_id();
}

namespace layer_collapse {

// Not while the flag is off, nor when autograd replays a forward under activation checkpointing
// (the first run has counted it).
inline bool counts_now(const int64_t* ledger) {
  return (ledger[kFlags] & kCount) != 0 && torch::autograd::get_current_graph_task_id() == -1;
}

// Held while a ledger is written: one thread adds at a time, whichever op it is in, also when two
// run the same model.
std::mutex& ledger_mutex();

// Before any sign of these positions is added: so a ledger never holds more signs than positions.
inline void add_positions(int64_t* ledger, int64_t positions) {
  const std::lock_guard<std::mutex> lock(ledger_mutex());
  ledger[kPositions] += positions;
}

// The last write of a forward that counts.
inline void refresh_if_live(int64_t* ledger, int64_t channels, Kind kind) {
  if ((ledger[kFlags] & kLive) == 0) return;
  const std::lock_guard<std::mutex> lock(ledger_mutex());
  refresh_live(ledger, channels, kind);
}

}  // namespace layer_collapse
