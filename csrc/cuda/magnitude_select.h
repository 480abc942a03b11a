// Starts magnitude selection on a GPU. No torch in here: raw pointers, sizes, a stream.
//
// Selection is begin, then histogram + choose per digit, then count + shares, or count + clear. All
// of it runs on the device; nothing is fetched but by fetch_cuts. Or a caller chooses the digits:
// begin_at, then one histogram.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/masked_step.h"

namespace layer_collapse {

struct FetchedCut {
  int64_t alive, nan_tensor;  // nan_tensor: INT64_MAX without
  bool failed;
};

// Weights in mask order (contiguous), data: the weights. Device memory is the caller's.
struct Selection {
  std::vector<MaskedData> list;
  bool one_group;       // one k for all tensors, or one per tensor
  bool wide;            // keys of 64 bits, which float64 needs
  int64_t* cuts;        // [groups][cut_words()], then one word
  int64_t* histograms;  // [groups][2049], zero before the first digit and after every choose
  int64_t* wanted;      // [groups] how many to select
  int threads;          // of a block, a multiple of 32 up to 256
  void* stream = nullptr;

  int64_t groups() const { return one_group ? 1 : static_cast<int64_t>(list.size()); }
};

int64_t cut_words();
int digits(bool wide);                     // passes over the weights: 3, with wide keys 6
int64_t segments(const MaskedData& data);  // words of `ties` that a tensor takes

// All return a cudaError_t, 0 for success.
int begin_selection(const Selection& selection);
// Every group at the same prefix [1], the digits chosen so far; `wanted` is not read.
int begin_at(const Selection& selection, const int64_t* prefix);
int launch_histogram(const Selection& selection, int digit);
int launch_choose(const Selection& selection, int digit);

// After the last digit. totals [tensors][2], zero; shares [tensors].
int launch_shares(const Selection& selection, int64_t* totals, int64_t* shares);
// ties [sum of segments()]; bounds [tensors + 1] on the device: where each tensor's ties begin.
int launch_clear(const Selection& selection, const std::vector<int64_t>& first_tie,
                 const int64_t* bounds, int64_t* ties);

// Waits for the device and tells what every group found.
int fetch_cuts(const Selection& selection, std::vector<FetchedCut>& found);

}  // namespace layer_collapse
