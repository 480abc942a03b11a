// half and bfloat16, single and in pairs, with the CUDA functions that the kernels call on them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>

namespace cuda_on_cpu {

// Bits of a 16-bit number; Number (of torch's headers) knows how they read.
template <typename Number>
struct Single {
  uint16_t bits;
  float wide() const { return static_cast<float>(Number(bits, Number::from_bits())); }
  static Single of(float value) { return {Number(value).x}; }
};

template <typename Number>
struct alignas(4) Pair {
  Single<Number> low, high;

  template <typename Function>
  Pair map(const Function& function) const {
    return {function(low), function(high)};
  }
  template <typename Function>
  static Pair zip(Pair a, Pair b, const Function& function) {
    return {function(a.low, b.low), function(a.high, b.high)};
  }
  // 0xffff in the place of each value for which `holds`
  template <typename Holds>
  static uint32_t mask(Pair a, Pair b, const Holds& holds) {
    return (holds(a.low.wide(), b.low.wide()) ? 0xffffU : 0U) |
           (holds(a.high.wide(), b.high.wide()) ? 0xffff0000U : 0U);
  }
};

// The PTX rules of min and max: -0.0 lies below 0.0; of NaN and a number the number, or with `nan`
// the canonical NaN.
template <typename Number>
Single<Number> extreme(Single<Number> a, Single<Number> b, bool largest, bool nan) {
  const float x = a.wide(), y = b.wide();
  constexpr Single<Number> kNan{0x7fff};
  if (std::isnan(x) || std::isnan(y)) {
    if (nan || (std::isnan(x) && std::isnan(y))) return kNan;
    return std::isnan(x) ? b : a;
  }
  const bool a_below = x < y || (x == y && std::signbit(x) && !std::signbit(y));
  return a_below == largest ? b : a;
}

}  // namespace cuda_on_cpu

using __half = cuda_on_cpu::Single<torch::headeronly::Half>;
using __nv_bfloat16 = cuda_on_cpu::Single<torch::headeronly::BFloat16>;
using __half2 = cuda_on_cpu::Pair<torch::headeronly::Half>;
using __nv_bfloat162 = cuda_on_cpu::Pair<torch::headeronly::BFloat16>;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float __half2float(__half v) { return v.wide(); }
inline float __bfloat162float(__nv_bfloat16 v) { return v.wide(); }
inline __half __float2half_rn(float v) { return __half::of(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16::of(v); }
inline __half2 __float2half2_rn(float v) { return {__half::of(v), __half::of(v)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float v) {
  return {__nv_bfloat16::of(v), __nv_bfloat16::of(v)};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__half::of(a), __half::of(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16::of(a), __nv_bfloat16::of(b)};
}
inline float2 __half22float2(__half2 v) { return {v.low.wide(), v.high.wide()}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.low.wide(), v.high.wide()}; }

template <typename Number>
uint32_t __hgt2_mask(cuda_on_cpu::Pair<Number> a, cuda_on_cpu::Pair<Number> b) {
  return cuda_on_cpu::Pair<Number>::mask(a, b, [](float x, float y) { return x > y; });
}
template <typename Number>
uint32_t __hneu2_mask(cuda_on_cpu::Pair<Number> a, cuda_on_cpu::Pair<Number> b) {
  return cuda_on_cpu::Pair<Number>::mask(a, b, [](float x, float y) { return !(x == y); });
}
template <typename Number>
cuda_on_cpu::Pair<Number> __habs2(cuda_on_cpu::Pair<Number> v) {
  using Value = cuda_on_cpu::Single<Number>;
  return v.map([](Value x) { return Value{static_cast<uint16_t>(x.bits & 0x7fff)}; });
}
template <typename Number>
cuda_on_cpu::Pair<Number> __hmin2(cuda_on_cpu::Pair<Number> a, cuda_on_cpu::Pair<Number> b) {
  return a.zip(a, b, [](auto x, auto y) { return cuda_on_cpu::extreme(x, y, false, false); });
}
template <typename Number>
cuda_on_cpu::Pair<Number> __hmax2(cuda_on_cpu::Pair<Number> a, cuda_on_cpu::Pair<Number> b) {
  return a.zip(a, b, [](auto x, auto y) { return cuda_on_cpu::extreme(x, y, true, false); });
}
template <typename Number>
cuda_on_cpu::Pair<Number> __hmax2_nan(cuda_on_cpu::Pair<Number> a, cuda_on_cpu::Pair<Number> b) {
  return a.zip(a, b, [](auto x, auto y) { return cuda_on_cpu::extreme(x, y, true, true); });
}
