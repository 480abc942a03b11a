// Rectifiers that only look at the sign (kOnSign), on floats: 64 of them at a time, whose signs
// become 64 bytes, so that one instruction counts all of them. Part of a machine's code: see
// rectify_loops.h.
//
// A float's bits, read as an integer, have its sign, and narrowing with saturation keeps that.
// NaN has a sign too and is counted by it: whoever counts looks for NaN now and then, in what the
// rectifier has written (it keeps NaN), and takes them back: recount_nan.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/lanes.h"
#include "cpu/rectifiers.h"
#include "cpu/registers.h"

namespace layer_collapse {
namespace LC_MACHINE {

using Floats = Register::Floats;
using SignBytes = Vector<int8_t>;
inline constexpr int kGroup = 64;  // floats whose signs fill SignBytes
inline constexpr int kFloats = static_cast<int>(sizeof(Floats) / sizeof(float));
inline constexpr int kRegisters = kGroup / (4 * kFloats);  // of SignBytes

template <typename Rectifier, typename T>
inline constexpr bool kBySign = std::is_same_v<T, float> && Rectifier::kOnSign;

using Group = Floats[4];  // whose signs fill a register

LC_INLINE void load_group(Group& v, const float* x) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = Register::load(x + i * kFloats);
}

// Zero where v < 0, v itself elsewhere: also -0.0 and NaN, as in torch.relu.
LC_INLINE Floats at_least_zero(Floats v) { return Register::max(Floats{}, v); }

// 6 where v > 6, v itself elsewhere.
LC_INLINE Floats at_most_six(Floats v) { return Register::min(Floats{} + 6, v); }

// Register r of SignBytes, or a counter for all of them.
template <typename Counter>
LC_INLINE auto& register_of(Counter& counter, [[maybe_unused]] int r) {
#if defined(LC_AVX512)
  return counter;
#else
  return counter.part[r];
#endif
}
using SignRegister = std::remove_reference_t<decltype(register_of(std::declval<SignBytes&>(), 0))>;

// A byte per float: positive, zero or negative like it, but for -0.0, which is negative.
// Not in the order of the floats: column c of all registers is byte place_of(c).
LC_INLINE SignRegister signs_of(const Group& v) {
  return (SignRegister)Register::narrow16(
      Register::narrow32((Register::Bits)v[0], (Register::Bits)v[1]),
      Register::narrow32((Register::Bits)v[2], (Register::Bits)v[3]));
}

// Four bytes stay together. Register i of four leaves its part p of four floats in part p of the
// bytes, as the i-th of four.
constexpr int place_of(int column) {
  const int in_four = column % (4 * kFloats), i = in_four / kFloats, part = in_four % kFloats / 4;
  return column - in_four + 16 * part + 4 * i + column % 4;
}

// SignBytes, or counters of them, in the order of the columns.
LC_INLINE SignBytes in_column_order(SignBytes bytes) {
  typedef int32_t Fours __attribute__((vector_size(64 / kRegisters)));
  constexpr int kFours = 16 / kRegisters;
  Fours from{};
  for (int i = 0; i < kFours; ++i) from[i] = place_of(4 * i) / 4;
  return each_part(bytes, [&](auto part) __attribute__((always_inline)) {
    return __builtin_shuffle((Fours)part, from);
  });
}

// A counter is a byte per column, or one number for all of them. The number costs more per group,
// but is a sum already: better for planes of few groups.
#if defined(LC_AVX512)
inline constexpr int64_t kFewGroups = 1;

LC_INLINE __mmask64 is_positive(SignRegister signs) {
  return _mm512_cmpgt_epi8_mask((__m512i)signs, _mm512_setzero_si512());
}
LC_INLINE __mmask64 is_negative(SignRegister signs) { return _mm512_movepi8_mask((__m512i)signs); }

LC_INLINE void count(SignBytes& counter, __mmask64 holds) {
  const auto counted = (__m512i)counter;
  counter = (SignBytes)_mm512_mask_add_epi8(counted, holds, counted, _mm512_set1_epi8(1));
}
LC_INLINE void count(int64_t& counter, __mmask64 holds) { counter += __builtin_popcountll(holds); }
#else
inline constexpr int64_t kFewGroups = 0;

LC_INLINE SignRegister is_positive(SignRegister signs) { return signs > 0; }
LC_INLINE SignRegister is_negative(SignRegister signs) { return signs < 0; }

LC_INLINE void count(SignRegister& counter, SignRegister holds) { counter -= holds; }
#endif

// Of the 8 bytes of every 64-bit lane.
LC_INLINE Lanes<double>::Words byte_sums(SignBytes bytes) {
  return bits_as<Lanes<double>::Words>(
      each_part(bytes, [](auto part) __attribute__((always_inline)) {
        return Register::byte_sums((Register::Bits)part);
      }));
}

// Remembers whether a NaN came by.
class NanWatch {
 public:
#if defined(LC_AVX512)
  LC_INLINE void see(const Group& v) {
    first_ = _mm512_mask_cmp_ps_mask(first_, (__m512)v[0], (__m512)v[1], _CMP_ORD_Q);
    second_ = _mm512_mask_cmp_ps_mask(second_, (__m512)v[2], (__m512)v[3], _CMP_ORD_Q);
  }
  LC_INLINE bool saw_nan() const { return (first_ & second_) != 0xFFFF; }

