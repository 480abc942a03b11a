// Small cases of every kernel with a thread of the operating system per CUDA thread, two blocks at
// a time, for ThreadSanitizer. Exits with 0 if the results are right; the sanitiser tells of races.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "core/bitmask.h"
#include "cuda/layer_entropies.h"
#include "cuda/magnitude_select.h"
#include "cuda/masked_step.h"
#include "cuda/rectify.h"

namespace {

using namespace layer_collapse;

constexpr int kSize = 64;  // threads per block
int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "races: wrong %s\n", what);
  ++failures;
}

// T: of halves the bits. masked: every fourth position does not count.
template <typename T>
void rectify(Dtype dtype, T one, T minus_one, int64_t outer, int64_t channels, int64_t inner,
             bool masked) {
  for (const Kind kind : {Kind::relu, Kind::relu6, Kind::leaky_relu, Kind::hardswish, Kind::gelu}) {
    std::vector<T> x(outer * channels * inner), y(x.size());
    std::vector<uint8_t> valid(outer * inner);
    int64_t positive = 0, positions = 0;
    for (size_t i = 0; i < valid.size(); ++i) positions += valid[i] = !masked || i % 4 != 3;
    for (int64_t i = 0; i < outer * channels * inner; ++i) {
      const bool up = i * 7 % 3 == 0;
      x[i] = up ? one : minus_one;
      positive += up && valid[i / (channels * inner) * inner + i % inner] != 0;
    }
    std::vector<int64_t> ledger(kLedgerHeader + count_rows(kind) * channels, 0);
    ledger[kFlags] = kCount | kLive;
    const RectifyLaunch call{x.data(), y.data(), ledger.data(), masked ? valid.data() : nullptr,
                             nullptr,  0.5,      outer,         channels,
                             inner,    dtype,    kind,          kSize};
    expect(launch_rectify(call, nullptr) == 0, "launch");
    int64_t counted = 0, negative = 0;
    for (int64_t c = 0; c < channels; ++c) {
      counted += ledger[kLedgerHeader + c];
      negative += ledger[kLedgerHeader + channels + c];
    }
    expect(counted == positive && negative == positions * channels - positive, "counts");
    expect(ledger[kPositions] == positions && ledger[kTicket] == 0, "header");
    expect(ledger[kLiveMixed] > 0, "live words");
  }
}

// A tensor without channels has positions all the same.
void positions() {
  std::vector<int64_t> ledger(kLedgerHeader);
  ledger[kFlags] = kCount;
  std::vector<uint8_t> valid(300, 1);
  valid[7] = valid[299] = 0;
  const RectifyLaunch call{nullptr, nullptr, ledger.data(),  valid.data(), nullptr, 0.0, 100,
                           0,       3,       Dtype::float32, Kind::relu,   kSize};
  expect(launch_rectify(call, nullptr) == 0, "launch");
  expect(ledger[kPositions] == 298, "positions");
}

// What a case of the list kernels works on; T: of halves the bits.
template <typename T>
struct Weights {
  Dtype dtype;
  std::vector<T> values, gradients, first, second, third;
  std::vector<uint32_t> words;
  int64_t count() const { return static_cast<int64_t>(values.size()); }
  MaskedData data(std::vector<void*> state) {
    state.insert(state.begin(), values.data());
    return {dtype, count(), words.data(), state};
  }
  MaskedData data() { return data({}); }
};

template <typename T>
Weights<T> make_weights(Dtype dtype, size_t count) {
  std::mt19937 random(7);
  const auto number = [](unsigned from) {  // small; of halves next to one
    const int difference = static_cast<int>(from) - 48;
    return static_cast<T>(std::is_integral_v<T> ? 0x3c00 + difference : difference);
  };
  const std::vector<T> zeros(count);
  Weights<T> weights{dtype, zeros, zeros, zeros, zeros, zeros, {}};
  weights.words.resize(mask_words(static_cast<int64_t>(count)));
  for (size_t i = 0; i < count; ++i) {
    weights.values[i] = number(random() % 97);
    weights.gradients[i] = number(49);
    if (random() % 3 != 0) weights.words[i / 32] |= 1U << i % 32;
  }
  return weights;
}

