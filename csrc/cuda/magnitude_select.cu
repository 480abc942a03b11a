#include "cuda/magnitude_select.h"

#include <algorithm>

#include "cuda/magnitude_cut.cuh"
#include "cuda/table.h"

namespace layer_collapse {
namespace {

// cuts [groups], from wanted [groups]. Any number of threads.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    begin_kernel(Cut* cuts, const int64_t* wanted, int64_t groups, int64_t* failures) {
  const int64_t group = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (group < groups) cuts[group] = {0, 0, wanted[group], 0, INT64_MAX, 0};
  if (group == 0) *failures = 0;
}

// The same for a caller who chooses the digits.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    begin_at_kernel(Cut* cuts, const int64_t* prefix, int64_t groups) {
  const int64_t group = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (group < groups) cuts[group] = {static_cast<uint64_t>(*prefix), 0, 1, 0, INT64_MAX, 0};
}

Cut* cuts_of(const Selection& selection) { return reinterpret_cast<Cut*>(selection.cuts); }
int64_t* failures_of(const Selection& selection) {
  return selection.cuts + selection.groups() * cut_words();
}

// start(table with groups, indices, blocks, type) over the list, by dtype and key.
template <typename Start>
int for_each_kind(const Selection& selection, const Start& start) {
  const auto over = [&]<typename T, typename Key>(Dtype dtype, bool wide) {
    if (wide != selection.wide) return 0;
    return for_each_table<kSelectData>(
        selection.list, [dtype](const MaskedData& tensor) { return tensor.dtype == dtype; },
        [&](SelectTable table, const std::vector<size_t>& indices, int64_t blocks) {
          for (size_t j = 0; j < indices.size(); ++j) {
            table.group[j] = selection.one_group ? 0 : static_cast<int64_t>(indices[j]);
          }
          return start.template operator()<T, Key>(table, indices, blocks);
        });
  };
  int error = over.template operator()<double, uint64_t>(Dtype::float64, true);
  if (!error) error = over.template operator()<float, uint64_t>(Dtype::float32, true);
  if (!error) error = over.template operator()<BFloat16, uint64_t>(Dtype::bfloat16, true);
  if (!error) error = over.template operator()<Half, uint64_t>(Dtype::float16, true);
  if (!error) error = over.template operator()<float, uint32_t>(Dtype::float32, false);
  if (!error) error = over.template operator()<BFloat16, uint32_t>(Dtype::bfloat16, false);
  if (!error) error = over.template operator()<Half, uint32_t>(Dtype::float16, false);
  return error;
}

Digit digit_of(const Selection& selection, int digit) {
  const int bits = selection.wide ? 63 : 31;
  const int high = bits - digit * kDigitBits;
  return {high, std::max(high - kDigitBits, 0), digit == 0};
}

// Numbers of the table's tensors in the list.
TensorNames names_of(const std::vector<size_t>& indices) {
  TensorNames names{};
  std::copy(indices.begin(), indices.end(), names.number);
  return names;
}

}  // namespace

int64_t cut_words() { return sizeof(Cut) / sizeof(int64_t); }
int digits(bool wide) { return wide ? 6 : 3; }
int64_t segments(const MaskedData& data) {
  return (mask_words(data.numel) + kSegmentWords - 1) / kSegmentWords;
}

int begin_selection(const Selection& s) {
  const int64_t blocks = (s.groups() + s.threads - 1) / s.threads;
  return launch(begin_kernel, blocks, s.threads, s.stream, cuts_of(s), s.wanted, s.groups(),
                failures_of(s));
}

int begin_at(const Selection& s, const int64_t* prefix) {
  const int64_t blocks = (s.groups() + s.threads - 1) / s.threads;
  return launch(begin_at_kernel, blocks, s.threads, s.stream, cuts_of(s), prefix, s.groups());
}

int launch_histogram(const Selection& s, int digit) {
  return for_each_kind(
      s, [&]<typename T, typename Key>(const SelectTable& table, const std::vector<size_t>& indices,
                                       int64_t blocks) {
        return launch(histogram_kernel<T, Key>, blocks, s.threads, s.stream, table,
                      names_of(indices), cuts_of(s), digit_of(s, digit), s.histograms);
      });
}

int launch_choose(const Selection& s, int digit) {
  return launch(choose_kernel, s.groups(), s.threads, s.stream, cuts_of(s), digit_of(s, digit),
                s.histograms, failures_of(s));
}

int launch_shares(const Selection& s, int64_t* totals, int64_t* shares) {
  const int error = for_each_kind(
      s, [&]<typename T, typename Key>(const SelectTable& table, const std::vector<size_t>& indices,
                                       int64_t blocks) {
        return launch(count_kernel<T, Key>, blocks, s.threads, s.stream, table, names_of(indices),
                      cuts_of(s), totals, TensorNames{}, nullptr);
      });
  if (error) return error;
  return launch(shares_kernel, 1, kWarp, s.stream, cuts_of(s), totals,
                static_cast<int64_t>(s.list.size()), shares);
}

int launch_clear(const Selection& s, const std::vector<int64_t>& first_tie, const int64_t* bounds,
                 int64_t* ties) {
  const auto offsets_of = [&](const std::vector<size_t>& indices) {
    TensorNames offsets{};
    for (size_t j = 0; j < indices.size(); ++j) offsets.number[j] = first_tie[indices[j]];
    return offsets;
  };
  int error = for_each_kind(
      s, [&]<typename T, typename Key>(const SelectTable& table, const std::vector<size_t>& indices,
                                       int64_t blocks) {
        return launch(count_kernel<T, Key>, blocks, s.threads, s.stream, table, names_of(indices),
                      cuts_of(s), nullptr, offsets_of(indices), ties);
      });
  if (error) return error;
  error =
      launch(scan_kernel, static_cast<int64_t>(s.list.size()), s.threads, s.stream, bounds, ties);
  if (error) return error;
  return for_each_kind(
      s, [&]<typename T, typename Key>(const SelectTable& table, const std::vector<size_t>& indices,
                                       int64_t blocks) {
        return launch(clear_kernel<T, Key>, blocks, s.threads, s.stream, table, cuts_of(s),
                      failures_of(s), offsets_of(indices), ties);
      });
}

int fetch_cuts(const Selection& s, std::vector<FetchedCut>& found) {
  std::vector<Cut> cuts(s.groups());
  const int error = fetch(cuts.data(), s.cuts, cuts.size() * sizeof(Cut), s.stream);
  if (error) return error;
  found.clear();
  for (const Cut& cut : cuts) found.push_back({cut.alive, cut.nan_tensor, cut.failed != 0});
  return 0;
}

}  // namespace layer_collapse
