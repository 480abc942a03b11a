// What the passes of bn_passes.h do to one vector.
// No include guard: bn_walks.h includes this once per instruction set, each time into a namespace
// of its own.
//
// Step<Pass>: Channel holds the numbers of one channel in all lanes, or of one column per lane.
// run() treats one part of the vector at `at`, with kSome of its first n elements: what it sums
// goes into a Chunk, which fold() adds to the Totals; what it computes, to `out`, goes to
// target(). prefetch() is for what comes a block or an outer index later: neither walk is regular
// enough for the hardware, and without it memory decides (2 to 4 times the time at 16 MB).

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
    g = select(z <= W{}, W{}, g);
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
    y = select(low > W{} + V(6), W{} + V(6), low);
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V, W& g) {
    g = select(z <= W{}, W{}, g);
    g = select(z >= W{} + V(6), W{}, g);
  }
};
template <>
struct Functor<Kind::leaky_relu> {
  static constexpr bool kExact = false;
  static constexpr bool kSign = true;
  template <typename W, typename V>
  static LC_INLINE void apply(const W& z, V slope, W& y) {
    y = select(z > W{}, z, z * slope);
  }
  template <typename W, typename V>
  static LC_INLINE void mask(const W& z, V slope, W& g) {
    g = select(z > W{}, g, g * slope);
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
    g = select(z >= W{} + V(3), g, bent);
    g = select(z <= W{} - V(3), W{}, g);
  }
};

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
