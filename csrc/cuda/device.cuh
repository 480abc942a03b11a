// What every kernel file includes: the CUDA built-ins, shared memory, launching.
//
// The kernels and launchers of this folder are compiled twice: by nvcc for GPUs, and unchanged by a
// C++ compiler for tests/cuda_on_cpu, whose cuda_on_cpu.h supplies the same names and runs them
// thread by thread on a CPU. So this folder uses no torch, and of CUDA only what both sides have.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// LC_SHARED(Type, name): a variable that the threads of a block share, not initialised.
#define LC_SHARED(Type, name) __shared__ Type name
// Before a loop over an array that must stay in registers.
#define LC_UNROLL _Pragma("unroll")
// Before a loop whose copies would only take registers.
#define LC_NO_UNROLL _Pragma("unroll 1")

namespace layer_collapse {

template <typename... Parameters, typename... Arguments>
int launch_grid(void (*kernel)(Parameters...), unsigned blocks, int threads, void* stream,
                const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace layer_collapse
#else
#include "cuda_on_cpu.h"
#endif

// What the hardware does with pairs of bfloat16 (cuda/numeric.cuh): 0 nothing, 1 minima and maxima,
// 2 comparisons too. Tests set it either way.
#if !defined(LC_BFLOAT16)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LC_BFLOAT16 0
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define LC_BFLOAT16 1
#else
#define LC_BFLOAT16 2
#endif
#endif

namespace layer_collapse {

// Starts kernel(arguments...) on `stream`; returns the cudaError_t, 0 if all is well. More blocks
// than a grid can have are refused before anything is cut off: cudaErrorInvalidConfiguration.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           const Arguments&... arguments) {
  constexpr int64_t kMostBlocks = INT32_MAX;
  constexpr int kInvalidConfiguration = 9;
  if (blocks < 1 || blocks > kMostBlocks) return kInvalidConfiguration;
  return launch_grid(kernel, static_cast<unsigned>(blocks), threads, stream, arguments...);
}

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // of every block that a launcher starts
inline constexpr int kMaxWarps = 32;  // of any block
// Blocks of kThreads that a multiprocessor must be able to hold: at most 64 registers per thread.
inline constexpr int kBlocksPerSm = 4;

using Half = __half;
using BFloat16 = __nv_bfloat16;

// The bits of a value as another type of the same size; compiles to nothing. By value: a copy from
// memory would be one byte at a time.
template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Adds to a counter that other blocks add to as well. Integers: any order gives the same sum.
__device__ __forceinline__ void add_to(int64_t* cell, int64_t value) {
  if (value != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(cell), static_cast<unsigned long long>(value));
  }
}

}  // namespace layer_collapse
