// The exact k smallest |w| among alive weights, over lists of tensors, in the order of a stable
// sort by (|w|, tensor, index).
//
// As on the CPU (cpu/magnitude_cut.h): the bits of |w| order numbers like unsigned integers, so the
// histogram of the top 11 bits tells the bucket that holds the k-th smallest, a histogram of that
// bucket's next 11 bits narrows it down, and so on. On a GPU that is, per digit,
//   histogram_kernel  counts a block's weights in shared memory, then adds to hist[group]
//   choose_kernel     finds the bucket of every group and clears the histogram
// with nothing fetched, then or later: the cut stays in device memory, and what there is to refuse
// is told there too. What a launch adds to is cleared by the one that reads it, so a CUDA graph of
// all of them can be replayed. The op magnitude_histogram gives
// the histograms themselves, to be summed over ranks before a digit is chosen from them.
// A group is what one k belongs to: all tensors for magnitude_shares, one for magnitude_prune_.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/tensor_list.cuh"

namespace layer_collapse {

inline constexpr int kDigitBits = 11;
inline constexpr int kBuckets = 1 << kDigitBits;
// Words of a group's histogram: the buckets, then how many of the counted keys are NaN.
inline constexpr int kHistogram = kBuckets + 1;

// A group's cut: every key < prefix, and the first `left` weights whose key is prefix, once all
// digits are chosen.
struct Cut {
  uint64_t prefix;     // the digits chosen so far
  int64_t left;        // how many of the bucket's weights belong to the k smallest
  int64_t wanted;      // k
  int64_t nan_tensor;  // the first tensor with an alive NaN, or INT64_MAX
  int64_t failed;      // 1 if k is out of range or there is such a tensor: the cut means nothing
};

// A digit of the keys: bits [low, high) of `bits`; keys that count have `prefix` above them.
struct Digit {
  int high, low;
  bool first;
};

// |w| as an unsigned integer that orders alike: float, bfloat16 and half as a float's bits, with
// 64-bit keys all of them as a double's.
template <typename Key, typename T>
__device__ __forceinline__ Key key_of(typename Numeric<T>::Real weight) {
  if constexpr (sizeof(Key) == sizeof(double)) {
    return bits_as<uint64_t>(static_cast<double>(weight)) & ~(uint64_t{1} << 63);
  } else {
    return bits_as<uint32_t>(static_cast<float>(weight)) & ~(uint32_t{1} << 31);
  }
}
template <typename Key>
__device__ __forceinline__ Key infinity() {
  return sizeof(Key) == sizeof(double) ? static_cast<Key>(uint64_t{0x7ff} << 52)
                                       : static_cast<Key>(uint32_t{0xff} << 23);
}

inline constexpr int kSelectData = 1;
using SelectTable = TensorTable<kSelectData>;  // group: the tensor's group

// A number for each tensor of a table: its place in the list, or where its ties begin.
struct TensorNames {
  int64_t number[SelectTable::kTensors];
};

// visit(alive, key) for the weights of words begin .. end of a tensor, but for some that are not
// alive; the key of such a one means nothing.
template <typename Key, typename T, typename Visit>
__device__ __forceinline__ void visit_keys(const T* data, const uint32_t* words, int64_t numel,
                                           int64_t begin, int64_t end, const Visit& visit) {
  constexpr int kValues = kVectorValues<T>, kShare = kWordBits / kValues;  // threads per word
  constexpr int kAhead = 2;  // vectors on their way at a time
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0;
  const int64_t last = end * kWordBits < numel ? end : numel / kWordBits;
  const int64_t whole = aligned && last > begin ? last : begin;
  const int shift = static_cast<int>(threadIdx.x % kShare) * kValues;
  const int64_t stride = blockDim.x / kShare;
  LC_NO_UNROLL
  for (int64_t number = begin + threadIdx.x / kShare; number < whole; number += kAhead * stride) {
    uint32_t alive[kAhead];
    Vector<T, kValues> values[kAhead];
    LC_UNROLL
    for (int b = 0; b < kAhead; ++b) {
      const int64_t own = number + b * stride;
      alive[b] = own < whole ? whole_word_of(words, own) >> shift & ((1U << kValues) - 1) : 0;
      if (alive[b] == 0) continue;  // touches no weight
      // one access: a plain load would be split into one per alive weight
      const T* place = data + own * kWordBits + shift;
      values[b] = bits_as<Vector<T, kValues>>(__ldcg(reinterpret_cast<const uint4*>(place)));
    }
    LC_UNROLL
    for (int b = 0; b < kAhead; ++b) {
      if (alive[b] == 0) continue;
      LC_UNROLL
      for (int i = 0; i < kValues; ++i) {
        visit((alive[b] & 1U << i) != 0, key_of<Key, T>(values[b].get(i)));
      }
    }
  }
  walk_words<1>(words, numel, whole, end, [&](uint32_t word, int64_t place) {
    if ((word >> place % kWordBits & 1) != 0) visit(true, key_of<Key, T>(widen(data[place])));
  });
}

// Adds the digits of the weights that are still in question to hist[group][kHistogram]. names: of
// the table's tensors, for cuts[group].nan_tensor.
template <typename T, typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    histogram_kernel(const __grid_constant__ SelectTable table,
                     const __grid_constant__ TensorNames names, Cut* cuts, const Digit digit,
                     int64_t* hist) {
  using Buckets = int32_t[kBuckets];
  LC_SHARED(Buckets, buckets);
  const int tensor = tensor_of(table, blockIdx.x);
  Cut& cut = cuts[table.group[tensor]];
  if (cut.wanted == 0 || cut.failed != 0) return;
  LC_SHARED(int32_t, suspects);  // threads that have seen a NaN, alive or not
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) buckets[i] = 0;
  if (threadIdx.x == 0) suspects = 0;
  __syncthreads();
  const int64_t words = mask_words(table.numel[tensor]);
  const int64_t begin = (blockIdx.x - table.first[tensor]) * table.chunk;
  const int64_t end = begin + table.chunk < words ? begin + table.chunk : words;
  // The keys that count are `first` and those after it; none if the prefix is no key's.
  const Key prefix = static_cast<Key>(cut.prefix), first = prefix << digit.high;
  const Key range = first >> digit.high == prefix ? Key{1} << digit.high : 0;
  const T* data = static_cast<const T*>(table.data[tensor][0]);
  Key largest = 0;
  visit_keys<Key>(data, table.words[tensor], table.numel[tensor], begin, end,
                  [&](bool alive, Key key) {
                    largest = key > largest ? key : largest;
                    const Key place = key ^ first;
                    if (alive & (place < range)) {
                      atomicAdd(&buckets[static_cast<int>(place >> digit.low)], 1);
                    }
                  });
  if (largest > infinity<Key>()) atomicAdd(&suspects, 1);
  __syncthreads();
  int32_t nans = 0;
  if (suspects != 0) {  // seldom, so that the loop above need not count them
    walk_words<1>(table.words[tensor], table.numel[tensor], begin, end,
                  [&](uint32_t word, int64_t place) {
                    if ((word >> place % kWordBits & 1) == 0) return;
                    const Key key = key_of<Key, T>(widen(data[place]));
                    nans += (key ^ first) < range && key > infinity<Key>();
                  });
  }
  if (digit.first && nans != 0) {
    atomicMin(reinterpret_cast<long long*>(&cut.nan_tensor),
              static_cast<long long>(names.number[tensor]));
  }
  int64_t* sums = hist + table.group[tensor] * kHistogram;
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) add_to(sums + i, buckets[i]);
  add_to(sums + kBuckets, nans);
}

