// The loops over the passes of bn_passes.h. No include guard: bn_walks.h includes this once per
// instruction set, each time into a namespace of its own.
//
// A vector is 64 bytes of floats or doubles, written with the compiler's vector extension: one
// AVX-512 register, two of AVX2, four of SSE. 64 bytes of bfloat16 are two vectors ("parts"), that
// of the elements at even places and that of those at odd ones: then a shift or a mask makes floats
// of them and puts them back. Sums are kept in the compute type for a block of at most 16
// vectors and in double after that.

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

// Functors: y from z, and what is left of the gradient g of y; as in torch, also for NaN. kExact: y
// is a value that z's dtype has, without another rounding. kSign: the mask asks for z's sign alone.
template <Kind kind>
struct Functor;
template <>
struct Functor<Kind::relu> {
  static constexpr bool kExact = true;
  static constexpr bool kSign = true;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V, W& y) {
    clamp_negative(z, y);
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V, W& g) {
    g = z <= W{} ? W{} : g;
  }
};
template <>
struct Functor<Kind::relu6> {
  static constexpr bool kExact = true;
  static constexpr bool kSign = false;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V, W& y) {
    W low;
    clamp_negative(z, low);
    y = low > W{} + V(6) ? W{} + V(6) : low;
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V, W& g) {
    g = z <= W{} ? W{} : g;
    g = z >= W{} + V(6) ? W{} : g;
  }
};
template <>
struct Functor<Kind::leaky_relu> {
  static constexpr bool kExact = false;
  static constexpr bool kSign = true;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V slope, W& y) {
    y = z > W{} ? z : z * slope;
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V slope, W& g) {
    g = z > W{} ? g : g * slope;
  }
};
template <>
struct Functor<Kind::hardswish> {
  static constexpr bool kExact = false;
  static constexpr bool kSign = false;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V slope, W& y) {
    Functor<Kind::relu6>::apply(z + V(3), slope, y);
    y = z * y / V(6);
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V, W& g) {
    const W bent = g * (z / V(3) + V(0.5));
    g = z >= W{} + V(3) ? g : bent;
    g = z <= W{} - V(3) ? W{} : g;
  }
};

// ---- steps
//
// Step<Pass>: Channel holds the numbers of one channel in all lanes, or of one column per lane.
// run() treats one part of the vector at `at`, with kSome of its first n elements: what it sums
// goes into a Chunk, which fold() adds to the Totals; what it computes, to `out`, goes to
// target(). prefetch() is for what comes a block or an outer index later: neither walk is regular
// enough for the hardware, and without it memory decides (2 to 4 times the time at 16 MB).
template <typename Pass>
struct Step;

template <typename V>
struct SumChunk {
  Wide<V> first{}, second{};
};
template <typename T, int kPart>
LC_INLINE void fold_sums(const SumChunk<Compute<T>>& chunk, Sums<T>& totals) {
  constexpr int64_t slot = kPart * kLanes<Compute<T>>;
  add_lanes(totals.first + slot, chunk.first);
  add_lanes(totals.second + slot, chunk.second);
}

template <typename T>
struct Step<MomentsPass<T>> {
  using Pass = MomentsPass<T>;
  using V = Compute<T>;
  using Chunk = SumChunk<V>;
  static constexpr bool kStores = false;
  static LC_INLINE void prefetch(const Pass& pass, int64_t at) { __builtin_prefetch(pass.x + at); }
  struct Channel {
    Wide<V> center;
  };
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill(pass.center, c.center);
  }
  template <int kPart, bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c, Chunk& chunk,
                            Wide<V>&) {
    Wide<V> v;
    load<T, kPart, kSome>(pass.x + at, n, v);
    v -= c.center;
    if constexpr (kSome) keep_first<T, kPart>(n, v);
    chunk.first += v;
    multiply_add(v, v, chunk.second, chunk.second);
  }
  template <int kPart>
  static LC_INLINE void fold(const Chunk& chunk, Sums<T>& totals) {
    fold_sums<T, kPart>(chunk, totals);
  }
};

template <typename V>
struct NormalizedChannel {
  Wide<V> mean, alpha, beta;
};
template <typename V, typename Fill>
LC_INLINE void fill_channel(const Normalization<V>& z, const Fill& fill, NormalizedChannel<V>& c) {
  fill(z.mean, c.mean);
  fill(z.alpha, c.alpha);
  fill(z.beta, c.beta);
}

