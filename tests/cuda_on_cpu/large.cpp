// What address space alone can test. Tensors of more than 2^32 elements, which no test machine
// could fill: their memory is reserved, and of every grid only the blocks at either end run.
// What lies at the ends must be found there; a place that overflowed would be outside of the
// reservation, or wrong. And tensors that must not be touched: their memory can be neither read nor
// written.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/bitmask.h"
#include "cuda/magnitude_select.h"
#include "cuda/masked_step.h"
#include "cuda/rectify.h"
#include "cuda_on_cpu.h"

namespace {

using namespace layer_collapse;

constexpr int kSize = 256;
constexpr uint16_t kOne = 0x3f80, kMinusOne = 0xbf80;  // bfloat16
int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "large: wrong %s\n", what);
  ++failures;
}

// Zeros that take memory only where they are written, or with PROT_NONE what ends the process when
// it is read or written.
template <typename T>
struct Reserved {
  explicit Reserved(int64_t count, int access = PROT_READ | PROT_WRITE)
      : bytes(static_cast<size_t>(count) * sizeof(T)) {
    void* memory = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("large: no address space");
      std::exit(2);
    }
    data = static_cast<T*>(memory);
  }
  ~Reserved() { munmap(data, bytes); }
  Reserved(const Reserved&) = delete;

  size_t bytes;
  T* data;
};

// In place, with -1 in the first and the last 40 values of the tensor.
void rectify(int64_t outer, int64_t channels, int64_t inner) {
  const int64_t count = outer * channels * inner;
  Reserved<uint16_t> x(count);
  for (int64_t i = 0; i < 40; ++i) x.data[i] = x.data[count - 1 - i] = kMinusOne;
  std::vector<int64_t> ledger(kLedgerHeader + 3 * channels);
  ledger[kFlags] = kCount;
  const RectifyLaunch call{x.data, x.data,   ledger.data(), nullptr,         nullptr,    0.0,
                           outer,  channels, inner,         Dtype::bfloat16, Kind::relu, kSize};
  expect(launch_rectify(call, nullptr) == 0, "launch of rectify");
  int64_t negative = 0;
  for (int64_t c = 0; c < channels; ++c) negative += ledger[kLedgerHeader + channels + c];
  expect(negative == 80, "counts of rectify");
  expect(ledger[kPositions] == outer * inner, "positions of rectify");
  for (int64_t i = 0; i < 40; ++i) {
    expect(x.data[i] == 0 && x.data[count - 1 - i] == 0, "output of rectify");
  }
}

// More planes than a grid has blocks: refused, nothing is touched.
void too_many_blocks() {
  uint16_t x = kMinusOne;
  const RectifyLaunch call{&x,         &x,   nullptr,          nullptr, nullptr,
                           0.0,        1,    int64_t{1} << 33, 2,       Dtype::bfloat16,
                           Kind::relu, kSize};
  expect(launch_rectify(call, nullptr) == 9 && x == kMinusOne, "answer to too many blocks");
}

// The harness itself: a launch that an op did not put on its stream is refused.
void another_stream() {
  uint16_t x = kMinusOne;
  const RectifyLaunch call{&x, &x, nullptr, nullptr,         nullptr,    0.0,
                           1,  1,  1,       Dtype::bfloat16, Kind::relu, kSize};
  expect(launch_rectify(call, &x) == 400 && x == kMinusOne, "answer to another stream");
}

constexpr int64_t kWeights = (int64_t{1} << 32) + 77;

void steps() {
  Reserved<uint16_t> weights(kWeights), gradients(kWeights), first(kWeights), second(kWeights);
  float number = 1.0F;
  const StepOptions common{1.0, 0.0, false, {}, {}, {}};
  const auto at_ends = [&](auto check) {
    for (int64_t i = 0; i < 20; ++i) check(i), check(kWeights - 1 - i);
  };
  at_ends([&](int64_t i) { gradients.data[i] = kOne; });
  const std::vector<void*> data{weights.data, gradients.data, first.data};
  expect(launch_masked_sgd({{Dtype::bfloat16, kWeights, nullptr, data}},
                           {common, 0.5, 0.0, false, false}, kSize, nullptr) == 0,
         "launch of sgd");
  at_ends([&](int64_t i) {
    expect(weights.data[i] == kMinusOne && first.data[i] == kOne, "step of sgd");
    weights.data[i] = first.data[i] = 0;
  });
  const std::vector<void*> more{weights.data, gradients.data, first.data,
                                second.data,  nullptr,        &number};
  expect(launch_masked_adamw({{Dtype::bfloat16, kWeights, nullptr, more}}, {common, 0.5, 0.5, 0.0},
                             false, kSize, nullptr) == 0,
         "launch of adamw");
  at_ends([&](int64_t i) { expect(weights.data[i] == kMinusOne, "step of adamw"); });
  Reserved<uint32_t> words(mask_words(kWeights));  // all pruned
  expect(launch_apply_masks({{Dtype::bfloat16, kWeights, words.data, {weights.data}}}, kSize,
                            nullptr) == 0,
         "launch of masks");
  at_ends([&](int64_t i) { expect(weights.data[i] == 0, "masked weight"); });
}

