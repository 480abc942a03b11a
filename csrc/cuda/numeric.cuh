// One arithmetic interface over float, double, half and bfloat16. Values are handled in packs: one
// float or double, or a pair of halves in one register, handled at once.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace layer_collapse {

// Pack: what T is handled in; kPack: its values; Real: what arithmetic on T is done in.
template <typename T>
struct Numeric {
  using Pack = T;
  using Real = T;
  static constexpr int kPack = 1;
};
template <>
struct Numeric<Half> {
  using Pack = __half2;
  using Real = float;
  static constexpr int kPack = 2;
};
template <>
struct Numeric<BFloat16> {
  using Pack = __nv_bfloat162;
  using Real = float;
  static constexpr int kPack = 2;
};

// Whether a pack is counted by ones rather than by masks (cuda/marks.cuh).
template <typename Pack>
inline constexpr bool kOnes =
    std::is_same_v<Pack, float> || (LC_BFLOAT16 < 2 && std::is_same_v<Pack, __nv_bfloat162>);

// f of the values of two pairs, each exact as a float, whose upper half it is; f must give one of
// its arguments, or ones or zeros in all of its bits.
template <typename Function>
__device__ __forceinline__ __nv_bfloat162 by_floats(__nv_bfloat162 a, __nv_bfloat162 b,
                                                    const Function& f) {
  const uint32_t x = bits_as<uint32_t>(a), y = bits_as<uint32_t>(b);
  const float low = f(bits_as<float>(x << 16), bits_as<float>(y << 16));
  const float high = f(bits_as<float>(x & 0xffff0000U), bits_as<float>(y & 0xffff0000U));
  return bits_as<__nv_bfloat162>(bits_as<uint32_t>(low) >> 16 |
                                 (bits_as<uint32_t>(high) & 0xffff0000U));
}

// Minimum, maximum and magnitude of packs; of NaN and a number the number; -0.0 lies below 0.0.
__device__ __forceinline__ float least(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float largest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }
__device__ __forceinline__ double magnitude(double v) { return fabs(v); }
template <typename Pair>
__device__ __forceinline__ Pair magnitude(Pair v) {
  return bits_as<Pair>(bits_as<uint32_t>(v) & 0x7fff7fffU);
}
__device__ __forceinline__ __nv_bfloat162 least(__nv_bfloat162 a, __nv_bfloat162 b) {
#if LC_BFLOAT16 == 0
  return by_floats(a, b, [](float x, float y) { return fminf(x, y); });
#else
  return __hmin2(a, b);
#endif
}
__device__ __forceinline__ __nv_bfloat162 largest(__nv_bfloat162 a, __nv_bfloat162 b) {
#if LC_BFLOAT16 == 0
  return by_floats(a, b, [](float x, float y) { return fmaxf(x, y); });
#else
  return __hmax2(a, b);
#endif
}

// A value in every place of a pack.
template <typename Pack>
__device__ __forceinline__ Pack filled(float value) {
  if constexpr (std::is_same_v<Pack, __half2>) {
    return __float2half2_rn(value);
  } else if constexpr (std::is_same_v<Pack, __nv_bfloat162>) {
    return __float2bfloat162_rn(value);
  } else {
    return static_cast<Pack>(value);
  }
}

// The mask of left > right, NaN being neither; of v != v.
template <typename Pack>
__device__ __forceinline__ uint32_t greater(Pack left, Pack right) {
  if constexpr (sizeof(Pack) == sizeof(double)) {
    return left > right ? ~0U : 0U;
  } else if constexpr (LC_BFLOAT16 == 0 && std::is_same_v<Pack, __nv_bfloat162>) {
    const auto larger = [](float x, float y) { return bits_as<float>(x > y ? ~0U : 0U); };
    return bits_as<uint32_t>(by_floats(left, right, larger));
  } else {
    return __hgt2_mask(left, right);
  }
}
template <typename Pack>
__device__ __forceinline__ uint32_t is_nan(Pack v) {
  if constexpr (sizeof(Pack) == sizeof(double)) {
    return v != v ? ~0U : 0U;
  } else {
    return __hneu2_mask(v, v);
  }
}

// Ones of v != 0 (NaN is not 0), for v > 0, 0.0 (not -0.0) or NaN: the smallest positive number has
// the bits 1.
template <typename Pack>
__device__ __forceinline__ uint32_t ones_of(Pack v) {
  const uint32_t smallest = std::is_same_v<Pack, float> ? 1U : 0x00010001U;
  return bits_as<uint32_t>(least(v, bits_as<Pack>(smallest)));
}

// The larger of v and 0.0, or NaN. -0.0 becomes 0.0, as ones_of needs it.
__device__ __forceinline__ float positive_or_nan(float v) { return fabsf(v < 0.0F ? 0.0F : v); }
__device__ __forceinline__ __nv_bfloat162 positive_or_nan(__nv_bfloat162 v) {
#if LC_BFLOAT16 == 0
  return by_floats(v, v, [](float x, float) { return x <= 0.0F ? 0.0F : x; });
#else
  return __hmax2_nan(v, __nv_bfloat162{});
#endif
}

