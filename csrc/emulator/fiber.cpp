#include "fiber.h"

#include "sanitizers.h"

namespace simt {
namespace {

thread_local Fiber* starting = nullptr;  // makecontext passes no pointers

}  // namespace

Fiber::Fiber() : stack_(new char[kStackBytes]) {
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_.get();
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  makecontext(&inside_, &Fiber::enter, 0);
  SIMT_TSAN(tsan_inside_ = __tsan_create_fiber(0);)
}

Fiber::~Fiber() {
  SIMT_TSAN(__tsan_acquire(this); __tsan_destroy_fiber(tsan_inside_);)  // whatever it last did came before
}

void Fiber::enter() {
  Fiber* self = starting;
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &self->outside_bottom_, &self->outside_bytes_);)
  while (true) {
    self->idle_ = false;
    self->body_();
    self->idle_ = true;
    self->suspend();
  }
}

void Fiber::prepare(std::function<void()> body) { body_ = std::move(body); }

void Fiber::resume() {
  starting = this;
  SIMT_TSAN(tsan_outside_ = __tsan_get_current_fiber(); __tsan_switch_to_fiber(tsan_inside_, kSwitchWithoutOrder);)
  SIMT_ASAN(__sanitizer_start_switch_fiber(&fake_stack_outside_, stack_.get(), kStackBytes);)
  swapcontext(&outside_, &inside_);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(fake_stack_outside_, nullptr, nullptr);)
}

void Fiber::suspend() {
  SIMT_TSAN(__tsan_release(this); __tsan_switch_to_fiber(tsan_outside_, kSwitchWithoutOrder);)
  SIMT_ASAN(__sanitizer_start_switch_fiber(&fake_stack_inside_, outside_bottom_, outside_bytes_);)
  swapcontext(&inside_, &outside_);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(fake_stack_inside_, &outside_bottom_, &outside_bytes_);)
}

}  // namespace simt