// The mask of a transposed tensor: bits 0 and -1 stay there, bit 1 goes half the tensor away.
void reorder() {
  constexpr int64_t kRows = (int64_t{1} << 31) + 3;
  const int64_t count = mask_words(2 * kRows);
  Reserved<uint32_t> words(count), reordered(count);
  words.data[0] = 3;
  const int64_t last = 2 * kRows - 1;
  words.data[last / 32] |= 1U << last % 32;
  expect(launch_reorder_mask({2, kRows}, {1, 2}, words.data, 2 * kRows, reordered.data, kSize,
                             nullptr) == 0,
         "launch of order");
  expect(reordered.data[0] == 1, "first word");
  expect(reordered.data[last / 32] >> last % 32 == 1, "last word");
}

// Among 2^31 weights of which the first and last 20 are alive, the 10 smallest are the last ones.
void selection() {
  constexpr int64_t kCount = (int64_t{1} << 31) + 77;
  Reserved<uint16_t> weights(kCount);
  Reserved<uint32_t> words(mask_words(kCount));
  for (int64_t i = 0; i < 20; ++i) {
    for (const int64_t place : {i, kCount - 1 - i}) {
      words.data[place / 32] |= 1U << place % 32;
      weights.data[place] = place == i ? kOne + 1 : kMinusOne;
    }
  }
  std::vector<int64_t> cuts(cut_words() + 1), histograms(2049), wanted{10}, info(3);
  const MaskedData data{Dtype::bfloat16, kCount, words.data, {weights.data}};
  Reserved<int64_t> ties(segments(data));
  const Selection cut{{data},        false,       false, cuts.data(), histograms.data(),
                      wanted.data(), info.data(), kSize, nullptr};
  expect(begin_selection(cut) == 0, "launch of a selection");
  for (int digit = 0; digit < digits(false); ++digit) {
    expect(launch_histogram(cut, digit) == 0 && launch_choose(cut, digit) == 0, "launch of digits");
  }
  expect(info[1] == 40 && info[2] == -1, "number of alive weights");
  std::vector<int64_t> totals(2), shares(1);
  expect(launch_shares(cut, totals.data(), shares.data()) == 0 && shares[0] == 10, "shares");
  expect(launch_clear(cut, {0}, ties.data) == 0, "launch of clear");
  int64_t left = 0;
  for (int64_t i = 0; i < 20; ++i) {
    const int64_t place = kCount - 1 - i;
    const bool alive = (words.data[place / 32] >> place % 32 & 1) != 0;
    expect(alive == (i < 10), "pruned weight");
    left += (words.data[i / 32] >> i % 32 & 1) != 0;
  }
  expect(left == 20, "weights that stay");
}

// Weights, gradients and state whose mask words are all zero are neither read nor written, wherever
// they lie within 16 bytes; the last word is not a whole one.
void dead_words(Dtype dtype, int64_t size) {
  constexpr int64_t kCount = 3 * 64 * 1024 + 7;
  for (const int64_t offset : {int64_t{0}, size}) {
    Reserved<char> forbidden(kCount * size + offset, PROT_NONE);
    const std::vector<uint32_t> words(mask_words(kCount));
    void* const data = forbidden.data + offset;
    float number = 1.0F;
    const StepOptions common{1.0, 0.1, false, {}, {}, {}};
    const MaskedData all{dtype, kCount, words.data(), {data, data, data, data, data, &number}};
    MaskedData three = all, one = all;
    three.data.resize(3);
    one.data.resize(1);
    for (const double momentum : {0.0, 0.5}) {
      expect(launch_masked_sgd({three}, {common, momentum, 0.0, false, false}, kSize, nullptr) == 0,
             "launch of sgd");
    }
    for (const bool amsgrad : {false, true}) {
      expect(launch_masked_adamw({all}, {common, 0.5, 0.5, 0.0}, amsgrad, kSize, nullptr) == 0,
             "launch of adamw");
    }
    const bool wide = dtype == Dtype::float64;
    std::vector<int64_t> cuts(cut_words() + 1), histograms(2049, 1);
    const int64_t prefix = 0;
    const Selection selection{{one},   false,   wide,  cuts.data(), histograms.data(),
                              nullptr, nullptr, kSize, nullptr};
    expect(begin_at(selection, &prefix) == 0 && launch_histogram(selection, 0) == 0,
           "launch of a histogram");
    for (const int64_t count : histograms) expect(count == 0, "histogram of no weight");
  }
}

}  // namespace

int main() {
  dead_words(Dtype::float32, 4);
  dead_words(Dtype::float64, 8);
  dead_words(Dtype::bfloat16, 2);
  dead_words(Dtype::float16, 2);
  cuda_on_cpu::ends = 2;
  rectify(3, 2, (int64_t{1} << 30) + 105);
  rectify(int64_t{3} << 30, 2, 3);
  rectify((int64_t{1} << 22) + 3, 1024, 1);
  too_many_blocks();
  another_stream();
  steps();
  cuda_on_cpu::ends = 1;  // its blocks walk the whole mask
  reorder();
  selection();
  return failures == 0 ? 0 : 1;
}
