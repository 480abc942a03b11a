// The loops over the passes of bn_passes.h. No include guard: bn_walks.h includes this once per
// instruction set, each time into a namespace of its own.
//
// A vector is 64 bytes of floats or doubles, written with the compiler's vector extension: one
// AVX-512 register, two of AVX2, four of SSE. walk_channels takes kLanes channels at a time in
// blocks of kBlock rows, so that what belongs to a channel stays in registers while its block goes
// by. Sums are kept in the compute type for at most kBlock vectors and in double after that.
//
// A pass that follows another over the same memory runs backwards: what was read last is what the
// cache still holds.

using Floats = float __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(64)));
using HalfFloats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));

template <typename V>
using Wide = std::conditional_t<std::is_same_v<V, double>, Doubles, Floats>;
// What a comparison of two Wide<V> gives: -1 or 0 per lane.
template <typename V>
using Flags = decltype(Wide<V>{} < Wide<V>{});

// Elements p[0..kLanes) in the type that is computed in; with kSome the first n, then zeros.
template <typename T, bool kSome>
LC_INLINE void load(const T* p, int64_t n, Wide<Compute<T>>& v) {
  if constexpr (kSome) {
    T filled[kLanes<Compute<T>>] = {};
    std::memcpy(filled, p, n * sizeof(T));
    load<T, false>(filled, n, v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Shorts bits;
    std::memcpy(&bits, p, sizeof(bits));
    const Words words = __builtin_convertvector(bits, Words) << 16;
    std::memcpy(&v, &words, sizeof(v));
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  } else {
    std::memcpy(&v, p, sizeof(v));
  }
}

// v as it is after a round trip through T. NaN stays NaN.
template <typename T>
LC_INLINE void round_to(Wide<Compute<T>>& v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Words bits;
    std::memcpy(&bits, &v, sizeof(bits));
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;  // to nearest, ties to even
    Floats rounded;
    std::memcpy(&rounded, &bits, sizeof(bits));
    v = v == v ? rounded : v;  // the carry may turn a NaN into anything
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(static_cast<Half>(v[i]));
  }
}

