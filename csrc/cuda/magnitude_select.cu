#include "cuda/magnitude_select.h"

#include <algorithm>

#include "cuda/magnitude_cut.cuh"
#include "cuda/table.h"

namespace layer_collapse {
namespace {

// Numbers that a launch passes as a parameter, at most 4 KB.
inline constexpr int kNumbers = 480;
struct Numbers {
  int64_t number[kNumbers];
};

// Any number of threads.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    write_numbers(const __grid_constant__ Numbers numbers, int count, int64_t* target) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) target[i] = numbers.number[i];
}

// histograms [groups][kHistogram] = 0.
__device__ __forceinline__ void clear_histograms(int64_t* histograms, int64_t groups) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < groups * kHistogram; i += threads) histograms[i] = 0;
}

// cuts [groups], from wanted [groups]. A thread per group.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    begin_kernel(Cut* cuts, const int64_t* wanted, int64_t groups, int64_t* histograms,
                 int64_t* failures) {
  const int64_t group = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (group < groups) cuts[group] = {0, 0, wanted[group], INT64_MAX, 0};
  if (group == 0) *failures = 0;
  clear_histograms(histograms, groups);
}

// The same for a caller who chooses the digits.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    begin_at_kernel(Cut* cuts, const int64_t* prefix, int64_t groups, int64_t* histograms) {
  const int64_t group = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (group < groups) cuts[group] = {static_cast<uint64_t>(*prefix), 0, 1, INT64_MAX, 0};
  clear_histograms(histograms, groups);
}

Cut* cuts_of(const Selection& selection) { return reinterpret_cast<Cut*>(selection.cuts); }
int64_t* failures_of(const Selection& selection) {
  return selection.cuts + selection.groups() * cut_words();
}

// Blocks of a histogram: each ends with an atomic per bucket that it has found.
constexpr int64_t kHistogramBlocks = 384;

// start(table with groups, indices, blocks, type) over the list, by dtype and key.
template <typename Start>
int for_each_kind(const Selection& selection, const Start& start, int64_t most = kTableBlocks) {
  const auto over = [&]<typename T, typename Key>(Dtype dtype, bool wide) {
    if (wide != selection.wide) return 0;
    return for_each_table<kSelectData>(
        selection.list, [dtype](const MaskedData& tensor) { return tensor.dtype == dtype; },
        [&](SelectTable table, const std::vector<size_t>& indices, int64_t blocks) {
          for (size_t j = 0; j < indices.size(); ++j) {
            table.group[j] = selection.one_group ? 0 : static_cast<int64_t>(indices[j]);
          }
          return start.template operator()<T, Key>(table, indices, blocks);
        },
        most);
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
int64_t segments(const MaskedData& data) { return segments_of(data.numel); }

int launch_numbers(const std::vector<int64_t>& numbers, int64_t* target, int threads,
                   void* stream) {
  for (size_t begin = 0; begin < numbers.size(); begin += kNumbers) {
    const size_t count = std::min<size_t>(kNumbers, numbers.size() - begin);
    Numbers some{};
    std::copy_n(numbers.begin() + static_cast<std::ptrdiff_t>(begin), count, some.number);
    const int error =
        launch(write_numbers, 1, threads, stream, some, static_cast<int>(count), target + begin);
    if (error) return error;
  }
  return 0;
}

int begin_selection(const Selection& s) {
  const int64_t blocks = (s.groups() + s.threads - 1) / s.threads;
  return launch(begin_kernel, blocks, s.threads, s.stream, cuts_of(s), s.wanted, s.groups(),
                s.histograms, failures_of(s));
}

int begin_at(const Selection& s, const int64_t* prefix) {
  const int64_t blocks = (s.groups() + s.threads - 1) / s.threads;
  return launch(begin_at_kernel, blocks, s.threads, s.stream, cuts_of(s), prefix, s.groups(),
                s.histograms);
}

int launch_histogram(const Selection& s, int digit) {
  return for_each_kind(
      s,
      [&]<typename T, typename Key>(const SelectTable& table, const std::vector<size_t>& indices,
                                    int64_t blocks) {
        return launch(histogram_kernel<T, Key>, blocks, s.threads, s.stream, table,
                      names_of(indices), cuts_of(s), digit_of(s, digit), s.histograms);
      },
      kHistogramBlocks);
}

int launch_choose(const Selection& s, int digit) {
  return launch(choose_kernel, s.groups(), s.threads, s.stream, cuts_of(s), digit_of(s, digit),
                s.histograms, failures_of(s), s.info);
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

int launch_clear(const Selection& s, const std::vector<int64_t>& first_tie, int64_t* ties) {
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
  error = for_each_kind(s, [&]<typename, typename>(const SelectTable& table,
                                                   const std::vector<size_t>& indices, int64_t) {
    return launch(scan_kernel, table.tensors, s.threads, s.stream, table, offsets_of(indices),
                  cuts_of(s), ties);
  });
  if (error) return error;
  return for_each_kind(
      s, [&]<typename T, typename Key>(const SelectTable& table, const std::vector<size_t>& indices,
                                       int64_t blocks) {
        return launch(clear_kernel<T, Key>, blocks, s.threads, s.stream, table, cuts_of(s),
                      failures_of(s), offsets_of(indices), ties);
      });
}

}  // namespace layer_collapse
