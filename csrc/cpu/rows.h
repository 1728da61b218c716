// Loops over one row of channels. They are inlined into functions marked NORMFUSE_CLONES, which the compiler
// builds once per instruction set and the loader picks from; every loop is written so that it vectorises for
// all of them.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../host_types.h"
#include "../kernels.h"

#define NORMFUSE_INLINE inline
#include "../channel_math.h"
#include "../row_math.h"

// ThreadSanitizer is not ready yet when the loader picks.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define NORMFUSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NORMFUSE_CLONES
#endif
#define NORMFUSE_ROW_LOOP __attribute__((always_inline)) inline

namespace normfuse::cpu {

template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) { return to_float(v); }
inline float widen(float16 v) { return to_float(v); }

inline void narrow(float v, float* to) { *to = v; }
inline void narrow(double v, double* to) { *to = v; }
inline void narrow(float v, bfloat16* to) { *to = to_bfloat16(v); }
inline void narrow(float v, float16* to) { *to = to_float16(v); }

// sum of x^2 over the row
template <class T, class Acc>
NORMFUSE_ROW_LOOP Acc row_sum_squares(const T* __restrict x, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += widen(x[c]) * widen(x[c]);
  return sum;
}

// sums += (x s)^2
template <class T, class Acc>
NORMFUSE_ROW_LOOP void add_squares(const T* __restrict x, Acc s, Acc* __restrict sums, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    const Acc xs = widen(x[c]) * s;
    sums[c] += xs * xs;
  }
}

// sums_dy += dy, sums_dyx += dy x
template <class T, class Acc>
NORMFUSE_ROW_LOOP void add_gradients(const T* __restrict dy, const T* __restrict x, Acc* __restrict sums_dy,
                                     Acc* __restrict sums_dyx, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    sums_dy[c] += widen(dy[c]);
    sums_dyx[c] += widen(dy[c]) * widen(x[c]);
  }
}

// sums_dy += dy, sums_dyx += dy x s; returns the sum of (slope dy - pull x s) x s over the row
template <class T, class Acc>
NORMFUSE_ROW_LOOP Acc add_gradients_dot(const T* __restrict dy, const T* __restrict x, Acc s,
                                        const Acc* __restrict slope, const Acc* __restrict pull,
                                        Acc* __restrict sums_dy, Acc* __restrict sums_dyx, int64_t n) {
  Acc dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t c = 0; c < n; ++c) {
    const Acc d = widen(dy[c]), xs = widen(x[c]) * s;
    sums_dy[c] += d;
    sums_dyx[c] += d * xs;
    dot += (slope[c] * d - pull[c] * xs) * xs;
  }
  return dot;
}

// y = x s scale + shift
template <class T, class Acc>
NORMFUSE_ROW_LOOP void write_affine(const T* __restrict x, Acc s, const Acc* __restrict scale,
                                    const Acc* __restrict shift, T* __restrict y, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) narrow(widen(x[c]) * s * scale[c] + shift[c], &y[c]);
}

// dx = s (slope dy - x s (pull + dot))
template <class T, class Acc>
NORMFUSE_ROW_LOOP void write_gradient(const T* __restrict dy, const T* __restrict x, Acc s, Acc dot,
                                      const Acc* __restrict slope, const Acc* __restrict pull, T* __restrict dx,
                                      int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) narrow(s * (slope[c] * widen(dy[c]) - widen(x[c]) * s * (pull[c] + dot)), &dx[c]);
}

}  // namespace normfuse::cpu
