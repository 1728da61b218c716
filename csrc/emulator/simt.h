// CUDA C++ kernels on the host: the names a kernel uses, and launch(). Slow, strict and meant for tests.
//
// Every thread of a block is a fiber; the fibers of a block run on one worker, one after another, each until
// it waits at a barrier or a warp operation. What a GPU leaves undefined is an error here (simt::Error says
// which threads wait where):
//   - a barrier that some threads of the block do not reach, or that threads wait for at different lines
//   - a warp operation that a lane of its mask does not reach, or reaches with another mask or at another
//   line
//   - a shuffle that reads a lane outside the mask
// Shared memory is a fresh allocation per block, filled with NaN bytes, so AddressSanitizer sees its bounds.
// Threads and blocks run forward, in reverse or shuffled: a missing barrier shows as a wrong result in some
// order. Several workers run blocks at the same time; under ThreadSanitizer barriers, fences and atomics
// order memory as CUDA promises, no more, so a missing barrier or __threadfence is reported as a race.
//
// Not emulated: textures, streams (launches run at once), cooperative groups, dynamic parallelism, inline
// PTX, spinning on another block.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the running thread; the scheduler sets them.
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace simt {

enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;
  unsigned seed = 1;        // of the random order
  unsigned workers = 1;     // blocks running at the same time
  int multiprocessors = 4;  // what the device claims to have
};
Options& options();

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a kernel waits, for diagnosis.
struct Site {
  const char* file;
  int line;
};

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel);

// The block's shared array that this line of code declares.
void* shared_bytes(size_t bytes, Site site);
template <class T>
T* shared(size_t count, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return static_cast<T*>(shared_bytes(count * sizeof(T), {file, line}));
}

void block_barrier(Site site);
// Gives `value` to the other lanes of the mask, and returns what lane `source` gave. No memory is ordered by it.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, Site site);
unsigned lane();

void fence();
void before_atomic(void* address);

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_barrier({file, line}); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, SIMT_SITE) {
  return simt::shuffle(mask, value, simt::lane() ^ lanes, {file, line});
}

inline void __threadfence() { simt::fence(); }

template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

// Relaxed, as on the device: an atomic alone orders no other memory.
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicAdd(T* address, T value) {
  simt::before_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
