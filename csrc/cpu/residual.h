// The sum of x with a residual, taken piece by piece just before the rows are read for the first time.
#pragma once
#include <algorithm>

#include "rows.h"

namespace normfuse::cpu {

// The numbers of a matrix from the given one on; null of a matrix that is not there.
template <class T>
const T* rows_of(const void* matrix, int64_t first) {
  return matrix ? static_cast<const T*>(matrix) + first : nullptr;
}
template <class T>
T* rows_of(void* matrix, int64_t first) {
  return matrix ? static_cast<T*>(matrix) + first : nullptr;
}

// s = a + b, where s may be a
template <class T>
NORMFUSE_CLONES static void add_numbers(const T* a, const T* b, T* s, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) narrow(widen(a[i]) + widen(b[i]), &s[i]);
}

// What is normalised: x, or s.
template <class T, class Forward>
const T* summed(const Forward& args) {
  return static_cast<const T*>(args.residual ? args.s : args.x);
}

// use(first, count) for pieces of the given rows, of which s = x + residual has just been written where there is
// a residual, and is in the cache.
template <class T, class Forward, class Use>
void each_piece(const Forward& args, int64_t first, int64_t count, const Use& use) {
  if (!args.residual) return use(first, count);
  const int64_t n = args.shape.channels, size = std::max<int64_t>(4, 8192 / n), end = first + count;
  for (int64_t r = first; r < end; r += size) {
    const int64_t rows = std::min(size, end - r);
    add_numbers(static_cast<const T*>(args.x) + r * n, static_cast<const T*>(args.residual) + r * n,
                static_cast<T*>(args.s) + r * n, rows * n);
    use(r, rows);
  }
}

}  // namespace normfuse::cpu
