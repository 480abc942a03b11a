// rectify, rectify_: a rectifier and the counts of its input's signs, in one pass on the CPU.
//
// The ledger is written through atomics on integers: several threads add in any order and the sum
// is the same. Nothing is counted while the ledger's flag is off, nor when autograd replays a
// forward under activation checkpointing (the first run has counted it).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "core/entropy.h"
#include "core/rectifier.h"
#include "cpu/layout.h"
#include "cpu/rectify_loops.h"

// Exported by libtorch_cpu but not part of the stable ABI: -1 outside of a backward pass.
// tests/test_abi.py calls it on every release that is supported.
namespace torch::autograd {
int get_current_graph_task_id();
}

namespace layer_collapse {
namespace {

constexpr int64_t kSegment = 1 << 15;  // elements of a row that one task takes
constexpr int64_t kGrain = 1 << 15;    // elements below which a second thread does not pay

void add(int64_t* cell, int64_t value) {
  if (value != 0) std::atomic_ref<int64_t>(*cell).fetch_add(value, std::memory_order_relaxed);
}

struct Task {
  const Layout* layout;
  const bool* valid;  // [outer * inner] or null
  int64_t* counts;    // [rows][C], or null when nothing is counted
  double slope;
  const void* slopes;  // [C] or [1] of x's dtype for PReLU, else null
  int64_t slope_count;
};

// Plane layout: tasks are segments of rows.
template <typename Rectifier, typename T>
void run_planes(const Task& task, const T* x, T* y) {
  using V = Compute<T>;
  const auto& [outer, channels, inner, outer_dims, inner_dims] = *task.layout;
  const int64_t segments = (inner + kSegment - 1) / kSegment;
  const T* slopes = static_cast<const T*>(task.slopes);
  const int64_t C = channels, plane = inner;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(inner, kSegment));
  torch::stable::parallel_for(0, outer * channels * segments, grain, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; ++item) {
      const int64_t row = item / segments, start = item % segments * kSegment;
      const int64_t n = std::min(kSegment, plane - start), c = row % C;
      const V slope = slopes ? static_cast<V>(slopes[task.slope_count == 1 ? 0 : c])
                             : static_cast<V>(task.slope);
      const T* source = x + row * plane + start;
      T* target = y + row * plane + start;
      const bool* valid = task.valid ? task.valid + row / C * plane + start : nullptr;
      const RowCounts found =
          valid ? rectify_row<Rectifier, T, true>(source, target, valid, n, slope)
                : rectify_row<Rectifier, T, false>(source, target, valid, n, slope);
      if (!task.counts) continue;
      add(task.counts + c, found.positive);
      add(task.counts + C + c, found.negative);
      add(task.counts + 2 * C + c, found.nan);
      if constexpr (count_rows(Rectifier::kind) > 3) add(task.counts + 3 * C + c, found.extra);
    }
  });
}

// Channel-fastest layout: tasks are rows of all channels, counted in 32 bits per thread.
template <typename Rectifier, typename T>
void run_channels(const Task& task, const T* x, T* y) {
  using V = Compute<T>;
  const int64_t C = task.layout->channels;
  std::vector<V> slopes;
  for (int64_t c = 0; task.slopes && c < C; ++c) {
    const T* source = static_cast<const T*>(task.slopes);
    slopes.push_back(static_cast<V>(source[task.slope_count == 1 ? 0 : c]));
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1));
  torch::stable::parallel_for(0, task.layout->outer, grain, [&](int64_t from, int64_t to) {
    constexpr int64_t rows = count_rows(Rectifier::kind);
    std::vector<int32_t> counts(rows * C, 0);
    auto flush = [&] {
      for (int64_t cell = 0; task.counts && cell < rows * C; ++cell) {
        add(task.counts + cell, counts[cell]);
      }
      std::fill(counts.begin(), counts.end(), 0);
    };
    for (int64_t row = from, since = 0; row < to; ++row) {
      rectify_channels<Rectifier, T>(
          x + row * C, y + row * C, slopes.empty() ? nullptr : slopes.data(),
          static_cast<V>(task.slope), counts.data(), C, !task.valid || task.valid[row]);
      if (++since == (int64_t{1} << 30)) {  // before a 32-bit counter can overflow
        flush();
        since = 0;
      }
    }
    flush();
  });
}