// v, a result of round_to<T>, goes to p[0..kLanes); with kSome its first n lanes.
template <typename T, bool kSome>
LC_INLINE void store(T* p, int64_t n, const Wide<Compute<T>>& v) {
  if constexpr (kSome) {
    T all[kLanes<Compute<T>>];
    store<T, false>(all, n, v);
    std::memcpy(p, all, n * sizeof(T));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Words bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const Shorts shorts = __builtin_convertvector(bits >> 16, Shorts);
    std::memcpy(p, &shorts, sizeof(shorts));
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < kLanes<float>; ++i) p[i] = static_cast<Half>(v[i]);
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// -1 in the first n lanes, 0 in the others.
template <typename V>
LC_INLINE Flags<V> first_lanes(int64_t n) {
  Flags<V> flags;
  for (int64_t i = 0; i < kLanes<V>; ++i) flags[i] = i < n ? -1 : 0;
  return flags;
}

// The lanes from n on become zero.
template <typename V>
LC_INLINE void keep_first(int64_t n, Wide<V>& v) {
  v = first_lanes<V>(n) ? v : Wide<V>{};
}

// sums[i] += v[i], in double.
LC_INLINE void add_lanes(double* sums, const Doubles& v) {
  Doubles sum;
  std::memcpy(&sum, sums, sizeof(sum));
  sum += v;
  std::memcpy(sums, &sum, sizeof(sum));
}
LC_INLINE void add_lanes(double* sums, const Floats& v) {
  HalfFloats low, high;
  std::memcpy(&low, &v, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
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

// The number of channel c in all lanes; the numbers of kLanes channels from c on.
struct FillAll {
  int64_t c;
  template <typename V>
  LC_INLINE void operator()(const V* numbers, Wide<V>& v) const {
    v = numbers[c] - Wide<V>{};
  }
};
struct FillEach {
  int64_t c;
  template <typename V>
  LC_INLINE void operator()(const V* numbers, Wide<V>& v) const {
    std::memcpy(&v, numbers + c, sizeof(v));
  }
};

// Functors: y from z, and what is left of the gradient g of y; as in torch, also for NaN. kExact: y
// is a value that z's dtype has, without another rounding.
template <Kind kind>
struct Functor;
template <>
struct Functor<Kind::relu> {
  static constexpr bool kExact = true;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V, W& y) {
    y = z < W{} ? W{} : z;
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V, W& g) {
    g = z <= W{} ? W{} : g;
  }
};
template <>
struct Functor<Kind::relu6> {
  static constexpr bool kExact = true;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V, W& y) {
    const W low = z < W{} ? W{} : z;
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
// Step<Pass>: Channel holds the numbers of one channel in all lanes, or of one channel per lane.
// run() treats the elements `at` and on, a whole vector or, with kSome, the first n; what it sums
// goes into a Chunk, which fold() adds to the Totals.
template <typename Pass>
struct Step;

template <typename V>
struct SumChunk {
  Wide<V> first{}, second{};
};
template <typename V>
LC_INLINE void fold_sums(const SumChunk<V>& chunk, Sums<V>& totals) {
  add_lanes(totals.first, chunk.first);
  add_lanes(totals.second, chunk.second);
}

template <typename T>
struct Step<MomentsPass<T>> {
  using V = Compute<T>;
  using Chunk = SumChunk<V>;
  static constexpr bool kBackwards = false;
  struct Channel {
    Wide<V> center;
  };
  template <typename Fill>
  static LC_INLINE void fill(const MomentsPass<T>& pass, const Fill& fill, Channel& c) {
    fill(pass.center, c.center);
  }
  template <bool kSome>
  static LC_INLINE void run(const MomentsPass<T>& pass, int64_t at, int64_t n, const Channel& c,
                            Chunk& chunk) {
    Wide<V> v;
    load<T, kSome>(pass.x + at, n, v);
    v -= c.center;
    if constexpr (kSome) keep_first<V>(n, v);
    chunk.first += v;
    chunk.second += v * v;
  }
  static LC_INLINE void fold(const Chunk& chunk, Sums<V>& totals) { fold_sums(chunk, totals); }
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
template <typename T>
LC_INLINE void normalize(const NormalizedChannel<Compute<T>>& c, const Wide<Compute<T>>& x,
                         Wide<Compute<T>>& z) {
  z = (x - c.mean) * c.alpha + c.beta;
  round_to<T>(z);
}

template <typename Rectifier, typename T>
struct Step<RectifyPass<Rectifier, T>> {
  using Pass = RectifyPass<Rectifier, T>;
  using V = Compute<T>;
  using W = Wide<V>;
  static constexpr bool kBackwards = true;
  using Channel = NormalizedChannel<V>;
  struct Chunk {
    Flags<V> positive{}, negative{}, nan{}, extra{};
  };
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill_channel(pass.z, fill, c);
  }
  template <bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c,
                            Chunk& chunk) {
    using Apply = Functor<Rectifier::kind>;
    W v, z, y;
    load<T, kSome>(pass.x + at, n, v);
    normalize<T>(c, v, z);
    Apply::apply(z, pass.slope, y);
    if constexpr (!Apply::kExact) round_to<T>(y);
    store<T, kSome>(pass.y + at, n, y);
    if constexpr (kSome) keep_first<V>(n, z);  // no counter counts zeros
    chunk.positive -= z > W{};
    chunk.negative -= z < W{};
    chunk.nan -= z != z;
    if constexpr (Rectifier::kind == Kind::relu6) chunk.extra -= z > W{} + V(6);
    if constexpr (Rectifier::kind == Kind::hardswish) {
      Flags<V> inside = (z > W{} - V(3)) & (z < W{} + V(3));
      if constexpr (kSome) inside &= first_lanes<V>(n);  // this one would
      chunk.extra -= inside;
    }
  }
  static LC_INLINE void fold(const Chunk& chunk, LaneCounts<V>& totals) {
    add_counts(totals.positive, chunk.positive);
    add_counts(totals.negative, chunk.negative);
    add_counts(totals.nan, chunk.nan);
    if constexpr (count_rows(Rectifier::kind) > 3) add_counts(totals.extra, chunk.extra);
  }
};

template <typename Rectifier, typename T>
struct Step<GradSumsPass<Rectifier, T>> {
  using Pass = GradSumsPass<Rectifier, T>;
  using V = Compute<T>;
  using Chunk = SumChunk<V>;
  using Channel = NormalizedChannel<V>;
  static constexpr bool kBackwards = false;
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill_channel(pass.z, fill, c);
  }
  template <bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c,
                            Chunk& chunk) {
    Wide<V> v, z, g;
    load<T, kSome>(pass.x + at, n, v);
    load<T, kSome>(pass.grad + at, n, g);
    normalize<T>(c, v, z);
    Functor<Rectifier::kind>::mask(z, pass.slope, g);
    Wide<V> product = g * (v - c.mean);
    if constexpr (kSome) {
      keep_first<V>(n, g);
      keep_first<V>(n, product);
    }
    chunk.first += g;
    chunk.second += product;
  }
  static LC_INLINE void fold(const Chunk& chunk, Sums<V>& totals) { fold_sums(chunk, totals); }
};

