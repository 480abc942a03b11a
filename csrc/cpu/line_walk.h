// Takes a rule (masked_rules.h) over the cache lines that ask for work, and asks for their memory
// ahead of time. Part of a machine's code: see masked_run.h.
//
// A step does a few operations per number, so it waits for memory most of the time, and the
// hardware's prefetchers follow neither the gaps of a sparse mask nor four tensors at once well.
// So the lines to work on are found kAhead lines early from the mask alone, 64 at a time, without
// a branch per line, as those would be random. Such a span is as long as a page of memory, and on a
// sparse mask finding the pages takes longer than reading from them: see kSpansAhead.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "core/bitmask.h"
#include "cpu/dispatch.h"

namespace layer_collapse {
namespace LC_MACHINE {

inline constexpr int64_t kLineBytes = 64;
inline constexpr int64_t kSpanLines = 64;

template <typename Weight>
inline constexpr int64_t line_weights = kLineBytes / sizeof(Weight);

// The distance at which the steps were fastest: 16 is slower than no request at all.
inline constexpr uint32_t kAhead = 64;

inline constexpr int64_t kMaskAhead = 1024;  // words

// Of a sparse span the line that lies this many spans further on is asked for too, needed or not.
// Lines a page apart are what a stride prefetcher follows, and it looks up the pages to come while
// the loop works: twice as fast at 99 % sparsity. Asking for lines at random places does not do it,
// however early.
inline constexpr int64_t kSpansAhead = 8;

// With so many lines of a span to work on, reading it whole is faster than leaving some out.
inline constexpr int kCrowded = 24;

// Bit l: line l of words[count] holds a weight that is not idle; count words are at most a span.
template <typename Weight, uint32_t kIdle>
LC_INLINE uint64_t busy_lines(const uint32_t* words, int64_t count) {
  constexpr int64_t kLine = line_weights<Weight>;
  constexpr int64_t kParts = kWordBits / kLine;
  uint64_t busy = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t parts = 0;
    for (int64_t part = 0; part < kParts; ++part) {
      const uint32_t bits = ((words[i] ^ kIdle) >> (part * kLine)) & full_word(kLine);
      parts |= uint32_t{bits != 0} << part;
    }
    busy |= uint64_t{parts} << (i * kParts);
  }
  return busy;
}

// Words first .. last of a tensor of `numel` weights; words[0] is word number `first`, nullptr
// means that all weights are alive. The rule comes by value: a local copy cannot alias the weights,
// so its numbers stay in registers.
template <typename Rule>
LC_INLINE void walk_lines(Rule rule, const uint32_t* words, int64_t first, int64_t last,
                          int64_t numel) {
  using Weight = typename Rule::Weight;
  constexpr int64_t kLine = line_weights<Weight>;
  constexpr int64_t kParts = kWordBits / kLine;
  constexpr int64_t kSpan = kSpanLines / kParts;  // words
  if (words == nullptr && Rule::kIdle != 0) return;

  const auto work = [&](int64_t line) __attribute__((always_inline)) {
    const int64_t base = line * kLine;
    const uint32_t word = words ? words[base / kWordBits - first] : ~uint32_t{0};
    const uint32_t bits = word >> (base % kWordBits);
    if (numel - base >= kLine) {
      rule.block(base, kLine, bits);  // a trip count that the compiler knows
    } else {
      for (int64_t j = 0; j < numel - base; ++j) rule.block(base + j, 1, bits >> j);
    }
  };
  // All lines of a span: no list of them, and the loops run over a word's weights at once.
  const auto work_on_all = [&](int64_t begin) __attribute__((always_inline)) {
    for (int64_t word = begin; word < begin + kSpan; ++word) {
      const int64_t base = word * kWordBits;
      for (int64_t line = 0; line < kParts; ++line) rule.prefetch(base + (kAhead + line) * kLine);
      const uint32_t bits = words ? words[word - first] : ~uint32_t{0};
      if (bits == ~uint32_t{0}) {
        rule.block(base, kWordBits, ~uint32_t{0});  // the compiler leaves the masking out
      } else {
        rule.block(base, kWordBits, bits);
      }
    }
  };
  std::array<int64_t, kAhead> requested;  // a ring of lines whose memory is on its way
  uint32_t found = 0;
  for (int64_t begin = first; begin < last; begin += kSpan) {
    const int64_t count = std::min(kSpan, last - begin);
    uint64_t busy = ~uint64_t{0};
    if (words != nullptr) {
      const uint32_t* span = words + (begin - first);
      for (int64_t i = 0; i < kSpan; i += kLineBytes / sizeof(uint32_t)) {
        __builtin_prefetch(span + kMaskAhead + i);
      }
      busy = count == kSpan ? busy_lines<Weight, Rule::kIdle>(span, kSpan)
                            : busy_lines<Weight, Rule::kIdle>(span, count);
      if (std::popcount(busy) >= kCrowded) busy = ~uint64_t{0};
    }
    const int64_t lines =
        (std::min((begin + count) * kWordBits, numel) - begin * kWordBits + kLine - 1) / kLine;
    if (~busy == 0 && lines == kSpanLines) {
      work_on_all(begin);
      continue;
    }
    busy &= ~uint64_t{0} >> (kSpanLines - lines);
    if (busy != 0) rule.prefetch((begin + kSpansAhead * kSpan) * kWordBits);
    for (; busy != 0; busy &= busy - 1) {
      const int64_t line = begin * kParts + std::countr_zero(busy);
      rule.prefetch(line * kLine);
      int64_t& place = requested[found % kAhead];
      if (found >= kAhead) work(place);
      place = line;
      ++found;
    }
  }
  for (uint32_t done = found - std::min(found, kAhead); done < found; ++done) {
    work(requested[done % kAhead]);
  }
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
