// Runs CUDA kernels on a CPU, thread by thread, so that they can be tested and sanitised on
// machines without a GPU. It supplies what csrc/cuda/device.cuh takes from CUDA otherwise.
//
// A thread of a block is a fiber: it runs until it waits at a barrier or in a warp collective, then
// the next one does; blocks run one after another. `schedule` permutes both orders, so code that
// lacks a barrier gives different results. With CUDA_ON_CPU_THREADS every thread is an operating
// system thread and two blocks run at once, for ThreadSanitizer.
//
// What would be undefined on a GPU ends the process with a sentence: a barrier that not all threads
// of a block reach, or at different places; a warp collective whose mask names lanes that have
// left, do not take part, or that have another mask; a shuffle from a lane outside the mask. Bad
// accesses are the sanitisers': every shared variable is an allocation of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <source_location>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"
#include "halves.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

namespace cuda_on_cpu {

using Site = std::source_location;

// Order of threads and blocks: 0 ascending, 1 descending, others a shuffle with that seed.
inline unsigned schedule = 0;

// If not 0, only so many blocks at either end of a grid run: for tensors that nobody could fill.
inline unsigned ends = 0;

// The stream that every launch must be on: of ops the one that settings.cpp sets, of programs none.
inline void* stream = nullptr;

// A graph: what launches would have run while capturing, with the arguments that they were given.
inline bool capturing = false;
inline std::vector<std::function<void()>> graph;

struct Block;

struct Thread {
  uint3 index{};
  unsigned number = 0;
  bool fenced = false;  // since its last atomic
  Block* block = nullptr;
  unsigned lane() const { return number % 32; }
};

inline thread_local Thread* current = nullptr;

#if defined(CUDA_ON_CPU_THREADS)
using Mutex = std::mutex;
using Signal = std::condition_variable;
#else
struct Mutex {  // fibers take turns anyway
  void lock() {}
  void unlock() {}
};
struct Signal {
  void notify_all() {}
};
#endif

// What the lanes of a warp wait for, each with the mask and place of its collective.
struct Warp {
  uint32_t lanes = 0, left = 0, waiting = 0;  // that exist; that have returned; that wait
  uint32_t masks[32]{};
  Site sites[32]{};
  Mutex mutex;  // of its own: a lock that other warps take too would order what is not ordered
  Signal changed;
  uint64_t values[32]{}, results[32]{};  // brought; of the last collective that a lane was in
};

struct Block {
  uint3 index{}, threads{}, grid{};
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<unsigned char[], void (*)(void*)>> shared;
  unsigned arrived = 0, left = 0;  // at the barrier; returned from the kernel
  uint64_t barriers = 0;
  std::atomic<uint64_t> progress = 0;
  Site site{};
  Mutex mutex, shared_mutex;
  Signal changed;
};

[[noreturn]] inline void fault(const char* what, Site site) {
  std::fprintf(stderr, "cuda_on_cpu: %s at %s:%u (block %u, thread %u)\n", what, site.file_name(),
               static_cast<unsigned>(site.line()), current->block->index.x, current->number);
  std::abort();
}

// Lets other threads run until ready(), which `changed` tells of; `lock` guards what ready() reads.
template <typename Ready>
void wait_until(std::unique_lock<Mutex>& lock, [[maybe_unused]] Signal& changed,
                const Ready& ready) {
#if defined(CUDA_ON_CPU_THREADS)
  changed.wait(lock, ready);
#else
  Thread* self = current;
  while (!ready()) {
    lock.unlock();
    leave_fiber();
    current = self;
    lock.lock();
  }
#endif
  current->block->progress.fetch_add(1, std::memory_order_relaxed);
}

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline void block_barrier(Site site) {
  Block& block = *current->block;
  std::unique_lock lock(block.mutex);
  if (block.left > 0) fault("a barrier that threads have left the kernel without", site);
  if (block.arrived++ == 0) block.site = site;
  if (!same(block.site, site)) fault("a barrier reached at two places", site);
  const uint64_t mine = block.barriers;
  if (block.arrived == block.threads.x) {
    block.arrived = 0;
    ++block.barriers;
    block.changed.notify_all();
  }
  wait_until(lock, block.changed, [&] { return block.barriers != mine; });
}

// Every lane of `mask` brings a value and gets read(all values, by lane).
template <typename Read>
auto collective(uint32_t mask, uint64_t value, const Read& read, Site site) {
  Block& block = *current->block;
  Warp& warp = block.warps[current->number / 32];
  const unsigned me = current->lane();
  std::unique_lock lock(warp.mutex);
  if ((mask >> me & 1) == 0) fault("a lane outside of its own mask", site);
  if ((mask & ~warp.lanes) != 0) fault("a mask with lanes that do not exist", site);
  if ((mask & warp.left) != 0) fault("a mask with lanes that have left the kernel", site);
  // agreeing with one lane is agreeing with all that have agreed with it before
  if (const uint32_t others = warp.waiting & mask; others != 0) {
    const int other = std::countr_zero(others);
    if (warp.masks[other] != mask || !same(warp.sites[other], site)) {
      fault("lanes that disagree on a warp collective", site);
    }
  }
  warp.waiting |= 1U << me;
  warp.masks[me] = mask;
  warp.sites[me] = site;
  warp.values[me] = value;
  if ((warp.waiting & mask) == mask) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) != 0) warp.results[lane] = warp.values[lane];
    }
    warp.waiting &= ~mask;
    warp.changed.notify_all();
  }
  wait_until(lock, warp.changed, [&] { return (warp.waiting >> me & 1) == 0; });
  return read(warp.results);
}

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}
template <typename T>
T shuffle(uint32_t mask, T value, unsigned source, Site site) {
  if (source < 32 && (mask >> source & 1) == 0) fault("a shuffle from outside of the mask", site);
  const auto read = [&](const uint64_t* values) {
    T result = value;
    if (source < 32) std::memcpy(&result, &values[source], sizeof(result));
    return result;
  };
  return collective(mask, to_bits(value), read, site);
}

