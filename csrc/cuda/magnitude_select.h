// Starts magnitude selection on a GPU. No torch in here: raw pointers, sizes, a stream.
//
// Selection is begin, then histogram + choose per digit, then count + shares, or count + clear. All
// of it runs on the device and nothing is fetched, so a CUDA graph can hold it. Or a caller chooses
// the digits: begin_at, then one histogram.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/masked_step.h"

namespace layer_collapse {

// Weights in mask order (contiguous), data: the weights. Device memory is the caller's.
struct Selection {
  std::vector<MaskedData> list;
  bool one_group;         // one k for all tensors, or one per tensor
  bool wide;              // keys of 64 bits, which float64 needs
  int64_t* cuts;          // [groups][cut_words()], then one word
  int64_t* histograms;    // [groups][2049]
  const int64_t* wanted;  // [groups] how many to select
  int64_t* info;          // [groups][3], see magnitude_arguments.h; written with the first digit
  int threads;            // of a block, a power of two from 32 to 256
  void* stream = nullptr;

  int64_t groups() const { return one_group ? 1 : static_cast<int64_t>(list.size()); }
};

int64_t cut_words();
int digits(bool wide);                     // passes over the weights: 3, with wide keys 6
int64_t segments(const MaskedData& data);  // words of `ties` that a tensor takes

// All return a cudaError_t, 0 for success.

// Numbers of the host into device memory, as kernel parameters: a copy would wait, and a graph
// would read it from the host again.
int launch_numbers(const std::vector<int64_t>& numbers, int64_t* target, int threads, void* stream);
int begin_selection(const Selection& selection);
// Every group at the same prefix [1], the digits chosen so far; `wanted` is not read.
int begin_at(const Selection& selection, const int64_t* prefix);
int launch_histogram(const Selection& selection, int digit);
int launch_choose(const Selection& selection, int digit);

// After the last digit. totals [tensors][2], zero; shares [tensors].
int launch_shares(const Selection& selection, int64_t* totals, int64_t* shares);
// ties [sum of segments()]; first_tie [tensors]: where each tensor's begin.
int launch_clear(const Selection& selection, const std::vector<int64_t>& first_tie, int64_t* ties);

}  // namespace layer_collapse
