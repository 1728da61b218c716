// The only header that knows whether nvcc or a host compiler with the emulator compiles the kernels. Kernels
// use what CUDA and the emulator both have, and these names:
//   NF_LAUNCH((kernel<...>), grid, block, stream, arguments...)
//   NF_SHARED(type, name, size)    a shared array of the block
//   multiprocessors()              how many the current device has
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define NF_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define NF_SHARED(type, name, size) __shared__ type name[size]

namespace normfuse {

__device__ __forceinline__ uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Two units in the last place for 2^-126 <= b <= 2^126.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

}  // namespace normfuse

namespace normfuse::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
__device__ __forceinline__ float widen(bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(float16 v) { return __half2float(v); }
__device__ __forceinline__ void narrow(float v, bfloat16* to) { *to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, float16* to) { *to = __float2half_rn(v); }

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

}  // namespace normfuse::cuda

#else

#include "../emulator/simt.h"
#include "../host_types.h"

#define NF_LAUNCH(kernel, grid, block, stream, ...) simt::launch((grid), (block), [&] { kernel(__VA_ARGS__); })
#define NF_SHARED(type, name, size) type* const name = simt::shared<type>(size)

namespace normfuse::cuda {

inline float widen(bfloat16 v) { return to_float(v); }
inline float widen(float16 v) { return to_float(v); }
inline void narrow(float v, bfloat16* to) { *to = to_bfloat16(v); }
inline void narrow(float v, float16* to) { *to = to_float16(v); }

inline int multiprocessors() { return simt::options().multiprocessors; }

}  // namespace normfuse::cuda

#endif

namespace normfuse::cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ void narrow(float v, float* to) { *to = v; }
__device__ __forceinline__ void narrow(double v, double* to) { *to = v; }

}  // namespace normfuse::cuda

#define NORMFUSE_INLINE __device__ __forceinline__
#include "../channel_math.h"
#include "../curve_math.h"
#include "../row_math.h"
#include "../stat_group_math.h"
