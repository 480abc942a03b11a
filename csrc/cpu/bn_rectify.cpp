// bn_rectify: batch normalisation, a rectifier and the counts of the signs between the two, in one
// traversal after that of the statistics. x is read twice and y written once; eager code moves
// twice as much and keeps z.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "core/rectifier.h"
#include "cpu/bn_arguments.h"
#include "cpu/ledger_writes.h"

namespace layer_collapse {
namespace {

// The sums of x are taken around a guess of its mean; further off than this many deviations,
// rounding shows in the variance and they are taken again around the mean.
constexpr double kFarOff = 3.0;
constexpr int64_t kGuessRows = 16;

template <typename Rectifier, typename T>
struct Forward {
  using V = Compute<T>;
  using First = MomentsPass<T>;
  using Second = RectifyPass<Rectifier, T>;

  const T* x;
  T* y;
  Span span;
  bool needs_sums;  // training
  double momentum, eps;
  V slope;
  Affine<V> affine;
  V *mean, *invstd;                               // [C]
  std::vector<double> running_mean, running_var;  // [C]
  std::vector<double> new_mean, new_var;          // [C], what training makes of them
  int64_t* counts;                                // [rows][C], or null when nothing is counted
  std::vector<V> center;

  // Where rows are channels a second traversal for one of them is a whole one: guess better.
  void guess_centers() {
    center = padded<V>(span.channels);
    const int64_t samples = span.inner == 1 ? std::min(span.outer, kGuessRows) : 1;
    for (int64_t c = 0; c < span.channels; ++c) {
      double sum = 0;
      for (int64_t s = 0; s < samples; ++s) {
        const int64_t n = s * span.outer / samples;
        sum += static_cast<double>(static_cast<V>(x[(n * span.channels + c) * span.inner]));
      }
      if (std::isfinite(sum)) center[c] = static_cast<V>(sum / static_cast<double>(samples));
    }
  }

  First first(int64_t c, int64_t offset) const { return {x + offset, center.data() + c}; }
  Second second(int64_t c, int64_t offset) const {
    return {x + offset, y + offset, affine.from(c), slope};
  }

  bool finish(int64_t c, double sum, double squares) {
    const auto n = static_cast<double>(span.positions());
    const double shift = sum / n;
    const double average = static_cast<double>(center[c]) + shift;
    const double spread = squares / n - shift * shift;
    const double var = spread < 0 ? 0 : spread;  // not max(), which would hide a NaN
    const V better = static_cast<V>(average);
    if (shift * shift > kFarOff * kFarOff * var && better != center[c]) {
      center[c] = better;
      return false;
    }
    use(c, average, var);
    new_mean[c] = running_mean[c] + momentum * (average - running_mean[c]);
    new_var[c] = running_var[c] + momentum * (var * n / (n - 1) - running_var[c]);
    return true;
  }

  void use(int64_t c, double average, double var) {
    mean[c] = static_cast<V>(average);
    invstd[c] = static_cast<V>(1 / std::sqrt(var + eps));
    affine.set(c, mean[c], invstd[c]);
  }

  template <typename PickOf>
  void take(int64_t begin, int64_t count, const PickOf& pick_of) {
    using Found = typename Second::Totals;
    if (!counts) return;
    const std::lock_guard<std::mutex> lock(ledger_mutex());
    for (int64_t c = begin; c < begin + count; ++c) {
      const auto pick = pick_of(c - begin);
      counts[c] += pick(&Found::positive);
      counts[span.channels + c] += pick(&Found::negative);
      counts[2 * span.channels + c] += pick(&Found::nan);
      if constexpr (count_rows(Rectifier::kind) > 3) {
        counts[3 * span.channels + c] += pick(&Found::extra);
      }
    }
  }
};

void check_ledger(const Tensor& ledger, Kind kind, int64_t channels) {
  const int64_t words = kLedgerHeader + count_rows(kind) * channels;
  check(ledger.scalar_type() == ScalarType::Long && ledger.is_contiguous() && ledger.is_cpu() &&
            ledger.numel() == words,
        "bn_rectify: ledger must be a contiguous int64 CPU tensor of ", words, " words for ",
        channels, " channels (got ", torch::headeronly::toString(ledger.scalar_type()), " with ",
        ledger.numel(), " words)");
}

std::tuple<Tensor, Tensor, Tensor> bn_rectify(Tensor input, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias,
                                              std::optional<Tensor> running_mean,
                                              std::optional<Tensor> running_var, Tensor ledger,
                                              bool training, double momentum, double eps,
                                              int64_t kind, double slope) {
  check_input("bn_rectify", input, kind);
  const int64_t channels = input.size(1);
  check_channels("bn_rectify", "weight", weight, channels);
  check_channels("bn_rectify", "bias", bias, channels);
  check_channels("bn_rectify", "running_mean", running_mean, channels);
  check_channels("bn_rectify", "running_var", running_var, channels);
  check_ledger(ledger, static_cast<Kind>(kind), channels);
  check(training || (running_mean && running_var),
        "bn_rectify: running_mean and running_var must be given when not training (got none)");
  check(!training || input.numel() > channels,
        "bn_rectify: training needs more than one value per channel (got 1)");

  const Tensor x = dense(input);
  Tensor y = x.is_contiguous() ? torch::stable::new_empty(x, x.sizes())  // see dims of size 1
                               : torch::stable::empty_like(x);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const auto statistics = wide ? ScalarType::Double : ScalarType::Float;
  Tensor mean = torch::stable::new_empty(x, {channels}, statistics);
  Tensor invstd = torch::stable::new_empty(x, {channels}, statistics);
  auto* words = static_cast<int64_t*>(ledger.mutable_data_ptr());
  const bool counted = counts_now(words);
  if (counted) add_positions(words, input.numel() / channels);

  visit_weight_type(x.scalar_type(), [&]<typename T>(std::type_identity<T>) {
    using V = Compute<T>;
    visit_rectifier(static_cast<Kind>(kind),
                    [&]<typename Rectifier>(std::type_identity<Rectifier>) {
                      Forward<Rectifier, T> job{static_cast<const T*>(x.const_data_ptr()),
                                                static_cast<T*>(y.mutable_data_ptr()),
                                                span_of(x),
                                                training,
                                                momentum,
                                                eps,
                                                static_cast<V>(slope),
                                                {weight, bias, channels},
                                                static_cast<V*>(mean.mutable_data_ptr()),
                                                static_cast<V*>(invstd.mutable_data_ptr()),
                                                doubles_of(running_mean, channels, 0.0),
                                                doubles_of(running_var, channels, 0.0),
                                                std::vector<double>(channels),
                                                std::vector<double>(channels),
                                                counted ? words + kLedgerHeader : nullptr,
                                                {}};
                      if (training) {
                        job.guess_centers();
                      } else {
                        for (int64_t c = 0; c < channels; ++c)
                          job.use(c, job.running_mean[c], job.running_var[c]);
                      }
                      run_job<T>(job.span, job);
                      if (training && running_mean) write_doubles(job.new_mean, *running_mean);
                      if (training && running_var) write_doubles(job.new_var, *running_var);
                    });
  });
  if (counted) refresh_if_live(words, channels, static_cast<Kind>(kind));
  return {y, mean, invstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) { m.impl("bn_rectify", TORCH_BOX(&bn_rectify)); }

}  // namespace layer_collapse