// The variable of the current block that belongs to a tag, a place in the source.
template <typename T, typename Tag>
T& shared_variable(Tag) {
  static const char tag = 0;
  Block& block = *current->block;
  const std::lock_guard lock(block.shared_mutex);
  auto found = block.shared.find(&tag);
  if (found == block.shared.end()) {
    auto* memory = static_cast<unsigned char*>(std::malloc(sizeof(T)));
    std::memset(memory, 0xcd, sizeof(T));
    found = block.shared
                .emplace(&tag, std::unique_ptr<unsigned char[], void (*)(void*)>(memory, std::free))
                .first;
  }
  return *reinterpret_cast<T*>(found->second.get());
}

inline void leave_kernel() {
  Block& block = *current->block;
  const std::lock_guard lock(block.mutex);
  if (block.arrived > 0) fault("a thread that leaves while others wait at a barrier", block.site);
  Warp& warp = block.warps[current->number / 32];
  const std::lock_guard warp_lock(warp.mutex);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((warp.waiting >> lane & 1) != 0 && (warp.masks[lane] >> current->lane() & 1) != 0) {
      fault("a lane that leaves while others wait for it", warp.sites[lane]);
    }
  }
  warp.left |= 1U << current->lane();
  ++block.left;
  block.progress.fetch_add(1, std::memory_order_relaxed);
}

inline std::vector<unsigned> order_of(unsigned count, unsigned salt) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0U);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), std::mt19937(schedule * 7919 + salt));
  return order;
}

template <typename Body>
void run_block(unsigned number, unsigned blocks, unsigned threads, const Body& body) {
  Block block;
  block.index.x = number;
  block.threads = {threads, 1, 1};
  block.grid = {blocks, 1, 1};
  block.warps = std::vector<Warp>((threads + 31) / 32);
  std::vector<Thread> members(threads);
  for (unsigned i = 0; i < threads; ++i) {
    members[i] = {{i, 0, 0}, i, false, &block};
    block.warps[i / 32].lanes |= 1U << i % 32;
  }
  const auto run = [&](unsigned i) {
    current = &members[i];
    body();
    leave_kernel();
  };
#if defined(CUDA_ON_CPU_THREADS)
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i) running.emplace_back(run, i);
  for (std::thread& thread : running) thread.join();