template <typename T>
void steps(Dtype dtype) {
  Weights<T> weights = make_weights<T>(dtype, 2100);
  float step = 1.0F;
  const StepOptions common{0.1, 0.0, false, {}, {}, {}};
  expect(launch_apply_masks({weights.data()}, kSize, nullptr) == 0, "launch");
  for (const double momentum : {0.0, 0.9}) {
    expect(launch_masked_sgd({weights.data({weights.gradients.data(), weights.first.data()})},
                             {common, momentum, 0.0, false, false}, kSize, nullptr) == 0,
           "launch");
  }
  for (const bool amsgrad : {false, true}) {
    expect(launch_masked_adamw({weights.data({weights.gradients.data(), weights.first.data(),
                                              weights.second.data(), weights.third.data(), &step})},
                               {common, 0.9, 0.99, 1e-8}, amsgrad, kSize, nullptr) == 0,
           "launch");
  }
  for (size_t i = 0; i < weights.values.size(); ++i) {
    const bool alive = (weights.words[i / 32] >> i % 32 & 1) != 0;
    expect(alive || weights.values[i] == 0, "pruned weight");
  }
}

void reorder() {
  const Weights<float> weights = make_weights<float>(Dtype::float32, 5000);
  std::vector<uint32_t> reordered(weights.words.size());
  expect(launch_reorder_mask({50, 100}, {1, 50}, weights.words.data(), 5000, reordered.data(),
                             kSize, nullptr) == 0,
         "launch");
  expect(count_alive(reordered.data(), static_cast<int64_t>(reordered.size())) ==
             count_alive(weights.words.data(), static_cast<int64_t>(reordered.size())),
         "bits");
}

// The cut of two ranks' weights, each with its own histograms that are summed in between, is the
// one of all weights; then the prune of a single rank.
void selection() {
  using Floats = Weights<float>;
  Floats halves[2] = {make_weights<float>(Dtype::float32, 3000),
                      make_weights<float>(Dtype::float32, 2500)};
  constexpr int64_t kBuckets = 2049, kWanted = 1000;  // of a histogram
  std::vector<int64_t> cuts[2], histograms[2], wanted(1, kWanted), info(3);
  std::vector<Selection> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    cuts[rank].resize(cut_words() + 1);
    histograms[rank].resize(kBuckets);
    ranks.push_back({{halves[rank].data()},
                     true,
                     false,
                     cuts[rank].data(),
                     histograms[rank].data(),
                     wanted.data(),
                     info.data(),
                     kSize,
                     nullptr});
    expect(begin_selection(ranks[rank]) == 0, "launch");
  }
  for (int digit = 0; digit < digits(false); ++digit) {
    for (Selection& rank : ranks) expect(launch_histogram(rank, digit) == 0, "launch");
    for (int64_t bucket = 0; bucket < kBuckets; ++bucket) {  // the all-reduce
      histograms[0][bucket] += histograms[1][bucket];
      histograms[1][bucket] = histograms[0][bucket];
    }
    for (Selection& rank : ranks) expect(launch_choose(rank, digit) == 0, "launch");
  }
  expect(cuts[0] == cuts[1], "cut of the ranks");
  expect(info[0] == kWanted && info[1] >= kWanted && info[2] == -1, "info of the ranks");
  int64_t below = 0, equal = 0;
  float limit;
  std::memcpy(&limit, cuts[0].data(), sizeof(limit));
  for (const Floats& half : halves) {
    for (size_t i = 0; i < half.values.size(); ++i) {
      if ((half.words[i / 32] >> i % 32 & 1) == 0) continue;
      below += std::fabs(half.values[i]) < limit;
      equal += std::fabs(half.values[i]) == limit;
    }
  }
  expect(below < kWanted && kWanted <= below + equal, "cut of all weights");
}

