// How many weights each layer loses in a round.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace layer_collapse {

// Rounds wanted[i] >= 0 to integers of the given total by the largest remainder (ties: lower index
// first), none above caps[i]. The sum is less than total only if the caps leave no room.
inline std::vector<int64_t> round_to_total(const std::vector<double>& wanted,
                                           const std::vector<int64_t>& caps, int64_t total) {
  const size_t n = wanted.size();
  std::vector<int64_t> counts(n);
  for (size_t i = 0; i < n; ++i) {
    counts[i] = std::min(caps[i], static_cast<int64_t>(std::floor(wanted[i])));
  }
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  auto remainder = [&](size_t i) { return wanted[i] - std::floor(wanted[i]); };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return remainder(a) > remainder(b); });
  int64_t left = total - std::accumulate(counts.begin(), counts.end(), int64_t{0});
  for (bool moved = true; left > 0 && moved;) {
    moved = false;
    for (size_t i : order) {
      if (left > 0 && counts[i] < caps[i] && wanted[i] > 0) {
        ++counts[i], --left, moved = true;
      }
    }
  }
  return counts;
}

// The entropy-guided budget (EGP / NEPENTHE, TMLR 2026, section 3.3):
//   I_l = H_l mean|w|_l,  R_l = sum_j I_j / I_l,  k_l = softmax(R)_l total
// over the layers with H > 0 and room. While a k_l exceeds its cap, the layer that exceeds it most
// is fixed at the cap and leaves the budget and the sum, and the rest is computed anew. Counts are
// rounded to the exact total (the authors' code truncates each).
//
// entropy: bits; importance: mean|w| (after any fan-in normalisation); caps: weights that may go.
inline std::vector<int64_t> entropy_budget(const std::vector<double>& entropy,
                                           const std::vector<double>& importance,
                                           const std::vector<int64_t>& caps, int64_t total) {
  const size_t n = entropy.size();
  std::vector<int64_t> counts(n, 0);
  std::vector<size_t> open;
  for (size_t i = 0; i < n; ++i) {
    if (entropy[i] > 0 && caps[i] > 0) open.push_back(i);
  }
  int64_t left = total;
  while (!open.empty() && left > 0) {
    double sum = 0;
    for (size_t i : open) sum += entropy[i] * importance[i];
    std::vector<double> wanted(open.size(), 0.0);
    double largest = 0;
    for (size_t j = 0; j < open.size(); ++j) {
      const double mine = entropy[open[j]] * importance[open[j]];
      // A layer of zero importance (all its weights are 0.0) goes before any other.
      wanted[j] = mine > 0 ? sum / mine : HUGE_VAL;
      largest = std::max(largest, wanted[j]);
    }
    double normaliser = 0;
    for (double& ratio : wanted) {
      ratio = std::isinf(largest) ? (std::isinf(ratio) ? 1.0 : 0.0) : std::exp(ratio - largest);
      normaliser += ratio;
    }
    size_t worst = open.size();
    double worst_excess = 0;
    for (size_t j = 0; j < open.size(); ++j) {
      wanted[j] = wanted[j] / normaliser * static_cast<double>(left);
      const double excess = wanted[j] - static_cast<double>(caps[open[j]]);
      if (excess > worst_excess) worst = j, worst_excess = excess;
    }
    if (worst < open.size()) {
      counts[open[worst]] = caps[open[worst]];
      left -= caps[open[worst]];
      open.erase(open.begin() + static_cast<std::ptrdiff_t>(worst));
      continue;
    }
    std::vector<int64_t> room;
    for (size_t i : open) room.push_back(caps[i]);
    // A share can underflow to 0: it still may take what rounding leaves over.
    for (double& share : wanted) share = std::max(share, 1e-300);
    const std::vector<int64_t> rounded = round_to_total(wanted, room, left);
    for (size_t j = 0; j < open.size(); ++j) counts[open[j]] = rounded[j];
    break;
  }
  return counts;
}

}  // namespace layer_collapse
