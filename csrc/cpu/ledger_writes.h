// What every CPU op that writes a ledger does alike: whether it counts at all, and how it adds.
#pragma once

#include <atomic>
#include <cstdint>

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

// Several threads add integers in any order and the sum is the same.
inline void add_to_cell(int64_t* cell, int64_t value) {
  if (value != 0) std::atomic_ref<int64_t>(*cell).fetch_add(value, std::memory_order_relaxed);
}

}  // namespace layer_collapse
