// 64 bytes of numbers as one value, in the registers of the machine. Part of a machine's code: see
// rectify_loops.h. No include guard: bn_walks.h includes this once per machine.
//
// With AVX-512 that is GCC's own vector of 64 bytes. Elsewhere such a vector is no register, and
// GCC takes its comparisons, selections and shuffles apart, number by number: the loops were 10 to
// 40 times slower. So there it is a Pack of vectors that are registers, with the same operators.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"

// UBSan's checks of every part would make a sanitised build take many minutes; ASan's of the memory
// that is loaded and stored remain.
#undef LC_UNCHECKED
#define LC_UNCHECKED inline __attribute__((always_inline, no_sanitize("undefined")))

namespace layer_collapse {
namespace LC_MACHINE {

#if defined(LC_AVX512)

template <typename E>
struct VectorOf {
  typedef E type __attribute__((vector_size(64)));
};
template <typename E>
using Vector = typename VectorOf<E>::type;

template <typename To, typename From>
LC_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename E>
LC_INLINE V all_lanes(E number) {
  return number - V{};  // not V{} + number, which has no -0.0
}

// a where the mask is -1, b where it is 0.
template <typename Mask, typename V>
LC_INLINE V select(Mask mask, V a, V b) {
  return mask ? a : b;
}

// of(part) for every register of v.
template <typename V, typename Operation>
LC_INLINE V each_part(V v, const Operation& of) {
  return (V)of(v);
}

// The sum of the registers, lane by lane.
template <typename V>
LC_INLINE V sum_of_parts(V v) {
  return v;
}

#else

#if defined(LC_AVX2)
inline constexpr int kPartBytes = 32;
#else
inline constexpr int kPartBytes = 16;
#endif

template <typename E>
struct Pack {
  typedef E Part __attribute__((vector_size(kPartBytes)));
  static constexpr int kParts = 64 / kPartBytes;
  Part part[kParts];
};
template <typename E>
using Vector = Pack<E>;
template <typename E>
using MaskOf = Pack<IntegerOf<sizeof(E)> >;

// The second operand may be one number for all lanes.
#define LC_PACK_BINARY(Result, op)                                                  \
  template <typename E>                                                             \
  LC_UNCHECKED Result<E> operator op(const Pack<E>& a, const Pack<E>& b) {          \
    Result<E> result;                                                               \
    for (int i = 0; i < Pack<E>::kParts; ++i) {                                     \
      result.part[i] = a.part[i] op b.part[i];                                      \
    }                                                                               \
    return result;                                                                  \
  }                                                                                 \
  template <typename E>                                                             \
  LC_UNCHECKED Result<E> operator op(const Pack<E>& a, std::type_identity_t<E> b) { \
    Result<E> result;                                                               \
    for (int i = 0; i < Pack<E>::kParts; ++i) result.part[i] = a.part[i] op b;      \
    return result;                                                                  \
  }
LC_PACK_BINARY(Pack, +)
LC_PACK_BINARY(Pack, -)
LC_PACK_BINARY(Pack, *)
LC_PACK_BINARY(Pack, /)
LC_PACK_BINARY(Pack, &)
LC_PACK_BINARY(Pack, |)
LC_PACK_BINARY(MaskOf, <)
LC_PACK_BINARY(MaskOf, <=)
LC_PACK_BINARY(MaskOf, >)
LC_PACK_BINARY(MaskOf, >=)
LC_PACK_BINARY(MaskOf, ==)
LC_PACK_BINARY(MaskOf, !=)
#undef LC_PACK_BINARY

template <typename E>
LC_UNCHECKED Pack<E> operator<<(Pack<E> a, int bits) {
  for (auto& part : a.part) part = part << bits;
  return a;
}
template <typename E>
LC_UNCHECKED Pack<E> operator>>(Pack<E> a, int bits) {
  for (auto& part : a.part) part = part >> bits;
  return a;
}
template <typename E>
LC_UNCHECKED Pack<E> operator~(Pack<E> a) {
  for (auto& part : a.part) part = ~part;
  return a;
}
template <typename E, typename Other>
LC_UNCHECKED Pack<E>& operator+=(Pack<E>& a, const Other& b) {
  return a = a + b;
}
template <typename E, typename Other>
LC_UNCHECKED Pack<E>& operator-=(Pack<E>& a, const Other& b) {
  return a = a - b;
}
template <typename E, typename Other>
LC_UNCHECKED Pack<E>& operator&=(Pack<E>& a, const Other& b) {
  return a = a & b;
}
template <typename E, typename Other>
LC_UNCHECKED Pack<E>& operator|=(Pack<E>& a, const Other& b) {
  return a = a | b;
}

template <typename To, typename E>
LC_UNCHECKED To bits_as(const Pack<E>& from) {
  To to;
  for (int i = 0; i < To::kParts; ++i) {
    to.part[i] = (std::remove_reference_t<decltype(to.part[i])>)from.part[i];
  }
  return to;
}

template <typename E>
LC_UNCHECKED Pack<E> select(const MaskOf<E>& mask, const Pack<E>& a, const Pack<E>& b) {
  Pack<E> result;
  for (int i = 0; i < Pack<E>::kParts; ++i) {
    result.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  }
  return result;
}

template <typename V, typename E>
LC_UNCHECKED V all_lanes(E number) {
  V result{};
  for (auto& part : result.part) part = number - part;
  return result;
}

template <typename E, typename Operation>
LC_UNCHECKED Pack<E> each_part(Pack<E> v, const Operation& of) {
  for (auto& part : v.part) part = (std::remove_reference_t<decltype(part)>)of(part);
  return v;
}

template <typename E>
LC_UNCHECKED typename Pack<E>::Part sum_of_parts(const Pack<E>& v) {
  auto sum = v.part[0];
  for (int i = 1; i < Pack<E>::kParts; ++i) sum += v.part[i];
  return sum;
}

#endif

template <typename V, typename T>
LC_INLINE V load(const T* source) {
  V v;
#if defined(LC_AVX512)
  std::memcpy(&v, source, sizeof(v));
#else
  const char* bytes = reinterpret_cast<const char*>(source);
  for (int i = 0; i < V::kParts; ++i) std::memcpy(&v.part[i], bytes + i * kPartBytes, kPartBytes);
#endif
  return v;
}

template <typename V, typename T>
LC_INLINE void store(T* target, const V& v) {
#if defined(LC_AVX512)
  std::memcpy(target, &v, sizeof(v));
#else
  char* bytes = reinterpret_cast<char*>(target);
  for (int i = 0; i < V::kParts; ++i) std::memcpy(bytes + i * kPartBytes, &v.part[i], kPartBytes);
#endif
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