template <typename Rectifier, typename T>
struct Step<GradPass<Rectifier, T>> {
  using Pass = GradPass<Rectifier, T>;
  using V = Compute<T>;
  using Chunk = Nothing;
  static constexpr bool kBackwards = true;
  struct Channel {
    NormalizedChannel<V> z;
    Wide<V> scale, tilt, offset;
  };
  template <typename Fill>
  static LC_INLINE void fill(const Pass& pass, const Fill& fill, Channel& c) {
    fill_channel(pass.z, fill, c.z);
    fill(pass.scale, c.scale);
    fill(pass.tilt, c.tilt);
    fill(pass.offset, c.offset);
  }
  template <bool kSome>
  static LC_INLINE void run(const Pass& pass, int64_t at, int64_t n, const Channel& c, Chunk&) {
    Wide<V> v, z, g;
    load<T, kSome>(pass.x + at, n, v);
    load<T, kSome>(pass.grad + at, n, g);
    normalize<T>(c.z, v, z);
    Functor<Rectifier::kind>::mask(z, pass.slope, g);
    Wide<V> dx = c.scale * g + (c.tilt * (v - c.z.mean) + c.offset);
    round_to<T>(dx);
    store<T, kSome>(pass.dx + at, n, dx);
  }
  static LC_INLINE void fold(const Chunk&, Nothing&) {}
};

// ---- walks: see bn_walks.h

inline constexpr int64_t kBlock = 8;

template <typename Pass>
void walk_planes(const Pass& shared, int64_t outer, int64_t stride, int64_t group, int64_t inner,
                 typename Pass::Totals* totals) {
  using Work = Step<Pass>;
  constexpr int64_t kStep = kLanes<Compute<typename Pass::Element>>;
  const Pass pass = shared;  // a local copy, which the stores of the loop cannot change
  const int64_t whole = inner / kStep * kStep;
  for (int64_t n = 0; n < outer; ++n) {
    const int64_t first = (Work::kBackwards ? outer - 1 - n : n) * stride;
    for (int64_t c = 0; c < group; ++c) {
      const int64_t row = first + c * inner;
      typename Work::Channel channel;
      Work::fill(pass, FillAll{c}, channel);
      for (int64_t start = 0; start < whole; start += kBlock * kStep) {
        typename Work::Chunk chunk{};
        const int64_t stop = std::min(start + kBlock * kStep, whole);
        for (int64_t i = start; i < stop; i += kStep) {
          Work::template run<false>(pass, row + i, kStep, channel, chunk);
        }
        Work::fold(chunk, totals[c]);
      }
      if (whole < inner) {
        typename Work::Chunk chunk{};
        Work::template run<true>(pass, row + whole, inner - whole, channel, chunk);
        Work::fold(chunk, totals[c]);
      }
    }
  }
}

template <typename Pass>
void walk_channels(const Pass& shared, int64_t from, int64_t to, int64_t channels,
                   typename Pass::Totals* totals) {
  using Work = Step<Pass>;
  constexpr int64_t kStep = kLanes<Compute<typename Pass::Element>>;
  const Pass pass = shared;
  const int64_t whole = channels / kStep * kStep;
  for (int64_t done = from; done < to; done += kBlock) {
    const int64_t rows = std::min(kBlock, to - done);
    const int64_t first = (Work::kBackwards ? from + to - done - rows : done) * channels;
    const int64_t last = first + rows * channels;
    typename Work::Channel channel;
    for (int64_t c = 0; c < whole; c += kStep) {
      Work::fill(pass, FillEach{c}, channel);
      typename Work::Chunk chunk{};
      for (int64_t at = first + c; at < last; at += channels) {
        Work::template run<false>(pass, at, kStep, channel, chunk);
      }
      Work::fold(chunk, totals[c / kStep]);
    }
    if (whole < channels) {
      Work::fill(pass, FillEach{whole}, channel);
      typename Work::Chunk chunk{};
      for (int64_t at = first + whole; at < last; at += channels) {
        Work::template run<true>(pass, at, channels - whole, channel, chunk);
      }
      Work::fold(chunk, totals[whole / kStep]);
    }
  }
}
