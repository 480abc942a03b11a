// A rectifier and the counts of its input's signs in one pass, every value read once and written
// once. The tensor is seen as [outer, C, inner] in the order of its storage:
//
//   rectify_planes    inner > 1 (NCHW). A block belongs to one channel and to a slice of its rows;
//                     `lanes` threads walk a row together, so short rows share a block. A row's
//                     start may have any alignment: values before the first 16-byte boundary and
//                     after the last one are handled singly.
//   rectify_channels  inner == 1 (token-major, channels_last). A thread keeps one vector of
//                     channels and walks down a range of rows; 16-byte vectors where every row is
//                     aligned, single values elsewhere.
//
// Threads count in registers, blocks add them up and then to the ledger with one integer atomic per
// channel and counter. The backward pass is torch's own (threshold_backward and its like), which
// reads two tensors and writes one: there is nothing left to fuse.
#pragma once

#include "cuda/entropy.cuh"
#include "cuda/rectifiers.cuh"

namespace layer_collapse {

template <typename Rectifier, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    rectify_planes(const __grid_constant__ RectifyArguments<T> a) {
  using Real = typename Numeric<T>::Real;
  using Wide = Vector<T, kVectorValues<T>>;
  using Single = Vector<T, 1>;
  constexpr int kRows = static_cast<int>(count_rows(Rectifier::kind));
  constexpr int kAhead = batch<Rectifier, T>();
  const auto channels = static_cast<unsigned>(a.channels);  // there is a block for each
  const unsigned channel = blockIdx.x % channels, slice = blockIdx.x / channels;
  const int lane = threadIdx.x % a.lanes;
  const int rows = blockDim.x / a.lanes;  // walked at once by this block
  const int64_t units = a.outer * a.segments;
  const Real slope = a.slopes ? widen(a.slopes[channel]) : static_cast<Real>(a.slope);
  const auto slopes = [slope](int) { return slope; };

  uint32_t counters[kRows] = {};
  int32_t seen = 0;  // valid positions
  const auto visit = [&](auto& vector, uint32_t keep) {
    LC_UNROLL
    for (auto& pack : vector.packs) {
      count<Rectifier, T>(pack, keep, counters);
      pack = Rectifier::apply(pack, slopes);
    }
  };

  LC_NO_UNROLL
  for (int64_t unit = static_cast<int64_t>(slice) * rows + threadIdx.x / a.lanes; unit < units;
       unit += static_cast<int64_t>(a.slices) * rows) {
    const int64_t sample = a.segments == 1 ? unit : unit / a.segments;
    const int64_t start = a.segments == 1 ? 0 : (unit - sample * a.segments) * a.segment;
    const int length = static_cast<int>(a.inner - start < a.segment ? a.inner - start : a.segment);
    const int64_t offset = (sample * a.channels + channel) * a.inner + start;
    const T* x = a.x + offset;
    T* y = a.y + offset;
    const uint8_t* valid = a.valid ? a.valid + sample * a.inner + start : nullptr;

    // [head, tail) in vectors; nothing if x and y can never be aligned at once, or with `valid`,
    // whose bytes would have to be fetched singly anyway.
    constexpr uintptr_t kMisaligned = sizeof(uint4) - 1;
    const auto from = reinterpret_cast<uintptr_t>(x), to = reinterpret_cast<uintptr_t>(y);
    int head = static_cast<int>((-from & kMisaligned) / sizeof(T));
    if (valid || ((from ^ to) & kMisaligned) != 0 || head > length) head = length;
    const int vectors = (length - head) / kVectorValues<T>;
    const int tail = head + vectors * kVectorValues<T>;
    const T* source = x + head;
    T* target = y + head;
    const int step = a.lanes * kVectorValues<T>;
    int i = lane * kVectorValues<T>;
    LC_NO_UNROLL
    for (; i + (kAhead - 1) * step < tail - head; i += kAhead * step) {
      Wide batch[kAhead];
      LC_UNROLL
      for (int b = 0; b < kAhead; ++b) batch[b] = Wide::load(source + i + b * step);
      LC_UNROLL
      for (int b = 0; b < kAhead; ++b) {
        visit(batch[b], ~0U);
        if constexpr (Rectifier::kWrites) batch[b].store(target + i + b * step);
      }
    }
    LC_NO_UNROLL
    for (; i < tail - head; i += step) {
      Wide vector = Wide::load(source + i);
      visit(vector, ~0U);
      if constexpr (Rectifier::kWrites) vector.store(target + i);
    }
    LC_NO_UNROLL
    for (int j = lane; j < length - (tail - head); j += a.lanes) {
      const int place = j < head ? j : j + (tail - head);
      Single single = Single::load(x + place);
      const uint32_t keep = !valid || valid[place] != 0;
      seen += static_cast<int32_t>(keep);
      visit(single, (0U - keep) & Single::kLanes);
      if constexpr (Rectifier::kWrites) single.store(y + place);
    }
  }

  int32_t sums[kRows + 1];
  LC_UNROLL
  for (int row = 0; row < kRows; ++row) sums[row] = counted<T>(counters[row]);
  rows_of_sums<typename Numeric<T>::Pack>(sums);
  sums[kRows] = seen;
  block_sums(sums);
  const int64_t flags = a.ledger ? __ldcg(a.ledger + kFlags) : 0;
  if ((flags & kCount) == 0) return;
  if (threadIdx.x == 0) {
    int64_t* cells = a.ledger + kLedgerHeader + channel;
    LC_UNROLL
    for (int row = 0; row < kRows; ++row) add_to(cells + row * a.channels, sums[row]);
    if (channel == 0 && a.valid) add_to(a.ledger + kPositions, sums[kRows]);
    if (blockIdx.x == 0 && !a.valid) add_to(a.ledger + kPositions, a.outer * a.inner);
  }
  if ((flags & kLive) != 0) refresh_live_in_last_block(a.ledger, a.channels, a.kind);
}

template <typename Rectifier, typename T, int kValues>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    rectify_channels(const __grid_constant__ RectifyArguments<T> a) {
  using Real = typename Numeric<T>::Real;
  using Values = Vector<T, kValues>;
  constexpr int kRows = static_cast<int>(count_rows(Rectifier::kind));
  // counters of eight halves take the registers that a second vector would need
  constexpr bool kFull = sizeof(T) == 2 && !kOnes<typename Numeric<T>::Pack>;
  constexpr int kAhead = kFull ? 1 : batch<Rectifier, T>();
  constexpr int kPack = kValues < Numeric<T>::kPack ? kValues : Numeric<T>::kPack;
  const int64_t columns = a.channels / kValues;
  const unsigned tile = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
  const int lane = threadIdx.x % a.lanes;
  const int64_t column = static_cast<int64_t>(tile) * a.lanes + lane;
  const int64_t begin = static_cast<int64_t>(slice) * a.share;
  const int last = static_cast<int>(begin + a.share < a.outer ? a.share : a.outer - begin);
  int row = threadIdx.x / a.lanes;    // from `begin` on
  if (column >= columns) row = last;  // a lane beyond the edge has nothing to do but to wait

  Real own[kValues];  // slopes
  LC_UNROLL
  for (int i = 0; i < kValues; ++i) {
    own[i] = a.slopes && column < columns ? widen(a.slopes[column * kValues + i])
                                          : static_cast<Real>(a.slope);
  }
  uint32_t counters[Values::kPacks][kRows] = {};
  int32_t seen = 0;
  const auto visit = [&](Values& values, uint32_t keep) {
    LC_UNROLL
    for (int p = 0; p < Values::kPacks; ++p) {
      const auto slopes = [&](int i) { return own[p * kPack + (i < kPack ? i : 0)]; };
      count<Rectifier, T>(values.packs[p], keep, counters[p]);
      values.packs[p] = Rectifier::apply(values.packs[p], slopes);
    }
  };

  const int64_t place = (begin + row) * a.channels + column * kValues;
  const T* source = a.x + place;
  T* target = a.y + place;
  // From the argument it takes no register, which kernels with many counters lack; elsewhere the
  // product takes fewer instructions.
  const int64_t stride = kAhead == 1 ? a.stride : a.step * a.channels;
  if (!a.valid) {
    LC_NO_UNROLL
    for (; row + (kAhead - 1) * a.step < last; row += kAhead * a.step) {
      Values batch[kAhead];
      LC_UNROLL
      for (int b = 0; b < kAhead; ++b) batch[b] = Values::load(source + b * stride);
      LC_UNROLL
      for (int b = 0; b < kAhead; ++b) {
        visit(batch[b], Values::kLanes);
        if constexpr (Rectifier::kWrites) batch[b].store(target + b * stride);
      }
      source += kAhead * stride;
      target += kAhead * stride;
    }
  }
  LC_NO_UNROLL
  for (; row < last; row += a.step) {
    const uint32_t keep = !a.valid || a.valid[begin + row] != 0;
    seen += static_cast<int32_t>(keep);
    Values values = Values::load(source);
    visit(values, (0U - keep) & Values::kLanes);
    if constexpr (Rectifier::kWrites) values.store(target);
    source += stride;
    target += stride;
  }

  using Sums = int32_t[kRows * kValues * kWarp + 1];  // [row][lane][value], then valid positions
  LC_SHARED(Sums, sums);
  const int cells = kRows * kValues * a.lanes;
  for (int i = threadIdx.x; i <= cells; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  LC_UNROLL
  for (int i = 0; i < kValues; ++i) {
    int32_t rows[kRows];
    LC_UNROLL
    for (int r = 0; r < kRows; ++r) rows[r] = counted_in<T>(counters[i / kPack][r], i % kPack);
    rows_of_sums<typename Numeric<T>::Pack>(rows);
    LC_UNROLL
    for (int r = 0; r < kRows; ++r) atomicAdd(&sums[(r * a.lanes + lane) * kValues + i], rows[r]);
  }
  if (column == 0 && a.valid) atomicAdd(&sums[cells], seen);
  __syncthreads();
  const int64_t flags = a.ledger ? __ldcg(a.ledger + kFlags) : 0;
  if ((flags & kCount) == 0) return;
  const int64_t base = static_cast<int64_t>(tile) * a.lanes * kValues;  // the tile's first channel
  LC_NO_UNROLL
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    const int r = i / (a.lanes * kValues);
    const int64_t c = base + i % (a.lanes * kValues);
    if (c < a.channels) add_to(a.ledger + kLedgerHeader + r * a.channels + c, sums[i]);
  }
  if (threadIdx.x == 0) {
    if (tile == 0 && a.valid) add_to(a.ledger + kPositions, sums[cells]);
    if (blockIdx.x == 0 && !a.valid) add_to(a.ledger + kPositions, a.outer);
  }
  if ((flags & kLive) != 0) refresh_live_in_last_block(a.ledger, a.channels, a.kind);
}

// Adds the valid positions of a tensor without channels. One block.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    count_positions(int64_t* ledger, const uint8_t* valid, int64_t positions) {
  int64_t seen[1] = {0};
  for (int64_t i = threadIdx.x; i < positions; i += blockDim.x) seen[0] += !valid || valid[i] != 0;
  block_sums(seen);
  if (threadIdx.x == 0 && (ledger[kFlags] & kCount) != 0) add_to(ledger + kPositions, seen[0]);
}

}  // namespace layer_collapse
