// How the two passes of a batch-normalised rectifier, forward or backward, get at memory. The
// result does not depend on the number of threads.
//
// - Large planes (NCHW): by groups of channels, whose second pass finds them in the cache; without
//   a first pass straight through memory.
// - Small planes: the same, but as rows of [channels * inner] columns: no vector is cut short at
// the
//   end of a plane.
// - Channels last: by slices of rows.
//
// A Job has
//   needs_sums                     whether there is a first pass
//   first(c, offset), second(...)  the passes over channels from c on, whose data begin at offset
//   finish(c, sum, second_sum)     takes the sums of channel c over all positions; false: they are
//                                  inexact, run the first pass again (it has changed its center)
//   take(begin, count, pick_of)    takes what the second pass found of `count` channels:
//                                  pick_of(i)(&Totals::x) is that of channel begin + i
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

// The share of some columns in totals of one column per lane; even elements before odd ones, see
// bn_lanes.h.
template <typename T, typename Totals>
struct PickColumns {
  const std::vector<Totals>& totals;
  int64_t first, count;

  template <typename Member>
  auto operator()(Member member) const {
    std::decay_t<decltype((totals[0].*member)[0])> sum = 0;
    for (uint64_t column = first; column < static_cast<uint64_t>(first + count); ++column) {
      const uint64_t place = column % kWidth<T>;  // unsigned: these are shifts and masks
      const uint64_t slot = place % kParts<T> * kLanes<Compute<T>> + place / kParts<T>;
      sum += (totals[column / kWidth<T>].*member)[slot];
    }
    return sum;
  }
};
// All lanes of the totals of one channel.
template <typename T, typename Totals>
struct PickAll {
  const Totals& totals;

  template <typename Member>
  auto operator()(Member member) const {
    auto sum = (totals.*member)[0];
    for (int64_t i = 1; i < kWidth<T>; ++i) sum += (totals.*member)[i];
    return sum;
  }
};

// Of a group's rows at one outer index; small planes need more sums per byte.
inline constexpr int64_t kGroupBytes = 1 << 14, kSmallGroupBytes = 1 << 12;
inline constexpr int64_t kSliceBytes = 1 << 18;
inline constexpr int64_t kMinSliceRows = 64;
inline constexpr int64_t kMaxSlices = 64;
inline constexpr int64_t kTaskElements = 1 << 15;  // below which a second thread does not pay

template <typename T>
int64_t vectors(int64_t columns) {
  return (columns + kWidth<T> - 1) / kWidth<T>;
}

template <typename Job, typename Pick>
bool finish_sums(Job& job, int64_t c, const Pick& pick) {
  using Totals = typename Job::First::Totals;
  return job.finish(c, pick(&Totals::first), pick(&Totals::second));
}

// A pass over `count` channels of `inner` elements as one over columns; `numbers` keeps the arrays.
template <typename Pass, typename V>
Pass by_columns(Pass pass, int64_t count, int64_t inner, std::vector<std::vector<V>>& numbers) {
  numbers.clear();
  numbers.reserve(8);
  pass.each_array([&](const V*& array) {
    auto& columns = numbers.emplace_back(padded<V>(count * inner));
    for (int64_t c = 0; c < count; ++c) std::fill_n(columns.begin() + c * inner, inner, array[c]);
    array = columns.data();
  });
  return pass;
}

// Channels [begin, begin + count) of small planes.
template <typename T, typename Job>
void run_small_planes(const Span& span, int64_t begin, int64_t count, Job& job) {
  const int64_t inner = span.inner, stride = span.channels * inner, columns = count * inner;
  std::vector<std::vector<Compute<T>>> numbers;
  const auto sum = [&] {
    using Totals = typename Job::First::Totals;
    std::vector<Totals> sums(vectors<T>(columns));
    const auto pass = by_columns(job.first(begin, begin * inner), count, inner, numbers);
    walk_columns(pass, span.outer, stride, columns, sums.data());
    bool exact = true;
    for (int64_t c = 0; c < count; ++c) {
      const PickColumns<T, Totals> pick{sums, c * inner, inner};
      exact &= finish_sums(job, begin + c, pick);
    }
    return exact;
  };
  if (job.needs_sums && !sum()) sum();
  using Totals = typename Job::Second::Totals;
  std::vector<Totals> totals(vectors<T>(columns));
  const auto pass = by_columns(job.second(begin, begin * inner), count, inner, numbers);
  walk_columns(pass, span.outer, stride, columns, totals.data());
  job.take(begin, count,
           [&](int64_t c) { return PickColumns<T, Totals>{totals, c * inner, inner}; });
}

