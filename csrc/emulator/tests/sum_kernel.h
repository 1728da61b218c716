// A two-stage sum, one block after another and the last one to finish on top: barriers, shared memory,
// shuffles, fences and atomics in one small kernel. The test plants bugs in it.
#pragma once
#include "../simt.h"

enum class Bug { kNone, kMissingBarrier, kMissingFence, kDivergentShuffle, kSkippedBarrier, kSharedOverflow };

struct SumArgs {
  const float* x;  // [gridDim.x * 64]
  float* partial;  // [gridDim.x]
  unsigned* done;  // [1], zero
  float* result;   // [1]
};

inline void sum_kernel(SumArgs a, Bug bug) {
  float* values = simt::shared<float>(64);
  int* is_last = simt::shared<int>(1);
  const unsigned i = threadIdx.x;
  if (bug == Bug::kSkippedBarrier && i == 63) return;
  values[i + (bug == Bug::kSharedOverflow)] = a.x[blockIdx.x * 64 + i];
  if (bug != Bug::kMissingBarrier) __syncthreads();

  float sum = 0;
  if (i < 32) {
    sum = values[i] + values[63 - i];
    for (unsigned distance = 16; distance > 0; distance /= 2)
      if (bug != Bug::kDivergentShuffle || i < distance) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (i == 0) {
    a.partial[blockIdx.x] = sum;
    if (bug != Bug::kMissingFence) __threadfence();
    *is_last = atomicAdd(a.done, 1u) == gridDim.x - 1;
    if (bug != Bug::kMissingFence) __threadfence();
  }
  __syncthreads();
  if (!*is_last || i != 0) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += a.partial[b];
  *a.result = total;
}

inline float run_sum(Bug bug, unsigned blocks) {
  float* x = new float[blocks * 64];
  float* partial = new float[blocks];
  for (unsigned i = 0; i < blocks * 64; ++i) x[i] = float(i % 7);
  unsigned done = 0;
  float result = -1;
  const SumArgs args{x, partial, &done, &result};
  try {
    simt::launch(dim3(blocks), dim3(64), [&] { sum_kernel(args, bug); });
  } catch (...) {
    delete[] x;
    delete[] partial;
    throw;
  }
  delete[] x;
  delete[] partial;
  return result;
}

inline float right_sum(unsigned blocks) {
  float sum = 0;
  for (unsigned i = 0; i < blocks * 64; ++i) sum += float(i % 7);
  return sum;
}