// v < 0 ? 0 : v, which keeps NaN and -0.0, as torch.relu does on the CPU and, since
// pytorch/pytorch#185354, on CUDA.
template <typename Pack>
__device__ __forceinline__ Pack rectified(Pack v) {
  if constexpr (std::is_same_v<Pack, float> || std::is_same_v<Pack, double>) {
    return v < Pack(0) ? Pack(0) : v;
  } else if constexpr (kOnes<Pack>) {
    // The hardware's maximum makes 0.0 of -0.0: its sign is put back where v is 0.
    const uint32_t cleared = ones_of(magnitude(v)) * 0x8000U + 0x7fff7fffU;
    return bits_as<Pack>(bits_as<uint32_t>(positive_or_nan(v)) | (bits_as<uint32_t>(v) & ~cleared));
  } else {
    return bits_as<Pack>(bits_as<uint32_t>(v) & ~greater(Pack{}, v));
  }
}

// v > bound ? yes : no, value by value.
template <typename Pack>
__device__ __forceinline__ Pack if_above(Pack v, float bound, Pack yes, Pack no) {
  if constexpr (std::is_same_v<Pack, float> || std::is_same_v<Pack, double>) {
    return v > Pack(bound) ? yes : no;
  } else {
    const uint32_t mask = greater(v, filled<Pack>(bound));
    return bits_as<Pack>((bits_as<uint32_t>(yes) & mask) | (bits_as<uint32_t>(no) & ~mask));
  }
}

// Values of T to what it is computed in and back, rounded to nearest even.
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(Half v) { return __half2float(v); }
__device__ __forceinline__ float widen(BFloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ __forceinline__ T narrow(typename Numeric<T>::Real v) {
  if constexpr (std::is_same_v<T, decltype(v)>) {
    return v;
  } else if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// change(value, i) of every value i of a pack, computed in Real.
template <typename Change>
__device__ __forceinline__ float transform(float v, const Change& change) {
  return change(v, 0);
}
template <typename Change>
__device__ __forceinline__ double transform(double v, const Change& change) {
  return change(v, 0);
}
template <typename Change>
__device__ __forceinline__ __half2 transform(__half2 v, const Change& change) {
  const float2 wide = __half22float2(v);
  return __floats2half2_rn(change(wide.x, 0), change(wide.y, 1));
}
template <typename Change>
__device__ __forceinline__ __nv_bfloat162 transform(__nv_bfloat162 v, const Change& change) {
  const float2 wide = __bfloat1622float2(v);
  return __floats2bfloat162_rn(change(wide.x, 0), change(wide.y, 1));
}

// The same value in every place of a pack.
template <typename T>
__device__ __forceinline__ typename Numeric<T>::Pack fill(float value) {
  typename Numeric<T>::Pack pack{};
  return transform(pack, [value](auto zero, int) { return zero + value; });
}

// kValues values of T that lie side by side: 16 bytes in one access, or a single value. A single
// half fills the low place of its pair, and kLanes is the mask of what is really there.
template <typename T, int kValues>
struct Vector {
  using Pack = typename Numeric<T>::Pack;
  static constexpr int kPacks = kValues >= Numeric<T>::kPack ? kValues / Numeric<T>::kPack : 1;
  static constexpr uint32_t kLanes = kValues >= Numeric<T>::kPack ? ~0U : 0xffffU;

  Pack packs[kPacks];

  static __device__ __forceinline__ Vector load(const T* source) {
    Vector vector{};
    if constexpr (kValues == 1) {
      const T value = *source;
      memcpy(&vector, &value, sizeof(T));
    } else {
      static_assert(sizeof(Vector) == sizeof(uint4));
      vector = bits_as<Vector>(*reinterpret_cast<const uint4*>(source));
    }
    return vector;
  }

  __device__ __forceinline__ void store(T* target) const {
    if constexpr (kValues == 1) {
      T value;
      memcpy(&value, this, sizeof(T));
      *target = value;
    } else {
      *reinterpret_cast<uint4*>(target) = bits_as<uint4>(*this);
    }
  }

  // The value at place i, in what it is computed in.
  __device__ __forceinline__ typename Numeric<T>::Real get(int i) const {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(this) + i * sizeof(T), sizeof(T));
    return widen(value);
  }
  __device__ __forceinline__ void set(int i, typename Numeric<T>::Real real) {
    const T value = narrow<T>(real);
    memcpy(reinterpret_cast<char*>(this) + i * sizeof(T), &value, sizeof(T));
  }
};

template <typename T>
inline constexpr int kVectorValues = static_cast<int>(sizeof(uint4) / sizeof(T));

}  // namespace layer_collapse
