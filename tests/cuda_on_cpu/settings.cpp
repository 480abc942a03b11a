// What the tests set from Python (ctypes) before they call an op.
#include "cuda/on_device.h"
#include "cuda_on_cpu.h"

// Order of threads and blocks (cuda_on_cpu.h), and threads per block.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_set(unsigned schedule,
                                                                       int threads) {
  cuda_on_cpu::schedule = schedule;
  layer_collapse::kOpThreads = threads;
}
