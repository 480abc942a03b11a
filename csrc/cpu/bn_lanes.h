// 64 bytes of elements as one value, and what the steps of bn_steps.h do with it.
// No include guard: bn_walks.h includes this once per instruction set, each time into a namespace
// of its own.
//
// A vector is 64 bytes of floats or doubles (pack.h): one AVX-512 register, two of AVX2, four of
// SSE. 64 bytes of bfloat16 are two vectors ("parts"), that of the elements at even places and that
// of those at odd ones: then a shift or a mask makes floats of them and puts them back.

using Floats = Vector<float>;
using Doubles = Vector<double>;
using Words = Vector<uint32_t>;

template <typename V>
using Wide = std::conditional_t<std::is_same_v<V, double>, Doubles, Floats>;
// What a comparison of two Wide<V> gives: -1 or 0 per lane.
template <typename V>
using Flags = decltype(Wide<V>{} < Wide<V>{});

// What the compiler does not find by itself: a fused product and sum, a counter that a mask of
// AVX-512 steps, and a maximum that is `z < 0 ? 0 : z` also for NaN and -0.0.
template <typename W>
LC_INLINE void multiply_add(const W& a, const W& b, const W& c, W& sum) {
#ifdef LC_AVX512
  if constexpr (std::is_same_v<W, Floats>) {
    sum = _mm512_fmadd_ps(a, b, c);
  } else {
    sum = _mm512_fmadd_pd(a, b, c);
  }
#elif defined(LC_AVX2)
  for (int i = 0; i < W::kParts; ++i) {
    if constexpr (std::is_same_v<W, Floats>) {
      sum.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
    } else {
      sum.part[i] = _mm256_fmadd_pd(a.part[i], b.part[i], c.part[i]);
    }
  }
#else
  sum = a * b + c;
#endif
}
template <typename W>
LC_INLINE void clamp_negative(const W& z, W& y) {
#ifdef LC_AVX512
  if constexpr (std::is_same_v<W, Floats>) {
    y = _mm512_max_ps(W{}, z);
  } else {
    y = _mm512_max_pd(W{}, z);
  }
#elif defined(LC_AVX2)
  for (int i = 0; i < W::kParts; ++i) {
    if constexpr (std::is_same_v<W, Floats>) {
      y.part[i] = _mm256_max_ps(_mm256_setzero_ps(), z.part[i]);
    } else {
      y.part[i] = _mm256_max_pd(_mm256_setzero_pd(), z.part[i]);
    }
  }
#else
  y = select(z < W{}, W{}, z);
#endif
}
// counts += 1 where a < b (kUnordered: where a or b is NaN)
template <bool kUnordered, typename W, typename Lanes>
LC_INLINE void count_less(const W& a, const W& b, Lanes& counts) {
#ifdef LC_AVX512
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
  if constexpr (kUnordered) {
    counts -= (a != a) | (b != b);
  } else {
    counts -= a < b;
  }
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
    const Words pairs = load<Words>(p);
    v = bits_as<Floats>(kPart == 0 ? pairs << 16 : pairs & 0xffff0000);
  } else if constexpr (std::is_same_v<T, Half>) {
    float wide[kWidth<T>];
    for (int64_t i = 0; i < kWidth<T>; ++i) wide[i] = static_cast<float>(p[i]);
    v = load<Floats>(wide);
  } else {
    v = load<Wide<T>>(p);
  }
}

// v as it is after a round trip through T. A NaN whose lower half is not zero may become anything:
// there is none, see doubles_of().
template <typename T>
LC_INLINE void round_to(Wide<Compute<T>>& v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Words bits = bits_as<Words>(v);
    const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    v = bits_as<Floats>(rounded & 0xffff0000);
  } else if constexpr (std::is_same_v<T, Half>) {
    float wide[kWidth<T>];
    store(wide, v);
    for (float& number : wide) number = static_cast<float>(static_cast<Half>(number));
    v = load<Floats>(wide);
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
    store(p, (bits_as<Words>(parts[0]) >> 16) | bits_as<Words>(parts[1]));
  } else if constexpr (std::is_same_v<T, Half>) {
    float wide[kWidth<T>];
    store(wide, parts[0]);
    for (int64_t i = 0; i < kWidth<T>; ++i) p[i] = static_cast<Half>(wide[i]);
  } else {
    store(p, parts[0]);
  }
}

// -1 in the lanes of a part that hold one of the first n elements, 0 in the others.
template <typename T, int kPart>
LC_INLINE Flags<Compute<T>> first_lanes(int64_t n) {
  IntegerOf<sizeof(Compute<T>)> flags[kLanes<Compute<T>>];
  for (int64_t i = 0; i < kLanes<Compute<T>>; ++i) flags[i] = i * kParts<T> + kPart < n ? -1 : 0;
  return load<Flags<Compute<T>>>(flags);
}

// The lanes of other elements than the first n become zero.
template <typename T, int kPart>
LC_INLINE void keep_first(int64_t n, Wide<Compute<T>>& v) {
  v = select(first_lanes<T, kPart>(n), v, Wide<Compute<T>>{});
}

// sums[i] += v[i], in double.
LC_INLINE void add_lanes(double* sums, const Doubles& v) { store(sums, load<Doubles>(sums) + v); }
LC_INLINE void add_lanes(double* sums, const Floats& v) {
#ifdef LC_AVX512
  // not memcpy: a vector whose address is taken does not stay in a register
  const auto low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  add_lanes(sums, __builtin_convertvector(low, Doubles));
  add_lanes(sums + 8, __builtin_convertvector(high, Doubles));
#else
  float lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; ++i) sums[i] += static_cast<double>(lanes[i]);
#endif
}
template <typename Int, typename Lanes>
LC_INLINE void add_counts(Int* counts, const Lanes& more) {
  store(counts, load<Lanes>(counts) + more);
}

// The number of channel c in all lanes; the numbers of a part of the kWidth columns from c on.
template <typename T, int kPart>
struct FillAll {
  int64_t c;
  LC_INLINE void operator()(const Compute<T>* numbers, Wide<Compute<T>>& v) const {
    v = all_lanes<Wide<Compute<T>>>(numbers[c]);
  }
};
template <typename T, int kPart>
struct FillEach {
  int64_t c;
  LC_INLINE void operator()(const Compute<T>* numbers, Wide<Compute<T>>& v) const {
    if constexpr (kParts<T> == 2) {
      float every_second[16];
      for (int i = 0; i < 16; ++i) every_second[i] = numbers[c + 2 * i + kPart];
      v = load<Floats>(every_second);
    } else {
      v = load<Wide<Compute<T>>>(numbers + c);
    }
  }
};
