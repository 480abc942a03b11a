// The threads around the loops of rectify_loops.h. Every thread counts into memory of its own and
// adds that to the ledger at its end: sums of integers, the same in any order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "cpu/ledger_writes.h"
#include "cpu/rectify.h"
#include "cpu/rectify_loops.h"

namespace layer_collapse {
namespace LC_MACHINE {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay
constexpr int64_t kGrainRows = 32;   // rows below which it does not pay for sums of its own
constexpr int64_t kShortRow = 64;    // elements of a plane below which its columns are counted
constexpr int64_t kManyRows = 64;    // rows that are worth the sums of their columns
constexpr int64_t kFewRows = 8;      // rows below which counting columns does not pay
// Columns out of place, by how many there are: few make tiles that go down all rows; more are read
// in whole rows, as the hardware fetches them, by block or, if many, by tile; of the most the
// counters would not stay in the nearest cache, so tiles go down all rows again. Without AVX-512
// more columns are read in tiles of a few rows, as many as the hardware fetches ahead at once.
#if defined(LC_AVX512)
constexpr int64_t kTiledRow = 256, kBlockRow = 1 << 10, kCachedRow = 1 << 13, kTileRows = 1;
#else
constexpr int64_t kTiledRow = 256, kBlockRow = kTiledRow, kTileRows = 8;
constexpr int64_t kCachedRow = std::numeric_limits<int64_t>::max();
#endif
constexpr int64_t kWidestRow = 1 << 12;  // short rows are put side by side up to these columns ...
// ... to fill a tile, or as many as make the end of a row cheap.
template <typename Rectifier, typename T>
constexpr int64_t kSideBySide = kBySign<Rectifier, T> ? 4 * kBlock : 1 << 10;

// Adds counts [kRows][stride], of channels over and over for `width`, to sums [kRows][C], those of
// a ledger.
template <typename Rectifier, typename Counter>
void merge(const Counter* counts, int64_t stride, int64_t width, bool any_nan, int64_t channels,
           int64_t* sums) {
  const std::lock_guard<std::mutex> lock(ledger_mutex());
  for (int row = 0; row < count_rows(Rectifier::kind); ++row, counts += stride, sums += channels) {
    if (row == kNan && !any_nan) continue;
    for (int64_t first = 0; first < width; first += channels) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += counts[first + c];
    }
  }
}

// Whether columns are counted in tiles, which order their counters in their own way.
template <typename Rectifier, typename T>
bool in_tiles(const Span<T>& span) {
  if (!kBySign<Rectifier, T> || span.valid) return false;
  return span.x == span.y || span.width <= kTiledRow || span.width > kBlockRow;
}

// Counts `rows` <= kByteRows rows into bytes, and what does not count into idle, which is empty if
// all do. Returns whether there may have been a NaN.
template <typename Rectifier, typename T>
bool count_rows_of(const Span<T>& span, int64_t from, int64_t rows, uint8_t* bytes, uint8_t* idle) {
  const int64_t width = span.width;
  const T* x = span.x + from * width;
  T* y = span.y + from * width;
  if constexpr (kBySign<Rectifier, T>) {
    if (in_tiles<Rectifier>(span)) {
      if (x == y) return rectify_tiles<true, Rectifier>(x, y, width, rows, bytes);
      const int64_t step = width <= kTiledRow || width > kCachedRow ? rows : kTileRows;
      bool any_nan = false;
      for (int64_t row = 0; row < rows; row += step) {
        const int64_t at = row * width, some = std::min(step, rows - row);
        any_nan |= rectify_tiles<false, Rectifier>(x + at, y + at, width, some, bytes);
      }
      return any_nan;
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const bool counted = !span.valid || span.valid[from + row];
    rectify_columns<Rectifier>(x + row * width, y + row * width, width, span.slopes,
                               counted ? bytes : idle);
  }
  return true;
}

// sums: the counts of the ledger, or null when nothing is counted.
template <typename Rectifier, typename T>
void run_columns(const Span<T>& span, int64_t rows, const RectifyCall& call, int64_t* sums) {
  constexpr int kRows = count_rows(Rectifier::kind);
  constexpr int64_t kBatch = 1 << 30;  // rows that 32 bits can count
  const int64_t width = span.width, blocks = blocks_of(width), stride = blocks * kBlock;
  const int64_t channels = call.channels, inner = call.inner;
  const int64_t grain = std::max(kGrainRows, kGrain / width);
  const bool tiled = in_tiles<Rectifier>(span);
  const auto order = tiled ? order_columns<kBySign<Rectifier, T>, T> : order_columns<false, T>;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
    std::vector<uint8_t> bytes(kRows * stride + kBlock), idle(span.valid ? kRows * stride : 0);
    std::vector<int64_t> of_channels(inner > 1 ? kRows * channels : 0);
    const std::unique_ptr<int32_t[]> of_columns(new int32_t[inner > 1 ? 0 : kRows * stride]);
    bool any_nan = false, first = true;
    int64_t since = 0;  // the last merge
    for (int64_t row = from; row < to;) {
      const int64_t batch = std::min(kByteRows, to - row);
      any_nan |= count_rows_of<Rectifier>(span, row, batch, bytes.data(), idle.data());
      row += batch;
      since += batch;
      if (!sums) continue;
      for (int i = 0; i < kRows; ++i) {
        if (i == kNan && !any_nan && first && row == to) continue;
        uint8_t* counted = bytes.data() + i * stride;
        order(counted, blocks);
        if (inner > 1) {
          add_planes(counted, width, inner, channels, of_channels.data() + i * channels);
        } else {
          add_columns(counted, width, of_columns.get() + i * stride, first);
        }
      }
      if (row < to) std::fill(bytes.begin(), bytes.end(), uint8_t{0});
      first = inner == 1 && since >= kBatch;
      if (!first) continue;
      merge<Rectifier>(of_columns.get(), stride, width, any_nan, channels, sums);
      since = 0;
    }
    if (!sums) return;
    if (inner > 1) {
      merge<Rectifier>(of_channels.data(), channels, channels, any_nan, channels, sums);
    } else if (since > 0) {
      merge<Rectifier>(of_columns.get(), stride, width, any_nan, channels, sums);
    }
  });
}