// The shares and the prune of one tensor; its histogram at a digit that the caller chose.
template <typename T>
void prune(Dtype dtype, bool wide) {
  Weights<T> own = make_weights<T>(dtype, 2500);
  const auto alive = [&] {
    return count_alive(own.words.data(), static_cast<int64_t>(own.words.size()));
  };
  const int64_t before = alive(), prefix = 0, most = 1000;
  std::vector<int64_t> cuts(cut_words() + 1), histograms(2049), wanted(2), info(3);
  const Selection cut{{own.data()},  false,       wide,  cuts.data(), histograms.data(),
                      wanted.data(), info.data(), kSize, nullptr};
  expect(begin_at(cut, &prefix) == 0 && launch_histogram(cut, 0) == 0, "launch");
  expect(std::accumulate(histograms.begin(), histograms.end(), int64_t{0}) == before, "histogram");
  expect(launch_numbers({most, most}, wanted.data(), kSize, nullptr) == 0, "launch");
  expect(begin_selection(cut) == 0, "launch");
  for (int digit = 0; digit < digits(wide); ++digit) {
    expect(launch_histogram(cut, digit) == 0 && launch_choose(cut, digit) == 0, "launch");
  }
  std::vector<int64_t> ties(segments(cut.list[0])), totals(2), shares(1);
  expect(launch_shares(cut, totals.data(), shares.data()) == 0, "launch");
  expect(launch_clear(cut, {0}, ties.data()) == 0, "launch");
  expect(before - alive() == most && shares[0] == most, "number of pruned weights");
}

void entropies() {
  std::vector<int64_t> ledger(kLedgerHeader + 3 * 100, 5);
  double summary[16], bits[200];
  uint8_t states[200];
  ledger[kPositions] = 20;
  for (int64_t c = 0; c < 100; ++c) ledger[kLedgerHeader + 200 + c] = 0;
  expect(launch_layer_entropies(
             {{ledger.data(), 0, 100, Kind::relu}, {ledger.data(), 100, 100, Kind::gelu}}, summary,
             bits, states, kSize, nullptr) == 0,
         "launch");
  expect(summary[6] == 100 && summary[14] == 100, "entropies");
}

}  // namespace

int main() {
  constexpr uint16_t kOne = 0x3c00, kMinusOne = 0xbc00;  // half
  for (const auto& [outer, channels, inner] :
       {std::array<int64_t, 3>{3, 2, 37}, {40, 2, 9}, {300, 8, 1}, {70, 5, 1}}) {
    rectify<float>(Dtype::float32, 1.0F, -1.0F, outer, channels, inner, false);
    rectify<uint16_t>(Dtype::bfloat16, 0x3f80, 0xbf80, outer, channels, inner, false);
  }
  rectify<uint16_t>(Dtype::float16, kOne, kMinusOne, 40, 2, 9, true);
  rectify<uint16_t>(Dtype::float16, kOne, kMinusOne, 300, 8, 1, true);
  rectify<double>(Dtype::float64, 1.0, -1.0, 3, 2, 37, true);
  rectify<double>(Dtype::float64, 1.0, -1.0, 70, 4, 1, false);
  positions();
  steps<float>(Dtype::float32);
  steps<double>(Dtype::float64);
  steps<uint16_t>(Dtype::bfloat16);
  steps<uint16_t>(Dtype::float16);
  reorder();
  selection();
  prune<float>(Dtype::float32, false);
  prune<double>(Dtype::float64, true);
  prune<uint16_t>(Dtype::bfloat16, true);
  prune<uint16_t>(Dtype::float16, false);
  entropies();
  return failures == 0 ? 0 : 1;
}
