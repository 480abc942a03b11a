// The loops of masked_step.h, once per machine (machines/*.cpp): one pass over each weight and its
// state, a cache line at a time; lines without an alive weight are skipped (line_walk.h,
// masked_rules.h).
//
// Mask bits count logical indices. A tensor whose memory has another order (channels_last) is
// walked along its memory, and its mask words are gathered into that order a few at a time, so
// neither the weights nor the mask are ever copied.
#pragma once

#include <array>
#include <cmath>
#include <variant>

#include "cpu/line_walk.h"
#include "cpu/masked_rules.h"
#include "cpu/masked_step.h"

namespace layer_collapse {
namespace LC_MACHINE {

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
    walk_lines(rule, tensor.words ? tensor.words + first : nullptr, first, last, tensor.numel);
    return;
  }
  constexpr int64_t kBatch = 1024;  // lines are asked for ahead within a batch only
  for (int64_t begin = first; begin < last; begin += kBatch) {
    const int64_t end = std::min(begin + kBatch, last);
    std::array<uint32_t, kBatch> gathered{};
    gather_words(tensor, begin, end, gathered.data());
    walk_lines(rule, gathered.data(), begin, end, tensor.numel);
  }
}

template <typename Tensors, typename Rules>
void run_all(const Tensors& tensors, const Rules& rules) {
  parallel_word_ranges(tensors, [&](std::span<const WordRange> ranges) {
    for (const auto& [i, first, last] : ranges) {
      std::visit([&](const auto& rule) { run_in_memory_order(rule, tensors[i], first, last); },
                 rules[i]);
    }
  });
}

template <typename Real>
Gradient<Real> make_gradient(std::optional<double> grad_scale, bool maximize) {
  return {static_cast<Real>(maximize ? -1 : 1), static_cast<Real>(grad_scale.value_or(1)),
          grad_scale.has_value()};
}

template <typename Weight>
SgdRule<Weight> make_rule(const StepTensor& tensor, const SgdOptions& how) {
  using Real = Compute<Weight>;
  return {static_cast<Weight*>(tensor.param),
          static_cast<const Weight*>(tensor.grad),
          static_cast<Weight*>(tensor.state[0]),
          static_cast<Real>(how.lr),
          static_cast<Real>(how.momentum),
          static_cast<Real>(how.weight_decay),
          static_cast<Real>(how.first_step ? 0 : how.momentum),
          static_cast<Real>(how.first_step ? 1 : 1 - how.dampening),
          how.nesterov,
          make_gradient<Real>(how.grad_scale, how.maximize),
          Choice<Real>(how.weight_decay != 0)};
}

template <typename Weight>
AdamWRule<Weight> make_rule(const StepTensor& tensor, const AdamWOptions& how) {
  using Real = Compute<Weight>;
  const auto state = [&](int i) { return static_cast<Weight*>(tensor.state[i]); };
  return {static_cast<Weight*>(tensor.param),
          static_cast<const Weight*>(tensor.grad),
          state(0),
          state(1),
          state(2),
          static_cast<Real>(how.lr / (1 - std::pow(how.beta1, tensor.step))),
          static_cast<Real>(std::sqrt(1 - std::pow(how.beta2, tensor.step))),
          static_cast<Real>(1 - how.lr * how.weight_decay),
          static_cast<Real>(1 - how.beta1),
          static_cast<Real>(how.beta2),
          static_cast<Real>(1 - how.beta2),
          static_cast<Real>(how.eps),
          Choice<Real>(static_cast<Real>(1 - how.beta1) < Real{0.5}),
          make_gradient<Real>(how.grad_scale, how.maximize)};
}

template <template <typename> class Rule, typename Options>
void step_all(std::span<const StepTensor> tensors, const Options& how) {
  std::vector<RuleOf<Rule>> rules;
  rules.reserve(tensors.size());
  for (const StepTensor& tensor : tensors) {
    visit_weight_type(tensor.dtype, [&]<typename Weight>(std::type_identity<Weight>) {
      rules.push_back(make_rule<Weight>(tensor, how));
    });
  }
  run_all(tensors, rules);
}

void sgd_run(std::span<const StepTensor> tensors, const SgdOptions& how) {
  step_all<SgdRule>(tensors, how);
}

void adamw_run(std::span<const StepTensor> tensors, const AdamWOptions& how) {
  step_all<AdamWRule>(tensors, how);
}

void zero_run(std::span<const ZeroTensor> tensors) {
  std::vector<std::variant<ZeroRule<uint16_t>, ZeroRule<uint32_t>, ZeroRule<uint64_t>>> rules;
  for (const ZeroTensor& tensor : tensors) {
    switch (tensor.dtype) {
      case ScalarType::Double:
        rules.emplace_back(ZeroRule<uint64_t>{static_cast<uint64_t*>(tensor.data)});
        break;
      case ScalarType::Float:
        rules.emplace_back(ZeroRule<uint32_t>{static_cast<uint32_t*>(tensor.data)});
        break;
      default:
        rules.emplace_back(ZeroRule<uint16_t>{static_cast<uint16_t*>(tensor.data)});
    }
  }
  run_all(tensors, rules);
}

}  // namespace LC_MACHINE
}  // namespace layer_collapse
