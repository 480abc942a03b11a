// What every part of the library agrees on about a rectifier and its ledger. No torch in here.
#pragma once

#include <cstdint>

#include "core/host_device.h"

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

// A ledger is one int64 buffer per rectifier: a header, then counts[rows][C]. It is what the op
// writes, so flags in its first word pause counting without a change of the traced program.
// Rows: z > 0, z < 0, NaN; ReLU6 also z > 6, Hardswish also -3 < z < 3.
//
// The live words are what the last forward made of all counts so far, if kLive is set: the layer's
// mean H over all and over active neurons (bits of a double each) and its number of mixed neurons.
inline constexpr int64_t kFlags = 0;
inline constexpr int64_t kPositions = 1;
inline constexpr int64_t kLiveAll = 2, kLiveActive = 3, kLiveMixed = 4;
inline constexpr int64_t kTicket = 5;  // blocks of a CUDA launch that are done; 0 between launches
inline constexpr int64_t kLedgerHeader = 6;

// Bits of the flags word.
inline constexpr int64_t kCount = 1;
inline constexpr int64_t kLive = 2;  // only has an effect along with kCount

LC_HOST_DEVICE constexpr int64_t count_rows(Kind kind) {
  return kind == Kind::relu6 || kind == Kind::hardswish ? 4 : 3;
}

// Torch computes these; only the signs are counted here.
constexpr bool is_smooth(Kind kind) {
  return kind == Kind::gelu || kind == Kind::gelu_tanh || kind == Kind::silu;
}

}  // namespace layer_collapse
