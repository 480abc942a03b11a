// Kernels with one bug each, named by the argument: the tests require that every one is caught.
// "none" is the same kernel without a bug.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/reduce.cuh"

namespace layer_collapse {
namespace {

enum class Bug {
  none,
  missing_barrier,
  divergent_barrier,
  wrong_shuffle_mask,
  misaligned_access,
  out_of_bounds,
  shared_out_of_bounds,
  lost_atomic,
  early_return,
};

// sums[block]: the sum of the block's values; total: of all.
__global__ void sum_kernel(const float* values, float* sums, int* total, Bug bug) {
  using Partials = float[kMaxWarps];
  LC_SHARED(Partials, partials);
  const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (bug == Bug::early_return && threadIdx.x == 5) return;
  float sum = values[place + (bug == Bug::out_of_bounds ? 1 : 0)];
  if (bug == Bug::misaligned_access) {
    const float* start = values + (place == 0 ? 1 : 0);
    sum += bits_as<float>(reinterpret_cast<const uint4*>(start)->x) * 0.0F;
  }
  if (bug == Bug::wrong_shuffle_mask && lane < 16) {
    sum += __shfl_xor_sync(~0U, sum, 1) * 0.0F;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0U, sum, distance);
  }
  if (lane == 0) partials[bug == Bug::shared_out_of_bounds ? kMaxWarps + warp : warp] = sum;
  if (bug == Bug::divergent_barrier) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (bug != Bug::missing_barrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    float all = 0;
    for (unsigned i = 0; i < blockDim.x / kWarp; ++i) all += partials[i];
    sums[blockIdx.x] = all;
  }
  if (bug == Bug::lost_atomic) {
    *total += 1;
  } else {
    atomicAdd(total, 1);
  }
}

Bug named(const char* name) {
  const char* names[] = {"none",
                         "missing_barrier",
                         "divergent_barrier",
                         "wrong_shuffle_mask",
                         "misaligned_access",
                         "out_of_bounds",
                         "shared_out_of_bounds",
                         "lost_atomic",
                         "early_return"};
  for (int i = 0; i < 9; ++i) {
    if (std::strcmp(names[i], name) == 0) return static_cast<Bug>(i);
  }
  std::fprintf(stderr, "no such bug: %s\n", name);
  std::exit(2);
}

int run(Bug bug) {
  constexpr int kBlocks = 2, kSize = 64;
  const std::vector<float> values(kBlocks * kSize, 1.0F);
  int result = 0;
  // Schedules 0, 1 and shuffled ones; more often than a race needs to be seen once, if real threads
  // are let loose.
  for (unsigned schedule = 0; schedule < 60; ++schedule) {
    cuda_on_cpu::schedule = schedule;
    std::vector<float> sums(kBlocks);
    int total = 0;
    launch(sum_kernel, kBlocks, kSize, nullptr, values.data(), sums.data(), &total, bug);
    if (result == 0 && (sums[0] != kSize || sums[1] != kSize || total != kBlocks * kSize)) {
      std::fprintf(stderr, "wrong results with schedule %u\n", schedule);
      result = 3;
    }
  }
  return result;
}

}  // namespace
}  // namespace layer_collapse

int main(int count, char** arguments) {
  using namespace layer_collapse;
  return run(count > 1 ? named(arguments[1]) : Bug::none);
}
