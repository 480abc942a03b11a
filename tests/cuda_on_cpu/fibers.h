// Threads of execution that take turns on one thread of the operating system (x86-64, System V).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#if !defined(__x86_64__)
#error "tests/cuda_on_cpu switches stacks in x86-64 assembly"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

// Saves the registers that a call must keep on the running stack, leaves its pointer in *from and
// goes on where `to` was left.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

class FiberPool {
 public:
  static FiberPool& instance() {
    static FiberPool pool;
    return pool;
  }

  // Prepares fibers 0 .. count - 1 to run body(i); they start when they are first resumed.
  void start(unsigned count, std::function<void(unsigned)> body) {
    body_ = std::move(body);
    while (fibers_.size() < count) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) std::abort();
      fibers_.push_back({static_cast<char*>(stack)});
    }
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = fibers_[i];
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber.stack, kStack);  // frames of the last body
#endif
      // as if cuda_on_cpu_switch had been called by nobody: six registers, then where to go on
      auto** top = reinterpret_cast<void**>(fiber.stack + kStack) - 2;
      top[0] = reinterpret_cast<void*>(&FiberPool::enter);
      for (int saved = 1; saved <= 6; ++saved) top[-saved] = nullptr;
      fiber.pointer = top - 6;
      fiber.done = false;
    }
  }

  // Runs fiber i until it leaves or ends.
  void resume(unsigned i) {
    if (fibers_[i].done) return;
    running_ = i;
    switch_to(&own_, fibers_[i].pointer, fibers_[i].stack, false);
  }

  void leave(bool for_good) {
    Fiber& fiber = fibers_[running_];
    fiber.done = for_good;
    switch_to(&fiber.pointer, own_, own_stack_, for_good);
  }

 private:
  static constexpr size_t kStack = size_t{1} << 18;
  struct Fiber {
    char* stack;
    void* pointer = nullptr;
    bool done = false;
  };

  static void enter() {
    FiberPool& pool = instance();
    pool.arrive(nullptr);
    pool.body_(pool.running_);
    pool.leave(true);
  }

  void switch_to(void** from, void* to, const void* stack, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    const size_t size = stack == own_stack_ && stack != nullptr ? own_size_ : kStack;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, stack, size);
    cuda_on_cpu_switch(from, to);
    arrive(fake);
#else
    (void)stack;
    (void)for_good;
    cuda_on_cpu_switch(from, to);
#endif
  }

  // What a fiber does first when it gets its turn: learn the stack that it came from.
  void arrive([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (size != kStack) {
      own_stack_ = const_cast<void*>(bottom);
      own_size_ = size;
    }
#endif
  }

  std::vector<Fiber> fibers_;
  std::function<void(unsigned)> body_;
  unsigned running_ = 0;
  void* own_ = nullptr;
  void* own_stack_ = nullptr;
  size_t own_size_ = 0;
};

inline void leave_fiber() { FiberPool::instance().leave(false); }

}  // namespace cuda_on_cpu
