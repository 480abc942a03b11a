// masked_sgd_, masked_adamw_ and apply_masks_ on the CPU: one pass over each weight and its state,
// a cache line at a time; lines without an alive weight are skipped (line_walk.h, masked_rules.h).
//
// Mask bits count logical indices. A tensor whose memory has another order (channels_last) is
// walked along its memory, and its mask words are gathered into that order a few at a time, so
// neither the weights nor the mask are ever copied.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <variant>

#include "cpu/line_walk.h"
#include "cpu/masked_rules.h"
#include "cpu/step_arguments.h"

namespace layer_collapse {
namespace {

#define LC_RULE(Rule)                                                                      \
  LC_CLONES void run(const Rule& rule, const uint32_t* words, int64_t first, int64_t last, \
                     int64_t numel) {                                                      \
    walk_lines(rule, words, first, last, numel);                                           \
  }
LC_RULE(SgdRule<float>)
LC_RULE(SgdRule<double>)
LC_RULE(SgdRule<BFloat16>)
LC_RULE(SgdRule<Half>)
LC_RULE(AdamWRule<float>)
LC_RULE(AdamWRule<double>)
LC_RULE(AdamWRule<BFloat16>)
LC_RULE(AdamWRule<Half>)
LC_RULE(ZeroRule<uint16_t>)
LC_RULE(ZeroRule<uint32_t>)
LC_RULE(ZeroRule<uint64_t>)
#undef LC_RULE

template <template <typename> class Rule>
using RuleOf = std::variant<Rule<float>, Rule<double>, Rule<BFloat16>, Rule<Half>>;

// Words begin .. end of the mask in the memory order of its tensor, into words[end - begin] zeros.
void gather_words(const MaskedTensor& tensor, int64_t begin, int64_t end, uint32_t* words) {
  const int64_t base = begin * kWordBits;
  const int64_t count = std::min(end * kWordBits, tensor.numel) - base;
  tensor.walk.stretches(base, count,
                        [&](int64_t j, int64_t logical, int64_t length, int64_t stride) {
                          uint32_t* word = words + j / kWordBits;
                          int64_t filled = j % kWordBits;
                          uint64_t pending = 0;
                          StridedBits(stride).run(tensor.words, mask_words(tensor.numel), logical,
                                                  length, [&](uint32_t bits, int64_t taken) {
                                                    pending |= uint64_t{bits} << filled;
                                                    filled += taken;
                                                    if (filled < kWordBits) return;
                                                    *word++ |= static_cast<uint32_t>(pending);
                                                    pending >>= kWordBits;
                                                    filled -= kWordBits;
                                                  });
                          if (filled > 0) *word |= static_cast<uint32_t>(pending);
                        });
}

template <typename Rule>
void run_in_memory_order(const Rule& rule, const MaskedTensor& tensor, int64_t first,
                         int64_t last) {
  if (tensor.contiguous || tensor.words == nullptr) {
    run(rule, tensor.words ? tensor.words + first : nullptr, first, last, tensor.numel);
    return;
  }
  constexpr int64_t kBatch = 64;
  for (int64_t begin = first; begin < last; begin += kBatch) {
    const int64_t end = std::min(begin + kBatch, last);
    std::array<uint32_t, kBatch> gathered{};
    gather_words(tensor, begin, end, gathered.data());
    run(rule, gathered.data(), begin, end, tensor.numel);
  }
}

template <typename Rules>
void run_all(const std::vector<MaskedTensor>& tensors, const Rules& rules) {
  parallel_word_ranges(tensors, [&](std::span<const WordRange> ranges) {
    for (const auto& [i, first, last] : ranges) {
      std::visit([&](const auto& rule) { run_in_memory_order(rule, tensors[i], first, last); },
                 rules[i]);
    }
  });
}

void masked_sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors masks, double lr,
                 double momentum, double dampening, double weight_decay, bool nesterov,
                 bool maximize, bool first_step, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf) {
  constexpr const char* kOp = "masked_sgd_";
  const std::vector<MaskedTensor> views = view_params(kOp, params, masks);
  const Tensors slopes = lay_out_grads(kOp, grads, params);
  if (momentum != 0) {
    check_state(kOp, "momentum_buffers", momentum_buffers, params);
  } else {
    check(momentum_buffers.empty(), kOp, ": momentum_buffers must be empty without momentum (got ",
          momentum_buffers.size(), ")");
  }
  const std::optional<double> scale = read_grad_scale(kOp, grad_scale);
  if (found_inf && read_scalar(kOp, "found_inf", *found_inf) != 0) return;

  // Skipped lines must hold zeros; before the first step the buffers' memory may hold anything.
  if (first_step) {
    for (Tensor& buffer : momentum_buffers) torch::stable::zero_(buffer);
  }
  std::vector<RuleOf<SgdRule>> rules;
  rules.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    visit_weight_type(views[i].dtype, [&]<typename Weight>(std::type_identity<Weight>) {
      using Real = Compute<Weight>;
      rules.push_back(SgdRule<Weight>{
          static_cast<Weight*>(params[i].mutable_data_ptr()),
          static_cast<const Weight*>(slopes[i].const_data_ptr()),
          momentum != 0 ? static_cast<Weight*>(momentum_buffers[i].mutable_data_ptr()) : nullptr,
          static_cast<Real>(lr), static_cast<Real>(momentum), static_cast<Real>(1 - dampening),
          static_cast<Real>(weight_decay), make_gradient<Real>(scale, maximize),
          Choice<Real>(weight_decay != 0), Choice<Real>(nesterov), Choice<Real>(first_step)});
    });
  }
  run_all(views, rules);
}