template <typename Rectifier, typename T>
void run(const Task& task, const void* x, void* y) {
  const auto* source = static_cast<const T*>(x);
  auto* target = static_cast<T*>(y);
  if (task.layout->inner == 1) {
    run_channels<Rectifier, T>(task, source, target);
  } else {
    run_planes<Rectifier, T>(task, source, target);
  }
}

template <typename T>
void run_kind(Kind kind, const Task& task, const void* x, void* y) {
  switch (kind) {
    case Kind::relu:
      return run<Relu, T>(task, x, y);
    case Kind::relu6:
      return run<Relu6, T>(task, x, y);
    case Kind::leaky_relu:
    case Kind::prelu:
      return run<LeakyRelu, T>(task, x, y);
    case Kind::hardswish:
      return run<Hardswish, T>(task, x, y);
    case Kind::gelu:
    case Kind::gelu_tanh:
    case Kind::silu:
      return run<CountOnly, T>(task, x, y);
  }
}

bool is_smooth(Kind kind) {
  return kind == Kind::gelu || kind == Kind::gelu_tanh || kind == Kind::silu;
}

// Torch's own kernel for the rectifiers whose bits differ between layouts and instruction sets.
Tensor smooth(Kind kind, const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(x), 0};
  if (kind == Kind::silu) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::silu", "", stack.data(), TORCH_ABI_VERSION));
  } else {
    stack[1] = from(std::string(kind == Kind::gelu_tanh ? "tanh" : "none"));
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Torch's result strides: where x is contiguous, most kernels give dims of size 1 (whose stride
// says nothing) the plain one and not x's. A convolution chooses its layout by them.
Tensor empty_result(Kind kind, const Tensor& x) {
  if (x.is_contiguous() && kind != Kind::relu6 && kind != Kind::prelu) {
    return torch::stable::new_empty(x, x.sizes());
  }
  return torch::stable::empty_like(x);
}

// Activates x into y (which may be x) and counts. y and x have the
// same strides and leave no gaps, in storage order `order`.
void rectify_into(const Tensor& x, Tensor& y, Tensor& ledger, Kind kind, int64_t channel_dim,
                  double slope, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& valid, const std::vector<int64_t>& order) {
  const Layout layout = layout_of(x, order, channel_dim);
  auto* words = static_cast<int64_t*>(ledger.mutable_data_ptr());
  const bool counted =
      (words[kFlags] & kCount) != 0 && torch::autograd::get_current_graph_task_id() == -1;

  Task task{&layout, nullptr, counted ? words + kLedgerHeader : nullptr, slope, nullptr, 0};
  std::optional<Tensor> slopes;
  if (weight) {
    slopes = torch::stable::contiguous(*weight);
    task.slopes = slopes->const_data_ptr();
    task.slope_count = slopes->numel();
  }
  std::unique_ptr<bool[]> mask;
  const int64_t positions = layout.outer * layout.inner;
  if (counted && valid) {
    mask = valid_in_storage_order(*valid, x, layout, channel_dim);
    task.valid = mask.get();
  }
  if (counted) {
    add(words + kPositions,
        mask ? std::count(mask.get(), mask.get() + positions, true) : positions);
  }
  if (x.numel() == 0) return;
  const void* source = x.const_data_ptr();
  void* target = y.mutable_data_ptr();
  visit_weight_type(x.scalar_type(), [&]<typename T>(std::type_identity<T>) {
    run_kind<T>(kind, task, source, target);
  });
  if (counted && (words[kFlags] & kLive) != 0) refresh_live(words, layout.channels, kind);
}

int64_t check_arguments(const Tensor& x, const Tensor& ledger, int64_t kind, int64_t channel_dim,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& valid) {
  check(kind >= 0 && kind < kKinds, "rectify: kind must be 0 to ", kKinds - 1, " (got ", kind, ")");
  const auto dtype = x.scalar_type();
  check(is_weight_dtype(dtype), "rectify: x must be float32, float64, bfloat16 or float16 (got ",
        torch::headeronly::toString(dtype), ")");
  check(x.dim() >= 1, "rectify: x must have a channel dim (got a tensor of no dims)");
  check(channel_dim >= -x.dim() && channel_dim < x.dim(),
        "rectify: channel_dim must be a dim of x, ", -x.dim(), " to ", x.dim() - 1, " (got ",
        channel_dim, ")");
  const int64_t dim = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
  const int64_t channels = x.size(dim);
  const int64_t words = kLedgerHeader + count_rows(static_cast<Kind>(kind)) * channels;
  check(ledger.scalar_type() == ScalarType::Long && ledger.is_contiguous() && ledger.is_cpu() &&
            ledger.numel() == words,
        "rectify: ledger must be a contiguous int64 CPU tensor of ", words, " words for ", channels,
        " channels (got ", torch::headeronly::toString(ledger.scalar_type()), " with ",
        ledger.numel(), " words)");
  const bool needs_weight = static_cast<Kind>(kind) == Kind::prelu;
  check(weight.has_value() == needs_weight, "rectify: weight belongs to PReLU and to no other kind",
        needs_weight ? " (got none for PReLU)" : " (got one)");
  check(!weight || (weight->scalar_type() == dtype &&
                    (weight->numel() == 1 || weight->numel() == channels)),
        "rectify: weight must have x's dtype and 1 or ", channels, " elements");
  if (valid) {
    check(valid->scalar_type() == ScalarType::Bool, "rectify: valid must be bool (got ",
          torch::headeronly::toString(valid->scalar_type()), ")");
    bool fits = valid->dim() == x.dim() - 1;
    for (int64_t d = 0; fits && d < valid->dim(); ++d) {
      fits = valid->size(d) == x.size(d < dim ? d : d + 1);
    }
    check(fits, "rectify: valid must have the shape of x without its channel dim");
  }
  return dim;
}

Tensor rectify(Tensor x, Tensor ledger, int64_t kind, int64_t channel_dim, double slope,
               std::optional<Tensor> weight, std::optional<Tensor> valid) {
  const int64_t dim = check_arguments(x, ledger, kind, channel_dim, weight, valid);
  auto order = storage_order(x);
  // A tensor with gaps is copied once, into the layout that its result has anyway.
  Tensor source = order ? x : torch::stable::clone(x);
  if (!order) order = storage_order(source);
  const auto rectifier = static_cast<Kind>(kind);
  Tensor y = is_smooth(rectifier)      ? smooth(rectifier, x)
             : source.get() == x.get() ? empty_result(rectifier, x)
                                       : source;
  rectify_into(source, y, ledger, rectifier, dim, slope, weight, valid, *order);
  return y;
}

void rectify_(Tensor x, Tensor ledger, int64_t kind, int64_t channel_dim, double slope,
              std::optional<Tensor> weight, std::optional<Tensor> valid) {
  const auto rectifier = static_cast<Kind>(kind);
  const int64_t dim = check_arguments(x, ledger, kind, channel_dim, weight, valid);
  for (int64_t d = 0; d < x.dim(); ++d) {
    check(x.stride(d) != 0 || x.size(d) < 2, "rectify_: x must not be expanded (dim ", d,
          " has stride 0)");
  }
  const auto order = storage_order(x);
  if (order && !is_smooth(rectifier)) {
    rectify_into(x, x, ledger, rectifier, dim, slope, weight, valid, *order);
  } else {
    torch::stable::copy_(x, rectify(x, ledger, kind, channel_dim, slope, weight, valid));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("rectify", TORCH_BOX(&rectify));
  m.impl("rectify_", TORCH_BOX(&rectify_));
}

}  // namespace layer_collapse
