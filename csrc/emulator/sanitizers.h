// The sanitizers' interfaces for fibers, or nothing where they are off. The emulator's own sources are
// compiled without ThreadSanitizer (CMakeLists.txt), so that it sees the accesses of the kernels only; hence
// a define of our own.
#pragma once
#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(...) __VA_ARGS__
#else
#define SIMT_ASAN(...)
#endif

#ifdef SIMT_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define SIMT_TSAN(...) __VA_ARGS__
constexpr unsigned kSwitchWithoutOrder = 1;  // a switch of fibers does not order their memory accesses
#else
#define SIMT_TSAN(...)
#endif