// One block per group: chooses the next digit of its cut from hist[group] and clears that; with the
// first digit writes info[group][3] (magnitude_select.h).
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    choose_kernel(Cut* cuts, const Digit digit, int64_t* hist, int64_t* failures, int64_t* info) {
  using Counts = int64_t[kThreads];
  LC_SHARED(Counts, counts);  // of each thread's buckets, then of all before them
  Cut& cut = cuts[blockIdx.x];
  int64_t* mine = hist + blockIdx.x * static_cast<int64_t>(kHistogram);
  const int share = kBuckets / blockDim.x;
  int64_t count = 0;
  for (int i = 0; i < share; ++i) count += mine[threadIdx.x * share + i];
  counts[threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      const int64_t here = counts[i];
      counts[i] = sum;
      sum += here;
    }
    if (digit.first) {
      const bool nan = cut.nan_tensor != INT64_MAX;
      int64_t* told = info + 3 * static_cast<int64_t>(blockIdx.x);
      told[0] = cut.wanted;
      told[1] = sum;
      told[2] = nan ? cut.nan_tensor : -1;
      cut.left = cut.wanted;
      cut.failed = cut.wanted < 0 || cut.wanted > sum || nan;
      if (cut.failed != 0) add_to(failures, 1);
    }
  }
  __syncthreads();
  // left is in (counts before the bucket, counts up to it] for exactly one bucket
  const int64_t left = cut.left;
  const bool open = cut.wanted > 0 && cut.failed == 0;
  __syncthreads();
  int64_t before = counts[threadIdx.x];
  for (int i = 0; i < share; ++i) {
    const int bucket = threadIdx.x * share + i;
    const int64_t here = mine[bucket];
    if (open && before < left && left <= before + here) {
      cut.prefix = cut.prefix << (digit.high - digit.low) | static_cast<uint64_t>(bucket);
      cut.left = left - before;
    }
    before += here;
    mine[bucket] = 0;
  }
  if (threadIdx.x == 0) mine[kBuckets] = 0;
}

}  // namespace layer_collapse
