// The loops of bn_walks.h. Sums are kept in the compute type for at most 16 vectors and in double
// after that.
// No include guard: bn_walks.h includes this once per instruction set, each time into a namespace
// of its own.

inline constexpr int64_t kAheadBytes = 4096;  // between what is prefetched and what is worked on

// One channel, or a vector of columns, with what its steps have summed since the last fold().
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
  const int64_t block_rows = std::clamp<int64_t>(8192 / row_bytes, 4, 16);
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
