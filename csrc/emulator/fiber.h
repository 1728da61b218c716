// A fiber: a function with its own stack that can pause in the middle. Every emulated CUDA thread is one. The
// sanitizers are told about each switch: to ThreadSanitizer every fiber is a thread of its own.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // What the next resume() runs.
  void prepare(std::function<void()> body);

  // Runs the body until it calls suspend() or returns.
  void resume();

  // Called inside the body: goes back to where resume() was called.
  void suspend();

  // Whether the body returned; a fiber in the middle of a body can only be destroyed.
  bool idle() const { return idle_; }

 private:
  static void enter();

  static constexpr size_t kStackBytes = size_t(64) << 10;
  std::function<void()> body_;
  bool idle_ = true;
  std::unique_ptr<char[]> stack_;
  ucontext_t inside_;
  ucontext_t outside_;
  // for AddressSanitizer
  void* fake_stack_inside_ = nullptr;
  void* fake_stack_outside_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_bytes_ = 0;
  // for ThreadSanitizer
  void* tsan_inside_ = nullptr;
  void* tsan_outside_ = nullptr;
};

}  // namespace simt