// The second pass over some channels of `outer` indices, whose data begin at `offset`.
template <typename T, typename Job>
void second_on_planes(const Span& span, int64_t begin, int64_t count, int64_t offset, int64_t outer,
                      Job& job) {
  using Totals = typename Job::Second::Totals;
  std::vector<Totals> totals(count);
  walk_planes(job.second(begin, offset), outer, span.channels * span.inner, count, span.inner,
              totals.data());
  job.take(begin, count, [&](int64_t c) { return PickAll<T, Totals>{totals[c]}; });
}

template <typename T, typename Job>
void run_large_planes(const Span& span, int64_t begin, int64_t count, Job& job) {
  const int64_t inner = span.inner, stride = span.channels * inner;
  if (job.needs_sums) {
    using Totals = typename Job::First::Totals;
    std::vector<Totals> sums(count);
    walk_planes(job.first(begin, begin * inner), span.outer, stride, count, inner, sums.data());
    for (int64_t c = 0; c < count; ++c) {
      const PickAll<T, Totals> pick{sums[c]};
      if (finish_sums(job, begin + c, pick)) continue;
      sums[c] = {};
      const auto again = job.first(begin + c, (begin + c) * inner);
      walk_planes(again, span.outer, stride, 1, inner, &sums[c]);
      finish_sums(job, begin + c, pick);
    }
  }
  second_on_planes<T>(span, begin, count, begin * inner, span.outer, job);
}

template <typename T, typename Job>
void run_planes(const Span& span, Job& job) {
  const bool small = span.inner <= 2 * kWidth<T>;
  if (!job.needs_sums && !small) {  // nothing keeps the channels apart: straight through memory
    const int64_t row = span.channels * span.inner;
    const int64_t grain = std::max<int64_t>(1, kTaskElements / row);
    torch::stable::parallel_for(0, span.outer, grain, [&](int64_t from, int64_t to) {
      second_on_planes<T>(span, 0, span.channels, from * row, to - from, job);
    });
    return;
  }
  const int64_t row_bytes = span.inner * static_cast<int64_t>(sizeof(T));
  const int64_t group =
      std::clamp<int64_t>((small ? kSmallGroupBytes : kGroupBytes) / row_bytes, 1, span.channels);
  const int64_t groups = (span.channels + group - 1) / group;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / (span.positions() * group));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t from, int64_t to) {
    for (int64_t g = from; g < to; ++g) {
      const int64_t begin = g * group, count = std::min(group, span.channels - begin);
      if (small) {
        run_small_planes<T>(span, begin, count, job);
      } else {
        run_large_planes<T>(span, begin, count, job);
      }
    }
  });
}

// The first pass over all slices of rows; whether its sums were exact.
template <typename T, typename Job>
bool sum_rows(const Span& span, int64_t slices, Job& job) {
  using Totals = typename Job::First::Totals;
  const int64_t rows = span.outer, channels = span.channels, width = vectors<T>(channels);
  std::vector<Totals> sums(slices * width);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      const int64_t begin = s * rows / slices, end = (s + 1) * rows / slices;
      walk_columns(job.first(0, begin * channels), end - begin, channels, channels,
                   sums.data() + s * width);
    }
  });
  for (int64_t i = width; i < slices * width; ++i) {
    for (int64_t slot = 0; slot < kWidth<T>; ++slot) {
      sums[i % width].first[slot] += sums[i].first[slot];
      sums[i % width].second[slot] += sums[i].second[slot];
    }
  }
  bool exact = true;
  for (int64_t c = 0; c < channels; ++c) {
    exact &= finish_sums(job, c, PickColumns<T, Totals>{sums, c, 1});
  }
  return exact;
}

template <typename T, typename Job>
void run_rows(const Span& span, Job& job) {
  const int64_t rows = span.outer, channels = span.channels;
  const int64_t bytes = rows * channels * static_cast<int64_t>(sizeof(T));
  const int64_t most = std::clamp<int64_t>(rows / kMinSliceRows, 1, kMaxSlices);
  const int64_t slices = std::clamp<int64_t>(bytes / kSliceBytes, 1, most);
  if (job.needs_sums && !sum_rows<T>(span, slices, job)) sum_rows<T>(span, slices, job);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t from, int64_t to) {
    using Totals = typename Job::Second::Totals;
    std::vector<Totals> totals(vectors<T>(channels));
    for (int64_t s = to; s-- > from;) {
      const int64_t begin = s * rows / slices, end = (s + 1) * rows / slices;
      walk_columns(job.second(0, begin * channels), end - begin, channels, channels, totals.data());
    }
    job.take(0, channels, [&](int64_t c) { return PickColumns<T, Totals>{totals, c, 1}; });
  });
}

template <typename T, typename Job>
void run_job(const Span& span, Job& job) {
  if (span.inner == 1) {
    run_rows<T>(span, job);
  } else {
    run_planes<T>(span, job);
  }
}

}  // namespace layer_collapse