template <typename Rectifier, typename T>
struct Step<RectifyPass<Rectifier, T>> {
  using Pass = RectifyPass<Rectifier, T>;
  using V = Compute<T>;
  using W = Wide<V>;
  using Channel = NormalizedChannel<V>;
  static constexpr bool kStores = true;
  struct Chunk {
    Flags<V> positive{}, negative{}, nan{}, extra{};
  };
  static LC_INLINE T* target(const Pass& pass) { return pass.y; }
  static LC_INLINE void prefetch(const Pass& pass, int64_t at) {
    __builtin_prefetch(pass.x + at);
    __builtin_prefetch(pass.y + at, 1);
  }
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill_channel(pass.z, fill, c);
  }
  template <int kPart, bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c, Chunk& chunk,
                            W& out) {
    using Apply = Functor<Rectifier::kind>;
    W v;
    load<T, kPart, kSome>(pass.x + at, n, v);
    W z;
    multiply_add(W(v - c.mean), c.alpha, c.beta, z);
    round_to<T>(z);
    Apply::apply(z, pass.slope, out);
    if constexpr (!Apply::kExact) round_to<T>(out);
    if constexpr (kSome) keep_first<T, kPart>(n, z);  // no counter counts zeros
    count_less<false>(W{}, z, chunk.positive);
    count_less<false>(z, W{}, chunk.negative);
    count_less<true>(z, z, chunk.nan);
    if constexpr (Rectifier::kind == Kind::relu6) count_less<false>(W{} + V(6), z, chunk.extra);
    if constexpr (Rectifier::kind == Kind::hardswish) {
      Flags<V> inside = (z > W{} - V(3)) & (z < W{} + V(3));
      if constexpr (kSome) inside &= first_lanes<T, kPart>(n);  // this one would
      chunk.extra -= inside;
    }
  }
  template <int kPart>
  static LC_INLINE void fold(const Chunk& chunk, LaneCounts<T>& totals) {
    constexpr int64_t slot = kPart * kLanes<V>;
    add_counts(totals.positive + slot, chunk.positive);
    add_counts(totals.negative + slot, chunk.negative);
    add_counts(totals.nan + slot, chunk.nan);
    if constexpr (count_rows(Rectifier::kind) > 3) add_counts(totals.extra + slot, chunk.extra);
  }
};

// d = x - mean and g = the gradient of z.
template <typename Rectifier, typename T, int kPart, bool kSome, typename Pass>
LC_INLINE void load_grad(const Pass& pass, int64_t at, int64_t n,
                         const NormalizedChannel<Compute<T>>& c, Wide<Compute<T>>& d,
                         Wide<Compute<T>>& g) {
  using Mask = Functor<Rectifier::kind>;
  load<T, kPart, kSome>(pass.x + at, n, d);
  load<T, kPart, kSome>(pass.grad + at, n, g);
  d -= c.mean;
  Wide<Compute<T>> z;
  multiply_add(d, c.alpha, c.beta, z);
  // Rounding to bfloat16 changes no sign but that of what underflows.
  if constexpr (!Mask::kSign || !std::is_same_v<T, BFloat16>) round_to<T>(z);
  Mask::mask(z, pass.slope, g);
}

template <typename Rectifier, typename T>
struct Step<GradSumsPass<Rectifier, T>> {
  using Pass = GradSumsPass<Rectifier, T>;
  using V = Compute<T>;
  using Chunk = SumChunk<V>;
  using Channel = NormalizedChannel<V>;
  static constexpr bool kStores = false;
  static LC_INLINE void prefetch(const Pass& pass, int64_t at) {
    __builtin_prefetch(pass.x + at);
    __builtin_prefetch(pass.grad + at);
  }
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill_channel(pass.z, fill, c);
  }
  template <int kPart, bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c, Chunk& chunk,
                            Wide<V>&) {
    Wide<V> d, g;
    load_grad<Rectifier, T, kPart, kSome>(pass, at, n, c, d, g);
    if constexpr (kSome) {
      keep_first<T, kPart>(n, g);
      keep_first<T, kPart>(n, d);
    }
    chunk.first += g;
    multiply_add(g, d, chunk.second, chunk.second);
  }
  template <int kPart>
  static LC_INLINE void fold(const Chunk& chunk, Sums<T>& totals) {
    fold_sums<T, kPart>(chunk, totals);
  }
};

template <typename Rectifier, typename T>
struct Step<GradPass<Rectifier, T>> {
  using Pass = GradPass<Rectifier, T>;
  using V = Compute<T>;
  using Chunk = Nothing;
  static constexpr bool kStores = true;
  struct Channel {
    NormalizedChannel<V> z;
    Wide<V> scale, tilt, offset;
  };
  static LC_INLINE T* target(const Pass& pass) { return pass.dx; }
  static LC_INLINE void prefetch(const Pass& pass, int64_t at) {
    __builtin_prefetch(pass.x + at);
    __builtin_prefetch(pass.grad + at);
    __builtin_prefetch(pass.dx + at, 1);
  }
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill_channel(pass.z, fill, c.z);
    fill(pass.scale, c.scale);
    fill(pass.tilt, c.tilt);
    fill(pass.offset, c.offset);
  }
  template <int kPart, bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c, Chunk&,
                            Wide<V>& out) {
    Wide<V> d, g;
    load_grad<Rectifier, T, kPart, kSome>(pass, at, n, c.z, d, g);
    multiply_add(c.tilt, d, c.offset, d);
    multiply_add(c.scale, g, d, out);
    round_to<T>(out);
  }
  template <int kPart>
  static LC_INLINE void fold(const Chunk&, Nothing&) {}
};