 private:
  __mmask16 first_ = 0xFFFF, second_ = 0xFFFF;
#else
  LC_INLINE void see(const Group& v) {
    // Two registers by one comparison.
    unordered_ |= (Bits)Register::unordered(v[0], v[1]) | (Bits)Register::unordered(v[2], v[3]);
  }
  LC_INLINE bool saw_nan() const {
    int64_t any = 0;
    for (size_t i = 0; i < sizeof(Bits) / sizeof(int64_t); ++i) any |= unordered_[i];
    return any != 0;
  }

 private:
  typedef int64_t Bits __attribute__((vector_size(sizeof(Floats))));
  Bits unordered_{};
#endif
};

// Counters of 64 columns, or of one plane. Bytes count at most 255 groups. rows[kNan] is not
// used: NaN are taken back later.
template <typename Rectifier, typename Counter = SignBytes>
struct SignTally {
  static constexpr int kRows = count_rows(Rectifier::kind);
  Counter rows[kRows] = {};

  // The next 64 floats: x into y, which may be x.
  LC_INLINE void add(const float* x, float* y, NanWatch& watch) {
    // Stored as soon as may be: what waits for all 64 would not fit the registers.
#pragma GCC unroll 4
    for (int r = 0; r < kRegisters; ++r, x += 4 * kFloats, y += 4 * kFloats) {
      Group v, out;
      load_group(v, x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        out[i] = at_least_zero(v[i]);
        if constexpr (Rectifier::kind == Kind::relu6) out[i] = at_most_six(out[i]);
        if constexpr (kWrites<Rectifier>) Register::store(y + i * kFloats, out[i]);
        // What was cut off; or the number itself, with 0.0 in the place of -0.0.
        v[i] = Rectifier::kind == Kind::relu6 ? v[i] - out[i] : v[i] + Floats{};
      }
      if constexpr (Rectifier::kind == Kind::relu6) {
        count(register_of(rows[kPositive], r), is_positive(signs_of(out)));
      }
      watch.see(v);
      const SignRegister signs = signs_of(v);
      constexpr int kAbove = Rectifier::kind == Kind::relu6 ? kExtra : kPositive;
      count(register_of(rows[kAbove], r), is_positive(signs));
      count(register_of(rows[kNegative], r), is_negative(signs));
    }
  }

  // The same for n < 64 floats. Zeros count nowhere, so they may follow.
  LC_INLINE void add_part(const float* x, float* y, int64_t n, NanWatch& watch) {
    alignas(64) float padded[kGroup] = {};
    std::memcpy(padded, x, n * sizeof(float));
    add(padded, padded, watch);
    if constexpr (kWrites<Rectifier>) std::memcpy(y, padded, n * sizeof(float));
  }

  // From and to memory: one counter of all columns after the other, `stride` bytes apart.
  LC_INLINE void load_from(const uint8_t* bytes, int64_t stride) {
    for (int row = 0; row < kRows; ++row) {
      if (row != kNan) rows[row] = load<SignBytes>(bytes + row * stride);
    }
  }
  LC_INLINE void store_to(uint8_t* bytes, int64_t stride) const {
    for (int row = 0; row < kRows; ++row) {
      if (row != kNan) store(bytes + row * stride, rows[row]);
    }
  }

  // Adds the sums over all columns to counts [kRows], `stride` apart.
  LC_INLINE void sum_into(int64_t* counts, int64_t stride) const {
    if constexpr (std::is_same_v<Counter, int64_t>) {
      for (int row = 0; row < kRows; ++row) counts[row * stride] += rows[row];
    } else {
      sum_bytes_into(counts, stride);
    }
  }

 private:
  LC_INLINE void sum_bytes_into(int64_t* counts, int64_t stride) const {
    constexpr int kWidth = 21;  // bits that hold the largest sum: three of them in one word
    auto sums = byte_sums(rows[kPositive]) + (byte_sums(rows[kNegative]) << kWidth);
    if constexpr (kRows > 3) sums += byte_sums(rows[kExtra]) << (2 * kWidth);
    const auto sum = static_cast<uint64_t>(sum_lanes<double>(bits_as<Lanes<double>::Mask>(sums)));
    constexpr uint64_t kOne = (uint64_t{1} << kWidth) - 1;
    counts[kPositive * stride] += static_cast<int64_t>(sum & kOne);
    counts[kNegative * stride] += static_cast<int64_t>(sum >> kWidth & kOne);
    if constexpr (kRows > 3) counts[kExtra * stride] += static_cast<int64_t>(sum >> (2 * kWidth));
  }
};

// found(i, is_negative) for every NaN of floats [n].
template <typename Found>
void find_nan(const float* floats, int64_t n, const Found& found) {
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t end = std::min(n, first + kGroup);
    if (end - first == kGroup) {
      Group v;
      NanWatch watch;
      for (int r = 0; r < kRegisters; ++r) {
        load_group(v, floats + first + 4 * r * kFloats);
        watch.see(v);
      }
      if (!watch.saw_nan()) continue;
    }
    for (int64_t i = first; i < end; ++i) {
      if (floats[i] != floats[i]) found(i, std::signbit(floats[i]));
    }
  }
}

// Moves a NaN from the counters that its sign has chosen to that of NaN. row(r) is counter r.
template <typename Rectifier, typename Row>
LC_INLINE void recount_nan(bool negative, const Row& row) {
  ++row(kNan);
  --row(negative ? kNegative : kPositive);
  if (Rectifier::kind == Kind::relu6 && !negative) --row(kExtra);
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
