// Small cases of every kernel with a thread of the operating system per CUDA thread, two blocks at
// a time, for ThreadSanitizer. Exits with 0 if the results are right; the sanitiser tells of races.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
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

template <typename T>
void rectify(Dtype dtype, T one, T minus_one, int64_t outer, int64_t channels, int64_t inner) {
  for (const Kind kind : {Kind::relu, Kind::relu6, Kind::leaky_relu, Kind::hardswish, Kind::gelu}) {
    std::vector<T> x(outer * channels * inner), y(x.size());
    int64_t positive = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const bool up = i * 7 % 3 == 0;
      x[i] = up ? one : minus_one;
      positive += up;
    }
    std::vector<int64_t> ledger(kLedgerHeader + count_rows(kind) * channels, 0);
    ledger[kFlags] = kCount | kLive;
    const RectifyLaunch call{x.data(), y.data(), ledger.data(), nullptr, nullptr, 0.5,
                             outer,    channels, inner,         dtype,   kind,    kSize};
    expect(launch_rectify(call, nullptr) == 0, "launch");
    int64_t counted = 0, negative = 0;
    for (int64_t c = 0; c < channels; ++c) {
      counted += ledger[kLedgerHeader + c];
      negative += ledger[kLedgerHeader + channels + c];
    }
    expect(counted == positive && negative == outer * channels * inner - positive, "counts");
    expect(ledger[kPositions] == outer * inner && ledger[kTicket] == 0, "header");
    expect(ledger[kLiveMixed] > 0, "live words");
  }
}

// What a case of the list kernels works on.
struct Weights {
  std::vector<float> values, gradients, first, second;
  std::vector<uint32_t> words;
  MaskedData data(bool adam, float* step) {
    std::vector<void*> pointers{values.data(), gradients.data(), first.data()};
    if (adam) pointers.insert(pointers.end(), {second.data(), nullptr, step});
    return {Dtype::float32, static_cast<int64_t>(values.size()), words.data(), pointers};
  }
};

Weights make_weights(size_t count) {
  std::mt19937 random(7);
  Weights weights{std::vector<float>(count), std::vector<float>(count, 1.0F),
                  std::vector<float>(count), std::vector<float>(count),
                  std::vector<uint32_t>(mask_words(static_cast<int64_t>(count)))};
  for (size_t i = 0; i < count; ++i) {
    weights.values[i] = static_cast<float>(random() % 97) - 48.0F;
    if (random() % 3 != 0) weights.words[i / 32] |= 1U << i % 32;
  }
  return weights;
}

void steps() {
  Weights weights = make_weights(5000);
  float step = 1.0F;
  const StepOptions common{0.1, 0.0, false, {}, {}, {}};
  expect(launch_apply_masks({{Dtype::float32, 5000, weights.words.data(), {weights.values.data()}}},
                            kSize, nullptr) == 0,
         "launch");
  expect(launch_masked_sgd({weights.data(false, nullptr)}, {common, 0.9, 0.0, false, false}, kSize,
                           nullptr) == 0,
         "launch");
  expect(launch_masked_adamw({weights.data(true, &step)}, {common, 0.9, 0.99, 1e-8}, false, kSize,
                             nullptr) == 0,
         "launch");
  for (size_t i = 0; i < weights.values.size(); ++i) {
    const bool alive = (weights.words[i / 32] >> i % 32 & 1) != 0;
    expect(alive || weights.values[i] == 0, "pruned weight");
  }
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
  Weights halves[2] = {make_weights(3000), make_weights(2500)};
  constexpr int64_t kBuckets = 2049, kWanted = 1000;  // of a histogram
  std::vector<int64_t> cuts[2], histograms[2], wanted(1, kWanted), info(3);
  std::vector<Selection> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    cuts[rank].resize(cut_words() + 1);
    histograms[rank].resize(kBuckets);
    ranks.push_back({{halves[rank].data(false, nullptr)},
                     true,
                     false,
                     cuts[rank].data(),
                     histograms[rank].data(),
                     wanted.data(),
                     info.data(),
                     kSize,
                     nullptr});
    ranks[rank].list[0].data.resize(1);
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
  for (const Weights& half : halves) {
    for (size_t i = 0; i < half.values.size(); ++i) {
      if ((half.words[i / 32] >> i % 32 & 1) == 0) continue;
      below += std::fabs(half.values[i]) < limit;
      equal += std::fabs(half.values[i]) == limit;
    }
  }
  expect(below < kWanted && kWanted <= below + equal, "cut of all weights");

  Weights own = make_weights(9000);
  const int64_t before = count_alive(own.words.data(), static_cast<int64_t>(own.words.size()));
  Selection prune{{own.data(false, nullptr)},
                  false,
                  false,
                  cuts[0].data(),
                  histograms[0].data(),
                  wanted.data(),
                  info.data(),
                  kSize,
                  nullptr};
  prune.list[0].data.resize(1);
  expect(begin_selection(prune) == 0, "launch");
  for (int digit = 0; digit < digits(false); ++digit) {
    expect(launch_histogram(prune, digit) == 0 && launch_choose(prune, digit) == 0, "launch");
  }
  std::vector<int64_t> ties(segments(prune.list[0])), totals(2), shares(1);
  expect(launch_shares(prune, totals.data(), shares.data()) == 0, "launch");
  expect(launch_clear(prune, {0}, ties.data()) == 0, "launch");
  const int64_t after = count_alive(own.words.data(), static_cast<int64_t>(own.words.size()));
  expect(before - after == kWanted && shares[0] == kWanted, "number of pruned weights");
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
  for (const auto& [outer, channels, inner] :
       {std::array<int64_t, 3>{3, 2, 37}, {40, 2, 9}, {300, 8, 1}, {70, 5, 1}}) {
    rectify<float>(Dtype::float32, 1.0F, -1.0F, outer, channels, inner);
    rectify<uint16_t>(Dtype::bfloat16, 0x3f80, 0xbf80, outer, channels, inner);
  }
  steps();
  selection();
  entropies();
  return failures == 0 ? 0 : 1;
}
