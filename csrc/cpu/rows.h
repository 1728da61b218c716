// Loops over the channels of one row, or of a tile of rows. They are inlined into functions marked NORMFUSE_CLONES,
// which the compiler builds once per instruction set and the loader picks from; every loop is written so that it
// vectorises for all of them.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../host_types.h"
#include "../kernels.h"

#define NORMFUSE_ALWAYS_INLINE __attribute__((always_inline))
#define NORMFUSE_INLINE NORMFUSE_ALWAYS_INLINE inline
#include "../channel_math.h"
#include "../curve_math.h"
#include "../row_math.h"
#include "../stat_group_math.h"

// ThreadSanitizer is not ready yet when the loader picks.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define NORMFUSE_LOADER_PICKS
#define NORMFUSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NORMFUSE_CLONES
#endif
#define NORMFUSE_ROW_LOOP NORMFUSE_ALWAYS_INLINE inline

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

// The row as acc: itself where it is, a converted copy otherwise.
template <class T, class Acc>
NORMFUSE_ROW_LOOP const Acc* widen_row(const T* __restrict row, Acc* __restrict copy, int64_t n) {
  if constexpr (std::is_same_v<T, Acc>) {
    return row;
  } else {
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) copy[c] = widen(row[c]);
    return copy;
  }
}

// Where to compute a row of results as acc: in its place, or in a copy that store_row then rounds.
template <class T, class Acc>
NORMFUSE_ROW_LOOP Acc* wide_row(T* row, Acc* copy) {
  if constexpr (std::is_same_v<T, Acc>)
    return row;
  else
    return copy;
}
template <class T, class Acc>
NORMFUSE_ROW_LOOP void store_row(const Acc* __restrict computed, T* __restrict row, int64_t n) {
  if constexpr (!std::is_same_v<T, Acc>) {
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) narrow(computed[c], &row[c]);
  }
}

// sum of x^2 over the row
template <class T, class Acc>
NORMFUSE_ROW_LOOP Acc row_sum_squares(const T* __restrict x, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += widen(x[c]) * widen(x[c]);
  return sum;
}

// sum over the row of (slope dy - pull xs) xs, where xs = x s
template <class T, class Acc>
NORMFUSE_ROW_LOOP Acc row_dot(const T* __restrict dy, const T* __restrict x, Acc s, const Acc* __restrict slope,
                              const Acc* __restrict pull, int64_t n) {
  Acc dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t c = 0; c < n; ++c) {
    const Acc xs = widen(x[c]) * s;
    dot += (slope[c] * widen(dy[c]) - pull[c] * xs) * xs;
  }
  return dot;
}

// Loops take kTile rows at a time: what belongs to a channel, coefficients and sums, is loaded and stored once for all of
// them. The rows of a tile are far apart, because neighbours look like no stream at all to the processor's prefetcher,
// which halves the bandwidth of memory.
constexpr int kTile = 4;

// Calls body(first, stride, count) for the tiles of some rows and for the last rows one by one; count is a constant.
// With a mask, rows that are not padding come one by one.
template <class Body>
NORMFUSE_ROW_LOOP void for_tiles(int64_t rows, const bool* pad_mask, const Body& body) {
  const int64_t stride = pad_mask ? 0 : rows / kTile;
  for (int64_t r = 0; r < stride; ++r) body(r, stride, std::integral_constant<int, kTile>());
  for (int64_t r = stride * kTile; r < rows; ++r)
    if (!pad_mask || !pad_mask[r]) body(r, 1, std::integral_constant<int, 1>());
}

// xs is x times a factor of the row, or x itself, without a multiplication.
template <class Acc, int kRows>
struct Factors {
  Acc s[kRows];
  NORMFUSE_ROW_LOOP Factors(const Acc* row_scale, int64_t stride) {
    for (int r = 0; r < kRows; ++r) s[r] = row_scale[r * stride];
  }
  NORMFUSE_ROW_LOOP Acc operator()(Acc v, int r) const { return v * s[r]; }
};
struct NoFactors {
  template <class Acc>
  NORMFUSE_ROW_LOOP Acc operator()(Acc v, int) const {
    return v;
  }
};

// What the group scaling's own gradient takes from a row: a multiple of the row, or nothing.
struct NoDots {
  template <class Acc>
  NORMFUSE_ROW_LOOP Acc operator()(Acc pull, int) const {
    return pull;
  }
};
template <class Acc, int kRows>
struct Dots : Factors<Acc, kRows> {
  using Factors<Acc, kRows>::Factors;
  NORMFUSE_ROW_LOOP Acc operator()(Acc pull, int r) const { return pull + this->s[r]; }
};

// sums += xs^2
template <int kRows, class T, class Acc, class By>
NORMFUSE_ROW_LOOP void add_tile_squares(const T* x, int64_t stride, const By& scaled, Acc* __restrict sums, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    Acc sum = 0;
    for (int r = 0; r < kRows; ++r) {
      const Acc xs = scaled(Acc(widen(x[r * stride + c])), r);
      sum += xs * xs;
    }
    sums[c] += sum;
  }
}

// y = xs scale + shift, and sums += xs^2 if kSum
template <bool kSum, int kRows, class T, class Acc, class By>
NORMFUSE_ROW_LOOP void write_affine(const T* x, int64_t stride, const By& scaled, const Acc* __restrict scale,
                                    const Acc* __restrict shift, T* __restrict y, int64_t pitch, Acc* __restrict sums,
                                    int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    Acc sum = 0;
    for (int r = 0; r < kRows; ++r) {
      const Acc xs = scaled(Acc(widen(x[r * stride + c])), r);
      narrow(xs * scale[c] + shift[c], &y[r * pitch + c]);
      sum += xs * xs;
    }
    if constexpr (kSum) sums[c] += sum;
  }
}

// dx = s (slope dy - xs (pull + dot)), and sums_dy += dy, sums_dyx += dy xs if kSum
template <bool kSum, int kRows, class T, class Acc, class By, class Pulled>
NORMFUSE_ROW_LOOP void write_gradient(const T* dy, const T* x, int64_t stride, const By& scaled, const Pulled& pulled,
                                      const Acc* __restrict slope, const Acc* __restrict pull, T* __restrict dx,
                                      int64_t pitch, Acc* __restrict sums_dy, Acc* __restrict sums_dyx, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    Acc sum_dy = 0, sum_dyx = 0;
    for (int r = 0; r < kRows; ++r) {
      const Acc d = widen(dy[r * stride + c]), xs = scaled(Acc(widen(x[r * stride + c])), r);
      narrow(scaled(slope[c] * d - xs * pulled(pull[c], r), r), &dx[r * pitch + c]);
      sum_dy += d;
      sum_dyx += d * xs;
    }
    if constexpr (kSum) {
      sums_dy[c] += sum_dy;
      sums_dyx[c] += sum_dyx;
    }
  }
}

// sums_dy += dy, sums_dyx += dy x
template <int kRows, class T, class Acc>
NORMFUSE_ROW_LOOP void add_tile_gradients(const T* dy, const T* x, int64_t stride, Acc* __restrict sums_dy,
                                          Acc* __restrict sums_dyx, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    Acc sum_dy = 0, sum_dyx = 0;
    for (int r = 0; r < kRows; ++r) {
      const Acc d = widen(dy[r * stride + c]);
      sum_dy += d;
      sum_dyx += d * widen(x[r * stride + c]);
    }
    sums_dy[c] += sum_dy;
    sums_dyx[c] += sum_dyx;
  }
}

}  // namespace normfuse::cpu
