// A guess, from a sample, at the range of keys that holds the k-th smallest alive magnitude.
//
// The sample is stratified: the alive weights, counted in mask order, are cut into equal parts and
// one weight is drawn from each by a fixed hash. It depends on the masks and weights alone, so
// every run, on any number of threads, guesses alike; and it need not be right, as the selection
// counts exactly and starts over from all keys if the guess was wrong.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/magnitude_keys.h"

namespace layer_collapse {

inline constexpr int64_t kSampleSize = 32768;

// The j-th set bit of a word with more than j of them.
LC_INLINE int nth_bit(uint32_t word, int64_t j) {
  for (; j > 0; --j) word &= word - 1;
  return std::countr_zero(word);
}

// The ranks among `alive` weights that are drawn, in rising order.
class Draw {
 public:
  explicit Draw(int64_t alive) : part_(alive / kSampleSize) { advance(); }

  int64_t rank() const { return rank_; }  // beyond all weights when none is left

  void advance() {
    const uint64_t hash = (static_cast<uint64_t>(number_) + 1) * 0x9E3779B97F4A7C15u >> 33;
    rank_ = number_ < kSampleSize
                ? number_ * part_ + static_cast<int64_t>(hash % static_cast<uint64_t>(part_))
                : std::numeric_limits<int64_t>::max();
    ++number_;
  }

 private:
  int64_t part_, number_ = 0, rank_;
};

// The mask positions of the drawn weights among words[count], whose first alive weight has rank
// `rank`; moves `rank` past them.
LC_CLONES inline void find_drawn(const uint32_t* words, int64_t count, int64_t& rank, Draw& draw,
                                 std::vector<int64_t>& positions) {
  for (int64_t number = 0; number < count; ++number) {
    const int64_t next = rank + std::popcount(words[number]);
    for (; draw.rank() < next; draw.advance()) {
      positions.push_back(number * kWordBits + nth_bit(words[number], draw.rank() - rank));
    }
    rank = next;
  }
}

template <typename Key>
struct Guess {
  KeyRange<Key> range;
  int64_t inside;  // about how many keys lie in it
};

template <typename Key>
Guess<Key> guess_range(const Views& views, int64_t alive, int64_t k) {
  std::vector<Key> sample;
  sample.reserve(kSampleSize);
  int64_t rank = 0;
  Draw draw(alive);
  std::vector<int64_t> positions;
  for (const Weights& weights : views) {
    positions.clear();
    if (weights.words != nullptr) {
      find_drawn(weights.words, mask_words(weights.numel), rank, draw, positions);
    } else {
      const int64_t next = rank + weights.numel;
      for (; draw.rank() < next; draw.advance()) positions.push_back(draw.rank() - rank);
      rank = next;
    }
    visit_weight_type(weights.dtype, [&]<typename Weight>(std::type_identity<Weight>) {
      const auto* data = static_cast<const Weight*>(weights.data);
      for (int64_t position : positions) {
        int64_t at = position;
        if (!weights.contiguous)
          weights.walk.run(position, 1, [&](int64_t, int64_t to) { at = to; });
        sample.push_back(magnitude_key<Key>(data[at]));
      }
    });
  }
  // Four standard deviations of how many of the sample are among the k smallest.
  const double share = static_cast<double>(k) / static_cast<double>(alive);
  const double size = static_cast<double>(kSampleSize);
  const double margin = 4 * std::sqrt(size * share * (1 - share)) + 2;
  const auto bound = [&](double place) {
    const auto nth = sample.begin() + static_cast<int64_t>(place);
    std::nth_element(sample.begin(), nth, sample.end());
    return std::min(*nth, kInfinity<Key>);
  };
  const double first = size * share - margin;
  const double last = size * share + margin;
  const Key low = first < 0 ? Key{0} : bound(first);
  const Key high = last >= size ? kInfinity<Key> : bound(last);
  const double width = std::min(last, size) - std::max(first, 0.0);
  return {{low, high - low + 1}, static_cast<int64_t>(width / size * static_cast<double>(alive))};
}

}  // namespace layer_collapse
