// What every CUDA op needs of torch: the current device and stream, and an answer to failures.
//
// tests/cuda_on_cpu compiles the ops for CPU tensors and another library name, without USE_CUDA. It
// refuses launches on another stream than the one that they get here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/rectify.h"
#include "rectify_arguments.h"

#if !defined(LC_CUDA_LIBRARY)
#define LC_CUDA_LIBRARY layer_collapse
#define LC_CUDA_KEY CUDA
#endif

namespace layer_collapse {

using torch::headeronly::ScalarType;

// Threads per block; tests on the CPU try others.
#if defined(USE_CUDA)
inline constexpr int kOpThreads = 256;
#else
inline int kOpThreads = 256;
inline char stream_of_tests;  // its address stands for torch's current stream
#endif

// Makes a tensor's device current while it lives; stream(): the one that torch uses there.
class OnDevice {
 public:
#if defined(USE_CUDA)
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#else
  explicit OnDevice(const Tensor&) {}

 private:
  static constexpr void* stream_ = &stream_of_tests;
#endif

 public:
  void* stream() const { return stream_; }
};

inline void check_launch(const char* op, int error) {
  check(error == 0, op, ": the kernel must start (got cudaError_t ", error, ")");
}

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      return Dtype::float16;
  }
}

inline void check_device(const char* op, const char* list, size_t i, const Tensor& tensor,
                         const Tensor& first) {
  check(same_device(tensor, first), op, ": ", list, "[", i,
        "] must be on the device of the first tensor (got another device)");
}

}  // namespace layer_collapse
