// What the tests set from Python (ctypes) before they call an op.
#include <c10/core/Allocator.h>

#include <vector>

#include "cuda/on_device.h"
#include "cuda_on_cpu.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Before the first op is called: ops launch on the stream that OnDevice gives them, and no other.
__attribute__((constructor)) static void expect_the_stream_of_ops() {
  cuda_on_cpu::stream = &layer_collapse::stream_of_tests;
}

// Order of threads and blocks (cuda_on_cpu.h), and threads per block.
EXPORT void cuda_on_cpu_set(unsigned schedule, int threads) {
  cuda_on_cpu::schedule = schedule;
  layer_collapse::kOpThreads = threads;
}

namespace {

// Keeps what is allocated, as the private pool of a CUDA graph does.
class Pool : public c10::Allocator {
 public:
  c10::Allocator* const plain = c10::GetAllocator(c10::kCPU);
  std::vector<c10::DataPtr> kept;

  c10::DataPtr allocate(size_t bytes) override {
    kept.push_back(plain->allocate(bytes));
    void* memory = kept.back().get();
    return {memory, memory, [](void*) {}, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Pool& pool() {
  static Pool instance;
  return instance;
}

}  // namespace

// Kernels that are launched from now on are kept and not run; or run again.
EXPORT void cuda_on_cpu_capture(bool on) {
  if (on) {
    cuda_on_cpu::graph.clear();
    pool().kept.clear();
  }
  cuda_on_cpu::capturing = on;
  c10::SetAllocator(c10::kCPU, on ? &pool() : pool().plain, 255);
}

EXPORT void cuda_on_cpu_replay() {
  for (const auto& run : cuda_on_cpu::graph) run();
}
