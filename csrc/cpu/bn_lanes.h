// 64 bytes of elements as one value, and what the steps of bn_steps.h do with it.
// No include guard: bn_walks.h includes this once per instruction set, each time into a namespace
// of its own.
//
// A vector is 64 bytes of floats or doubles, written with the compiler's vector extension: one
// AVX-512 register, two of AVX2, four of SSE. 64 bytes of bfloat16 are two vectors ("parts"), that
// of the elements at even places and that of those at odd ones: then a shift or a mask makes floats
// of them and puts them back.

using Floats = float __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(64)));
using HalfFloats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(64)));

template <typename V>
using Wide = std::conditional_t<std::is_same_v<V, double>, Doubles, Floats>;
// What a comparison of two Wide<V> gives: -1 or 0 per lane.
template <typename V>
using Flags = decltype(Wide<V>{} < Wide<V>{});

// What the compiler does not find in AVX-512 by itself: a fused product and sum, a counter that a
// mask steps, and a maximum that is `z < 0 ? 0 : z` also for NaN and -0.0.
template <typename W>
LC_INLINE void multiply_add(const W& a, const W& b, const W& c, W& sum) {
#ifdef LC_BN_AVX512
  if constexpr (std::is_same_v<W, Floats>) {
    sum = _mm512_fmadd_ps(a, b, c);
  } else {
    sum = _mm512_fmadd_pd(a, b, c);
  }
#else
  sum = a * b + c;
#endif
}
template <typename W>
LC_INLINE void clamp_negative(const W& z, W& y) {
#ifdef LC_BN_AVX512
  if constexpr (std::is_same_v<W, Floats>) {
    y = _mm512_max_ps(W{}, z);
  } else {
    y = _mm512_max_pd(W{}, z);
  }
#else
  y = z < W{} ? W{} : z;
#endif
}
// counts += 1 where a < b (kUnordered: where a or b is NaN)
template <bool kUnordered, typename W, typename Lanes>
LC_INLINE void count_less(const W& a, const W& b, Lanes& counts) {
#ifdef LC_BN_AVX512
  constexpr int kRelation = kUnordered ? _CMP_UNORD_Q : _CMP_LT_OQ;
  if constexpr (std::is_same_v<W, Floats>) {
    const auto mask = _mm512_cmp_ps_mask(a, b, kRelation);
    counts =
        (Lanes)_mm512_mask_sub_epi32((__m512i)counts, mask, (__m512i)counts, _mm512_set1_epi32(-1));
  } else {
    const auto mask = _mm512_cmp_pd_mask(a, b, kRelation);
    counts =
        (Lanes)_mm512_mask_sub_epi64((__m512i)counts, mask, (__m512i)counts, _mm512_set1_epi64(-1));
  }
#else
  counts -= kUnordered ? (a != a) | (b != b) : a < b;
#endif
}

// Elements p[0..kWidth) that belong to a part; with kSome those of the first n, and zeros.
template <typename T, int kPart, bool kSome>
LC_INLINE void load(const T* p, int64_t n, Wide<Compute<T>>& v) {
  if constexpr (kSome) {
    T filled[kWidth<T>] = {};
    std::memcpy(filled, p, n * sizeof(T));
    load<T, kPart, false>(filled, n, v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Words pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    v = kPart == 0 ? (Floats)(pairs << 16) : (Floats)(pairs & 0xffff0000);
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < kWidth<T>; ++i) v[i] = static_cast<float>(p[i]);
  } else {
    std::memcpy(&v, p, sizeof(v));
  }
}

// v as it is after a round trip through T. A NaN whose lower half is not zero may become anything:
// there is none, see doubles_of().
template <typename T>
LC_INLINE void round_to(Wide<Compute<T>>& v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Words bits = (Words)v;
    v = (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);  // to nearest, ties to even
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < kWidth<T>; ++i) v[i] = static_cast<float>(static_cast<Half>(v[i]));
  }
}

// All parts, results of round_to<T>, go to p[0..kWidth); with kSome the first n elements.
template <typename T, bool kSome>
LC_INLINE void store(T* p, int64_t n, const Wide<Compute<T>> (&parts)[kParts<T>]) {
  if constexpr (kSome) {
    T all[kWidth<T>];
    store<T, false>(all, n, parts);
    std::memcpy(p, all, n * sizeof(T));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Words pairs = ((Words)parts[0] >> 16) | (Words)parts[1];
    std::memcpy(p, &pairs, sizeof(pairs));
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < kWidth<T>; ++i) p[i] = static_cast<Half>(parts[0][i]);
  } else {
    std::memcpy(p, &parts[0], sizeof(parts[0]));
  }
}

// -1 in the lanes of a part that hold one of the first n elements, 0 in the others.
template <typename T, int kPart>
LC_INLINE Flags<Compute<T>> first_lanes(int64_t n) {
  Flags<Compute<T>> flags;
  for (int64_t i = 0; i < kLanes<Compute<T>>; ++i) flags[i] = i * kParts<T> + kPart < n ? -1 : 0;
  return flags;
}

// The lanes of other elements than the first n become zero.
template <typename T, int kPart>
LC_INLINE void keep_first(int64_t n, Wide<Compute<T>>& v) {
  v = first_lanes<T, kPart>(n) ? v : Wide<Compute<T>>{};
}

// sums[i] += v[i], in double.
LC_INLINE void add_lanes(double* sums, const Doubles& v) {
  Doubles sum;
  std::memcpy(&sum, sums, sizeof(sum));
  sum += v;
  std::memcpy(sums, &sum, sizeof(sum));
}
LC_INLINE void add_lanes(double* sums, const Floats& v) {
  // not memcpy: a vector whose address is taken does not stay in a register
  const HalfFloats low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const HalfFloats high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  add_lanes(sums, __builtin_convertvector(low, Doubles));
  add_lanes(sums + 8, __builtin_convertvector(high, Doubles));
}
template <typename Int, typename Lanes>
LC_INLINE void add_counts(Int* counts, const Lanes& more) {
  Lanes count;
  std::memcpy(&count, counts, sizeof(count));
  count += more;
  std::memcpy(counts, &count, sizeof(count));
}

// The number of channel c in all lanes; the numbers of a part of the kWidth columns from c on.
template <typename T, int kPart>
struct FillAll {
  int64_t c;
  LC_INLINE void operator()(const Compute<T>* numbers, Wide<Compute<T>>& v) const {
    v = numbers[c] - Wide<Compute<T>>{};
  }
};
template <typename T, int kPart>
struct FillEach {
  int64_t c;
  LC_INLINE void operator()(const Compute<T>* numbers, Wide<Compute<T>>& v) const {
    std::memcpy(&v, numbers + c, sizeof(v));
    if constexpr (kParts<T> == 2) {
      Floats next;
      std::memcpy(&next, numbers + c + 16, sizeof(next));
      constexpr int k = kPart;
      v = __builtin_shufflevector(v, next, k, k + 2, k + 4, k + 6, k + 8, k + 10, k + 12, k + 14,
                                  k + 16, k + 18, k + 20, k + 22, k + 24, k + 26, k + 28, k + 30);
    }
  }
};
