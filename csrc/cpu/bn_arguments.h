// What bn_rectify and its backward op have in common: arguments, layouts, numbers per channel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "core/rectifier.h"
#include "cpu/bn_jobs.h"

namespace layer_collapse {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// Of a dense tensor of at least two dims: channels on dim 1 are the fastest in memory.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.dim() > 5 || x.size(1) == 0) return false;
  int64_t expected = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fits;
  };
  bool fits = follows(1);
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) fits = fits && follows(dim);
  return fits && follows(0);
}

// x, or a row-major copy if x lies neither row-major nor channels_last. As torch's batch_norm,
// whose result has the same strides.
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

inline Span span_of(const Tensor& x) {
  const int64_t channels = x.size(1), rest = x.size(0) == 0 ? 0 : x.numel() / channels;
  if (!x.is_contiguous()) return {rest, channels, 1};
  return {x.size(0), channels, rest / std::max<int64_t>(x.size(0), 1)};
}

inline void check_channels(const char* op, const char* name, const std::optional<Tensor>& numbers,
                           int64_t channels) {
  check(!numbers || (is_weight_dtype(numbers->scalar_type()) && numbers->is_cpu() &&
                     numbers->numel() == channels && numbers->is_contiguous()),
        op, ": ", name, " must be a contiguous floating point CPU tensor of ", channels,
        " elements");
}

inline void check_input(const char* op, const Tensor& x, int64_t kind) {
  check(is_weight_dtype(x.scalar_type()), op,
        ": x must be float32, float64, bfloat16 or float16 (got ",
        torch::headeronly::toString(x.scalar_type()), ")");
  check(x.dim() >= 2 && x.numel() > 0, op,
        ": x must have elements and a channel dim 1 (got a tensor of ", x.dim(), " dims and ",
        x.numel(), " elements)");
  const auto rectifier = static_cast<Kind>(kind);
  check(rectifier == Kind::relu || rectifier == Kind::relu6 || rectifier == Kind::leaky_relu ||
            rectifier == Kind::hardswish,
        op, ": kind must be that of ReLU, ReLU6, LeakyReLU or Hardswish (got ", kind, ")");
}

// Numbers per channel as doubles, `fallback` for each without a tensor. Every NaN is the plain one,
// which the loops may round like a number.
inline std::vector<double> doubles_of(const std::optional<Tensor>& numbers, int64_t channels,
                                      double fallback) {
  std::vector<double> values(channels, fallback);
  if (!numbers) return values;
  visit_weight_type(numbers->scalar_type(), [&]<typename W>(std::type_identity<W>) {
    const auto* source = static_cast<const W*>(numbers->const_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      const auto value = static_cast<double>(source[c]);
      values[c] = value == value ? value : std::numeric_limits<double>::quiet_NaN();
    }
  });
  return values;
}

inline void write_doubles(const std::vector<double>& values, Tensor& numbers) {
  visit_weight_type(numbers.scalar_type(), [&]<typename W>(std::type_identity<W>) {
    auto* target = static_cast<W*>(numbers.mutable_data_ptr());
    for (size_t c = 0; c < values.size(); ++c) target[c] = static_cast<W>(values[c]);
  });
}

// z = alpha * (x - mean) + beta. From the rounded statistics, so that forward and backward agree on
// the bits of z.
template <typename V>
struct Affine {
  std::vector<double> weight;        // [C]
  std::vector<V> mean, alpha, beta;  // [C] and padding

  Affine(const std::optional<Tensor>& weights, const std::optional<Tensor>& biases,
         int64_t channels)
      : weight(doubles_of(weights, channels, 1.0)),
        mean(padded<V>(channels)),
        alpha(padded<V>(channels)),
        beta(padded<V>(channels)) {
    const auto bias = doubles_of(biases, channels, 0.0);
    std::copy(bias.begin(), bias.end(), beta.begin());
  }

  void set(int64_t c, V average, V invstd) {
    mean[c] = average;
    alpha[c] = static_cast<V>(static_cast<double>(invstd) * weight[c]);
  }

  Normalization<V> from(int64_t c) const {
    return {mean.data() + c, alpha.data() + c, beta.data() + c};
  }
};

// visit(std::type_identity<Rectifier>{})
template <typename Visit>
void visit_rectifier(Kind kind, const Visit& visit) {
  switch (kind) {
    case Kind::relu6:
      return visit(std::type_identity<BnRelu6>{});
    case Kind::leaky_relu:
      return visit(std::type_identity<BnLeakyRelu>{});
    case Kind::hardswish:
      return visit(std::type_identity<BnHardswish>{});
    default:
      return visit(std::type_identity<BnRelu>{});
  }
}

}  // namespace layer_collapse