void masked_adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors max_exp_avg_sqs, Tensors masks, Tensors steps, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  constexpr const char* kOp = "masked_adamw_";
  const bool amsgrad = !max_exp_avg_sqs.empty();
  const std::vector<MaskedTensor> views = view_params(kOp, params, masks);
  const Tensors slopes = lay_out_grads(kOp, grads, params);
  check_state(kOp, "exp_avgs", exp_avgs, params);
  check_state(kOp, "exp_avg_sqs", exp_avg_sqs, params);
  if (amsgrad) check_state(kOp, "max_exp_avg_sqs", max_exp_avg_sqs, params);
  check_length(kOp, "steps", steps.size(), params.size());
  const std::optional<double> scale = read_grad_scale(kOp, grad_scale);

  std::vector<RuleOf<AdamWRule>> rules;
  rules.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const double step = read_scalar(kOp, "steps", steps[i]);
    check(step >= 1, kOp, ": steps[", i, "] must be at least 1 (got ", step, ")");
    visit_weight_type(views[i].dtype, [&]<typename Weight>(std::type_identity<Weight>) {
      using Real = Compute<Weight>;
      const auto state = [&](const Tensors& list) {
        return static_cast<Weight*>(list[i].mutable_data_ptr());
      };
      rules.push_back(AdamWRule<Weight>{
          state(params), static_cast<const Weight*>(slopes[i].const_data_ptr()), state(exp_avgs),
          state(exp_avg_sqs), amsgrad ? state(max_exp_avg_sqs) : nullptr,
          static_cast<Real>(lr / (1 - std::pow(beta1, step))),
          static_cast<Real>(std::sqrt(1 - std::pow(beta2, step))),
          static_cast<Real>(1 - lr * weight_decay), static_cast<Real>(1 - beta1),
          static_cast<Real>(beta2), static_cast<Real>(1 - beta2), static_cast<Real>(eps),
          Choice<Real>(static_cast<Real>(1 - beta1) < Real{0.5}),
          make_gradient<Real>(scale, maximize)});
    });
  }
  if (found_inf && read_scalar(kOp, "found_inf", *found_inf) != 0) return;
  run_all(views, rules);
}

void apply_masks_(Tensors tensors, Tensors masks) {
  constexpr const char* kOp = "apply_masks_";
  check_length(kOp, "masks", masks.size(), tensors.size());
  std::vector<MaskedTensor> views;
  std::vector<std::variant<ZeroRule<uint16_t>, ZeroRule<uint32_t>, ZeroRule<uint64_t>>> rules;
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.push_back(view_in_memory_order(kOp, "tensors", i, tensors[i], masks[i]));
    void* data = tensors[i].mutable_data_ptr();
    switch (tensors[i].element_size()) {
      case 2:
        rules.emplace_back(ZeroRule<uint16_t>{static_cast<uint16_t*>(data)});
        break;
      case 4:
        rules.emplace_back(ZeroRule<uint32_t>{static_cast<uint32_t*>(data)});
        break;
      default:
        rules.emplace_back(ZeroRule<uint64_t>{static_cast<uint64_t*>(data)});
    }
  }
  run_all(views, rules);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layer_collapse, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
  m.impl("apply_masks_", TORCH_BOX(&apply_masks_));
}

}  // namespace layer_collapse