template <typename Rectifier, typename T>
void run_planes(const Span<T>& span, int64_t rows, int64_t* sums) {
  constexpr int64_t kRows = count_rows(Rectifier::kind);
  const int64_t segments = (span.width + kLongestRow - 1) / kLongestRow;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(span.width, kLongestRow));
  torch::stable::parallel_for(0, rows * segments, grain, [&](int64_t from, int64_t to) {
    std::vector<int64_t> counts(kRows * span.channels);
    rectify_planes<Rectifier>(span, from, to, counts.data());
    if (sums) {
      merge<Rectifier>(counts.data(), span.channels, span.channels, true, span.channels, sums);
    }
  });
}

template <typename Rectifier, typename T>
void run(const RectifyCall& call, int64_t* sums) {
  const bool columns =
      call.inner == 1 || (call.inner < kShortRow && call.outer >= kFewRows && !call.valid);
  const int64_t width = columns ? call.channels * call.inner : call.inner;
  int64_t rows = columns ? call.outer : call.outer * call.channels;
  int64_t side_by_side = 1;  // short rows, as one
  if (columns && !call.valid) {
    const int64_t whole = kBlock / std::gcd(width, kBlock);  // the fewest that fill blocks
    const int64_t wanted =
        whole * std::max<int64_t>(1, kSideBySide<Rectifier, T> / (whole * width));
    // Every column costs at the end, so few rows stay as they are, unless they are very short.
    const int64_t most = std::max(whole, rows / kManyRows);
    if (whole * width <= kWidestRow && whole <= rows)
      side_by_side = std::min(wanted, most / whole * whole);
  }
  const int64_t rest = rows % side_by_side;
  rows /= side_by_side;

  std::vector<Compute<T>> slopes;
  if constexpr (Rectifier::kSloped) {
    const T* given = static_cast<const T*>(call.slopes);
    // Whole blocks of them: the last one is read as a block too.
    const int64_t repeated = columns ? blocks_of(side_by_side * width) * kBlock : call.channels;
    for (int64_t i = 0; i < repeated; ++i) {
      const int64_t channel = columns ? i / call.inner % call.channels : i;
      slopes.push_back(given ? static_cast<Compute<T>>(given[call.slope_count == 1 ? 0 : channel])
                             : static_cast<Compute<T>>(call.slope));
    }
  }
  Span<T> span{static_cast<const T*>(call.x),
               static_cast<T*>(call.y),
               call.valid,
               slopes.data(),
               call.channels,
               width * side_by_side};
  if (!columns) return run_planes<Rectifier>(span, rows, sums);
  run_columns<Rectifier>(span, rows, call, sums);
  if (rest == 0) return;
  span.x += rows * span.width;
  span.y += rows * span.width;
  span.width = rest * width;
  run_columns<Rectifier>(span, 1, call, sums);
}

template <typename T>
void run_kind(const RectifyCall& call, int64_t* sums) {
  switch (call.kind) {
    case Kind::relu:
      return run<Relu, T>(call, sums);
    case Kind::relu6:
      return run<Relu6, T>(call, sums);
    case Kind::leaky_relu:
    case Kind::prelu:
      return run<LeakyRelu, T>(call, sums);
    case Kind::hardswish:
      return run<Hardswish, T>(call, sums);
    case Kind::gelu:
    case Kind::gelu_tanh:
    case Kind::silu:
      return run<CountOnly, T>(call, sums);
  }
}

void rectify_run(const RectifyCall& call, int64_t* sums) {
  visit_weight_type(call.dtype,
                    [&]<typename T>(std::type_identity<T>) { run_kind<T>(call, sums); });
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