#else
  FiberPool& pool = FiberPool::instance();
  pool.start(threads, run);
  const std::vector<unsigned> order = order_of(threads, number);
  while (block.left < threads) {
    const uint64_t before = block.progress;
    for (unsigned i : order) pool.resume(i);
    if (block.progress == before)
      fault("a deadlock: not all threads reach a barrier or collective", block.site);
  }
#endif
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->block->index)
#define blockDim (cuda_on_cpu::current->block->threads)
#define gridDim (cuda_on_cpu::current->block->grid)

#define LC_SHARED(Type, name) Type& name = cuda_on_cpu::shared_variable<Type>([] {})
#define LC_UNROLL
#define LC_NO_UNROLL

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  cuda_on_cpu::block_barrier(site);
}
inline void __syncwarp(uint32_t mask = ~0U, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  cuda_on_cpu::collective(mask, 0, [](const uint64_t*) { return 0; }, site);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source,
              cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<unsigned>(source) % 32, site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance,
                  cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::current->lane() ^ distance, site);
}
// Lanes without a lane `distance` below them keep their value.
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance,
                 cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const unsigned lane = cuda_on_cpu::current->lane();
  return cuda_on_cpu::shuffle(mask, value, lane < distance ? lane : lane - distance, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const auto read = [mask](const uint64_t* values) {
    uint32_t bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) != 0 && values[lane] != 0) bits |= 1U << lane;
    }
    return bits;
  };
  return cuda_on_cpu::collective(mask, predicate != 0, read, site);
}
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }

// Relaxed as on a GPU, unless a fence comes before: sanitisers do not know fences.
template <typename T>
T atomicAdd(T* cell, std::type_identity_t<T> value) {
  const bool fenced = std::exchange(cuda_on_cpu::current->fenced, false);
  const std::memory_order order = fenced ? std::memory_order_acq_rel : std::memory_order_relaxed;
  return std::atomic_ref<T>(*cell).fetch_add(value, order);
}
template <typename T>
T atomicMin(T* cell, std::type_identity_t<T> value) {
  std::atomic_ref<T> shared(*cell);
  T before = shared.load(std::memory_order_relaxed);
  while (value < before &&
         !shared.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
  return before;
}
inline void __threadfence() { cuda_on_cpu::current->fenced = true; }
template <typename T>
T __ldcg(const T* cell) {
  return std::atomic_ref<T>(*const_cast<T*>(cell)).load(std::memory_order_relaxed);
}

inline uint4 __ldcg(const uint4* vector) { return *vector; }

namespace layer_collapse {

// By the rules of PTX, which C leaves open: -0.0 lies below 0.0. Found before the global functions.
inline float fminf(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
inline float fmaxf(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}

namespace detail {
template <typename Body>
void run_grid(unsigned count, int threads, const Body& body) {
  std::vector<unsigned> order;
  if (const unsigned ends = cuda_on_cpu::ends; ends == 0 || count <= 2 * ends) {
    order = cuda_on_cpu::order_of(count, 0);
  } else {
    for (unsigned i = 0; i < ends; ++i) order.insert(order.end(), {i, count - 1 - i});
  }
#if defined(CUDA_ON_CPU_THREADS)
  for (size_t i = 0; i < order.size(); i += 2) {
    std::thread other;
    if (i + 1 < order.size()) {
      other = std::thread([&, i] { cuda_on_cpu::run_block(order[i + 1], count, threads, body); });
    }
    cuda_on_cpu::run_block(order[i], count, threads, body);
    if (other.joinable()) other.join();
  }
#else
  for (unsigned block : order) cuda_on_cpu::run_block(block, count, threads, body);
#endif
}
}  // namespace detail

// The launcher's counterpart: runs the grid before it returns, or captures it. A launch on another
// stream than the op's is answered as CUDA answers a stream that it does not know.
template <typename... Parameters, typename... Arguments>
int launch_grid(void (*kernel)(Parameters...), unsigned blocks, int threads, void* stream,
                const Arguments&... arguments) {
  constexpr int kInvalidResourceHandle = 400;
  if (stream != cuda_on_cpu::stream) return kInvalidResourceHandle;
  const auto run = [=] { detail::run_grid(blocks, threads, [&] { kernel(arguments...); }); };
  if (cuda_on_cpu::capturing) {
    cuda_on_cpu::graph.push_back(run);
  } else {
    run();
  }
  return 0;
}

}  // namespace layer_collapse
