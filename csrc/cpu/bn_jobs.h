// How the two passes of a batch-normalised rectifier, forward or backward, get at memory: by groups
// of channels (NCHW) or by slices of rows (channels_last). The result does not depend on the number
// of threads.
//
// A Job has
//   needs_sums                     whether there is a first pass
//   first(c, offset), second(...)  the passes over channels from c on, whose data begin at offset
//   finish(c, sum, second_sum)     takes the sums of channel c over all positions; false: they are
//                                  inexact, run the first pass again (it has changed its center)
//   take(c, totals, pick)          takes what the second pass found, pick(lanes) for channel c
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/bn_walks.h"

namespace layer_collapse {

// A tensor in the order of its storage.
struct Span {
  int64_t outer, channels, inner;
  int64_t positions() const { return outer * inner; }
};

// One channel's share of sums that several hold, one per lane.
struct PickLane {
  int64_t i;
  template <typename Lanes>
  auto operator()(const Lanes& lanes) const {
    return lanes[i];
  }
};
// All of the sums, where every lane is the same channel's.
template <typename V>
struct PickAll {
  template <typename Lanes>
  auto operator()(const Lanes& lanes) const {
    auto sum = lanes[0];
    for (int64_t i = 1; i < kLanes<V>; ++i) sum += lanes[i];
    return sum;
  }
};

inline constexpr int64_t kGroupBytes = 1 << 12;  // of a group's rows at one outer index
inline constexpr int64_t kSliceBytes = 1 << 18;
inline constexpr int64_t kMinSliceRows = 64;
inline constexpr int64_t kMaxSlices = 64;
inline constexpr int64_t kTaskElements = 1 << 15;  // below which a second thread does not pay

template <typename T, typename Job>
void run_planes(const Span& span, Job& job) {
  using V = Compute<T>;
  const auto [outer, channels, inner] = span;
  const int64_t row_bytes = inner * static_cast<int64_t>(sizeof(T));
  const int64_t group = std::clamp<int64_t>(kGroupBytes / row_bytes, 1, channels);
  const int64_t groups = (channels + group - 1) / group;
  const int64_t stride = channels * inner;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / (outer * inner * group));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t from, int64_t to) {
    for (int64_t begin = from * group; begin < std::min(to * group, channels); begin += group) {
      const int64_t count = std::min(group, channels - begin);
      if (job.needs_sums) {
        std::vector<typename Job::First::Totals> sums(count);
        walk_planes(job.first(begin, begin * inner), outer, stride, count, inner, sums.data());
        for (int64_t c = begin; c < begin + count; ++c) {
          const PickAll<V> pick;
          auto& found = sums[c - begin];
          if (job.finish(c, pick(found.first), pick(found.second))) continue;
          found = {};
          walk_planes(job.first(c, c * inner), outer, stride, 1, inner, &found);
          job.finish(c, pick(found.first), pick(found.second));
        }
      }
      std::vector<typename Job::Second::Totals> totals(count);
      walk_planes(job.second(begin, begin * inner), outer, stride, count, inner, totals.data());
      for (int64_t c = begin; c < begin + count; ++c) {
        job.take(c, totals[c - begin], PickAll<V>{});
      }
    }
  });
}

// The first pass over all slices of rows; whether its sums were exact.
template <typename T, typename Job>
bool sum_channels(const Span& span, int64_t slices, Job& job) {
  using V = Compute<T>;
  using Totals = typename Job::First::Totals;
  const int64_t rows = span.outer, channels = span.channels;
  const int64_t columns = (channels + kLanes<V> - 1) / kLanes<V>;
  std::vector<Totals> sums(slices * columns);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      walk_channels(job.first(0, 0), s * rows / slices, (s + 1) * rows / slices, channels,
                    sums.data() + s * columns);
    }
  });
  for (int64_t s = 1; s < slices; ++s) {
    for (int64_t column = 0; column < columns; ++column) {
      Totals& sum = sums[column];
      const Totals& more = sums[s * columns + column];
      for (int64_t i = 0; i < kLanes<V>; ++i) {
        sum.first[i] += more.first[i];
        sum.second[i] += more.second[i];
      }
    }
  }
  bool exact = true;
  for (int64_t c = 0; c < channels; ++c) {
    const Totals& sum = sums[c / kLanes<V>];
    const PickLane pick{c % kLanes<V>};
    exact &= job.finish(c, pick(sum.first), pick(sum.second));
  }
  return exact;
}

template <typename T, typename Job>
void run_channels(const Span& span, Job& job) {
  using V = Compute<T>;
  const int64_t rows = span.outer, channels = span.channels;
  const int64_t bytes = rows * channels * static_cast<int64_t>(sizeof(T));
  const int64_t most = std::clamp<int64_t>(rows / kMinSliceRows, 1, kMaxSlices);
  const int64_t slices = std::clamp<int64_t>(bytes / kSliceBytes, 1, most);
  if (job.needs_sums && !sum_channels<T>(span, slices, job)) sum_channels<T>(span, slices, job);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t from, int64_t to) {
    for (int64_t s = to; s-- > from;) {
      std::vector<typename Job::Second::Totals> totals((channels + kLanes<V> - 1) / kLanes<V>);
      walk_channels(job.second(0, 0), s * rows / slices, (s + 1) * rows / slices, channels,
                    totals.data());
      for (int64_t c = 0; c < channels; ++c) {
        job.take(c, totals[c / kLanes<V>], PickLane{c % kLanes<V>});
      }
    }
  });
}

template <typename T, typename Job>
void run_job(const Span& span, Job& job) {
  if (span.inner == 1) {
    run_channels<T>(span, job);
  } else {
    run_planes<T>(span, job);
  }
}

}  // namespace layer_collapse
