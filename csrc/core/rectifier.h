// What every part of the library agrees on about a rectifier and its ledger. No torch in here.
#pragma once

#include <cstdint>

namespace layer_collapse {

enum class Kind : int64_t {
  relu = 0,
  relu6 = 1,
  leaky_relu = 2,
  prelu = 3,
  gelu = 4,
  gelu_tanh = 5,
  silu = 6,
  hardswish = 7,
};
inline constexpr int64_t kKinds = 8;

// A ledger is one int64 buffer per rectifier: [enabled, positions, counts[rows][C]]. It is what the
// op writes, so a flag in its first word pauses counting without a change of the traced program.
// Rows: z > 0, z < 0, NaN; ReLU6 also z > 6, Hardswish also -3 < z < 3.
inline constexpr int64_t kLedgerHeader = 2;
inline constexpr int64_t kEnabled = 0;
inline constexpr int64_t kPositions = 1;

constexpr int64_t count_rows(Kind kind) {
  return kind == Kind::relu6 || kind == Kind::hardswish ? 4 : 3;
}

}  // namespace layer_collapse
