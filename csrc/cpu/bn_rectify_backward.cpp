// bn_rectify_backward: gradients of a batch-normalised rectifier. z is computed again from x, with
// forward's bits, so that neither z nor y has to be kept or read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bn_arguments.h"

namespace layer_collapse {
namespace {

template <typename Rectifier, typename T>
struct Backward {
  using V = Compute<T>;
  using First = GradSumsPass<Rectifier, T>;
  using Second = GradPass<Rectifier, T>;
  static constexpr bool needs_sums = true;

  const T* grad;
  const T* x;
  T* dx;
  Span span;
  bool training;
  V slope;
  Affine<V> affine;
  const V* invstd;                             // [C]
  std::vector<V> scale, tilt, offset;          // [C] and padding
  std::vector<double> grad_weight, grad_bias;  // [C]

  First first(int64_t c, int64_t at) const { return {grad + at, x + at, affine.from(c), slope}; }
  Second second(int64_t c, int64_t at) const {
    return {grad + at,        x + at,          dx + at,           affine.from(c),
            scale.data() + c, tilt.data() + c, offset.data() + c, slope};
  }

  // With xhat = (x - mean) * invstd: dx = weight * invstd * (g - mean(g) - xhat * mean(g * xhat)),
  // the means only where the statistics are the batch's own.
  bool finish(int64_t c, double sum, double product) {
    const auto n = static_cast<double>(span.positions());
    const double inverse = static_cast<double>(invstd[c]);
    const double factor = inverse * affine.weight[c];
    grad_bias[c] = sum;
    grad_weight[c] = product * inverse;
    scale[c] = static_cast<V>(factor);
    if (training) {
      tilt[c] = static_cast<V>(-factor * product * inverse * inverse / n);
      offset[c] = static_cast<V>(-factor * sum / n);
    }
    return true;
  }

  template <typename PickOf>
  void take(int64_t, int64_t, const PickOf&) {}
};

std::tuple<Tensor, Tensor, Tensor> bn_rectify_backward(Tensor grad, Tensor input,
                                                       std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias, Tensor mean,
                                                       Tensor invstd, bool training, int64_t kind,
                                                       double slope) {
  check_input("bn_rectify_backward", input, kind);
  const int64_t channels = input.size(1);
  check_channels("bn_rectify_backward", "weight", weight, channels);
  check_channels("bn_rectify_backward", "bias", bias, channels);
  check_channels("bn_rectify_backward", "mean", mean, channels);
  check_channels("bn_rectify_backward", "invstd", invstd, channels);
  bool fits = grad.scalar_type() == input.scalar_type() && grad.dim() == input.dim();
  for (int64_t d = 0; fits && d < grad.dim(); ++d) fits = grad.size(d) == input.size(d);
  check(fits, "bn_rectify_backward: grad must have x's shape and dtype");
  const auto statistics =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(mean.scalar_type() == statistics && invstd.scalar_type() == statistics,
        "bn_rectify_backward: mean and invstd must be what bn_rectify returned");

  const Tensor x = dense(input);
  Tensor dx = torch::stable::empty_like(x);
  const bool same_order =
      x.is_contiguous() ? grad.is_contiguous() : !grad.is_contiguous() && is_channels_last(grad);
  Tensor g = grad;
  if (!same_order) {
    g = torch::stable::empty_like(x);
    torch::stable::copy_(g, grad);
  }
  Tensor grad_weight =
      torch::stable::new_empty(x, {channels}, weight ? weight->scalar_type() : statistics);
  Tensor grad_bias =
      torch::stable::new_empty(x, {channels}, bias ? bias->scalar_type() : statistics);

  visit_weight_type(x.scalar_type(), [&]<typename T>(std::type_identity<T>) {
    using V = Compute<T>;
    visit_rectifier(static_cast<Kind>(kind),
                    [&]<typename Rectifier>(std::type_identity<Rectifier>) {
                      const auto* means = static_cast<const V*>(mean.const_data_ptr());
                      const auto* inverses = static_cast<const V*>(invstd.const_data_ptr());
                      Backward<Rectifier, T> job{static_cast<const T*>(g.const_data_ptr()),
                                                 static_cast<const T*>(x.const_data_ptr()),
                                                 static_cast<T*>(dx.mutable_data_ptr()),
                                                 span_of(x),
                                                 training,
                                                 static_cast<V>(slope),
                                                 {weight, bias, channels},
                                                 inverses,
                                                 padded<V>(channels),
                                                 padded<V>(channels),
                                                 padded<V>(channels),
                                                 std::vector<double>(channels),
                                                 std::vector<double>(channels)};
                      for (int64_t c = 0; c < channels; ++c)
                        job.affine.set(c, means[c], inverses[c]);
                      run_job<T>(job.span, job);
                      write_doubles(job.grad_weight, grad_weight);
                      write_doubles(job.grad_bias, grad_bias);
                    });
  });
  return {dx, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("bn_rectify_backward", TORCH_BOX(&bn_rectify_backward));
}

}  // namespace layer_collapse