// ---- walks: see bn_walks.h

inline constexpr int64_t kAheadBytes = 4096;  // between what is prefetched and what is worked on

// The parts of one vector or channel. Members, because arrays do not stay in registers.
template <typename Pass, template <typename, int> typename Fill>
struct Block {
  using Work = Step<Pass>;
  using T = typename Pass::Element;
  typename Work::Channel channel[kParts<T>];
  typename Work::Chunk chunk[kParts<T>];

  LC_INLINE void fill(const Pass& pass, int64_t c) {
    Work::fill(pass, Fill<T, 0>{c}, channel[0]);
    if constexpr (kParts<T> == 2) Work::fill(pass, Fill<T, 1>{c}, channel[1]);
  }
  template <bool kSome>
  LC_INLINE void run(const Pass& pass, int64_t at, int64_t n) {
    Wide<Compute<T>> out[kParts<T>];
    Work::template run<0, kSome>(pass, at, n, channel[0], chunk[0], out[0]);
    if constexpr (kParts<T> == 2) {
      Work::template run<1, kSome>(pass, at, n, channel[1], chunk[1], out[1]);
    }
    if constexpr (Work::kStores) store<T, kSome>(Work::target(pass) + at, n, out);
  }
  LC_INLINE void fold(typename Pass::Totals& totals) {
    Work::template fold<0>(chunk[0], totals);
    if constexpr (kParts<T> == 2) Work::template fold<1>(chunk[1], totals);
    for (auto& part : chunk) part = {};
  }
};

template <typename Pass>
void walk_planes(const Pass& shared, int64_t outer, int64_t stride, int64_t group, int64_t inner,
                 typename Pass::Totals* totals) {
  constexpr int64_t kStep = kWidth<typename Pass::Element>;
  constexpr int64_t kBlock = 16;
  const Pass pass = shared;  // a local copy, which the stores of the loop cannot change
  const int64_t whole = inner / kStep * kStep;
  // What the memory holds next, or the same channels of the next outer index.
  const int64_t ahead = group * inner == stride ? kAheadBytes / 64 * kStep : stride;
  for (int64_t n = 0; n < outer; ++n) {
    const int64_t first = n * stride;
    for (int64_t c = 0; c < group; ++c) {
      const int64_t row = first + c * inner;
      Block<Pass, FillAll> block{};
      block.fill(pass, c);
      for (int64_t start = 0; start < whole; start += kBlock * kStep) {
        const int64_t stop = std::min(start + kBlock * kStep, whole);
        for (int64_t i = start; i < stop; i += kStep) {
          Step<Pass>::prefetch(pass, row + i + ahead);
          block.template run<false>(pass, row + i, kStep);
        }
        block.fold(totals[c]);
      }
      if (whole < inner) {
        block.template run<true>(pass, row + whole, inner - whole);
        block.fold(totals[c]);
      }
    }
  }
}

template <typename Pass>
void walk_columns(const Pass& shared, int64_t rows, int64_t stride, int64_t columns,
                  typename Pass::Totals* totals) {
  constexpr int64_t kStep = kWidth<typename Pass::Element>;
  using T = typename Pass::Element;
  // A block and what is fetched ahead of it must fit into the first-level cache.
  const int64_t row_bytes = std::max<int64_t>(1, columns * static_cast<int64_t>(sizeof(T)));
  const int64_t block_rows = std::clamp<int64_t>(8192 / row_bytes, 4, 8);
  const int64_t ahead = std::max<int64_t>(block_rows, kAheadBytes / row_bytes) * stride;
  const Pass pass = shared;
  const int64_t whole = columns / kStep * kStep;
  for (int64_t done = 0; done < rows; done += block_rows) {
    const int64_t count = std::min(block_rows, rows - done);
    const int64_t first = done * stride;
    const int64_t last = first + count * stride;
    for (int64_t c = 0; c < whole; c += kStep) {
      Block<Pass, FillEach> block{};
      block.fill(pass, c);
      for (int64_t at = first + c; at < last; at += stride) {
        Step<Pass>::prefetch(pass, at + ahead);
        block.template run<false>(pass, at, kStep);
      }
      block.fold(totals[c / kStep]);
    }
    if (whole < columns) {
      Block<Pass, FillEach> block{};
      block.fill(pass, whole);
      for (int64_t at = first + whole; at < last; at += stride) {
        block.template run<true>(pass, at, columns - whole);
      }
      block.fold(totals[whole / kStep]);
    }
  }
}
