// The loops of the passes over statistics groups: over the channels of rows, or the positions of planes. `part` says
// which of two vectors a number belongs to, 1 where its mask is true.
#pragma once
#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace normfuse::cpu {

constexpr int64_t kMostRows = 1024;    // of a block
constexpr int64_t kPlanePiece = 2048;  // positions that a loop takes at a time; they stay in the first cache

// The numbers of a block's rows, by part.
struct RowLists {
  int32_t rows[2][kMostRows];
  int64_t count[2] = {0, 0};

  RowLists(const bool* mask, int64_t rows_given) {
    for (int64_t r = 0; r < rows_given; ++r) {
      const int part = mask && mask[r];
      rows[part][count[part]++] = int32_t(r);
    }
  }
};

// Calls body(rows, count) for tiles of the listed rows and for the last ones one by one; count is a constant. The rows of
// a tile are far apart, as those of for_tiles.
template <class Body>
NORMFUSE_ROW_LOOP void for_listed_tiles(const int32_t* list, int64_t count, const Body& body) {
  const int64_t stride = count / kTile;
  for (int64_t i = 0; i < stride; ++i) {
    int64_t rows[kTile];
    for (int t = 0; t < kTile; ++t) rows[t] = list[i + t * stride];
    body(rows, std::integral_constant<int, kTile>());
  }
  for (int64_t i = stride * kTile; i < count; ++i) {
    const int64_t row[1] = {list[i]};
    body(row, std::integral_constant<int, 1>());
  }
}

// Mean and sum of squared deviations of the listed rows, at least one. They are summed as differences from the mean of a
// few of them, spread over the block: from m out of n numbers the mean is at most sqrt(n / m) deviations away, which
// bounds what the subtraction of the squares cancels.
template <class T>
NORMFUSE_CLONES static void row_moments(const T* x, const int32_t* list, int64_t count, int64_t n, AccOf<T>* shift,
                                        AccOf<T>* mean, AccOf<T>* squares) {
  using Acc = AccOf<T>;
  const int64_t probes = std::min<int64_t>(16, count);
  for (int64_t c = 0; c < n; ++c) shift[c] = mean[c] = squares[c] = 0;
  for (int64_t i = 0; i < probes; ++i) {
    const T* from = x + list[i * count / probes] * n;
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) shift[c] += widen(from[c]);
  }
  for (int64_t c = 0; c < n; ++c) shift[c] /= Acc(probes);
  for_listed_tiles(list, count, [&](const int64_t* rows, auto tile) NORMFUSE_ALWAYS_INLINE {
    const T* from[tile];
    for (int t = 0; t < tile; ++t) from[t] = x + rows[t] * n;
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) {
      Acc sum = 0, square = 0;
      for (int t = 0; t < tile; ++t) {
        const Acc d = widen(from[t][c]) - shift[c];
        sum += d;
        square += d * d;
      }
      mean[c] += sum;
      squares[c] += square;
    }
  });
  for (int64_t c = 0; c < n; ++c) {
    const Acc gap = mean[c] / Acc(count), rest = squares[c] - gap * mean[c];
    mean[c] = shift[c] + gap;
    squares[c] = rest < 0 ? Acc(0) : rest;
  }
}

// y = scale (x - mean) + shift
template <class T>
NORMFUSE_ROW_LOOP void affine_row(const T* __restrict x, const AccOf<T>* __restrict mean,
                                  const AccOf<T>* __restrict scale, const AccOf<T>* __restrict shift, T* __restrict y,
                                  int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) narrow((widen(x[c]) - mean[c]) * scale[c] + shift[c], &y[c]);
}

// sums_dy += dy, sums_dyd += dy (x - mean) over the listed rows
template <class T>
NORMFUSE_CLONES static void row_gradient_sums(const T* dy, const T* x, const int32_t* list, int64_t count, int64_t n,
                                              const AccOf<T>* mean, AccOf<T>* sums_dy, AccOf<T>* sums_dyd) {
  using Acc = AccOf<T>;
  for_listed_tiles(list, count, [&](const int64_t* rows, auto tile) NORMFUSE_ALWAYS_INLINE {
    const T *from_dy[tile], *from_x[tile];
    for (int t = 0; t < tile; ++t) {
      from_dy[t] = dy + rows[t] * n;
      from_x[t] = x + rows[t] * n;
    }
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) {
      Acc sum = 0, along = 0;
      for (int t = 0; t < tile; ++t) {
        const Acc d = widen(from_dy[t][c]);
        sum += d;
        along += d * (widen(from_x[t][c]) - mean[c]);
      }
      sums_dy[c] += sum;
      sums_dyd[c] += along;
    }
  });
}

// dx = slope dy + pull (x - mean) + offset
template <class T>
NORMFUSE_ROW_LOOP void gradient_row(const T* __restrict dy, const T* __restrict x, const AccOf<T>* __restrict mean,
                                    const AccOf<T>* __restrict slope, const AccOf<T>* __restrict pull,
                                    const AccOf<T>* __restrict offset, T* __restrict dx, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c)
    narrow(slope[c] * widen(dy[c]) + pull[c] * (widen(x[c]) - mean[c]) + offset[c], &dx[c]);
}

// Of a plane, its parts told apart by `select`: all bits set where the mask is true, none elsewhere. Selecting instead of
// multiplying keeps a NaN of one part out of the other, and bits, unlike conditions, never stop vectorisation. Without a
// mask there is part 0 alone and select is null.
template <class Acc>
using BitsOf = std::conditional_t<sizeof(Acc) == 8, uint64_t, uint32_t>;

// A number of each part, or the one that a position needs.
template <class Acc>
struct Pair {
  Acc of[2];

  template <bool kMasked>
  NORMFUSE_ROW_LOOP Acc at(const BitsOf<Acc>* select, int64_t p) const {
    using Bits = BitsOf<Acc>;
    if (!kMasked) return of[0];
    const Bits first = bit_cast<Bits>(of[0]), second = bit_cast<Bits>(of[1]);
    return bit_cast<Acc>(Bits(first ^ ((first ^ second) & select[p])));
  }
};

// v where the position belongs to the part, 0 elsewhere.
template <bool kMasked, class Acc>
NORMFUSE_ROW_LOOP Acc in_first(const BitsOf<Acc>* select, int64_t p, Acc v) {
  using Bits = BitsOf<Acc>;
  return kMasked ? bit_cast<Acc>(Bits(bit_cast<Bits>(v) & ~select[p])) : v;
}
template <class Acc>
NORMFUSE_ROW_LOOP Acc in_second(const BitsOf<Acc>* select, int64_t p, Acc v) {
  using Bits = BitsOf<Acc>;
  return bit_cast<Acc>(Bits(bit_cast<Bits>(v) & select[p]));
}

// Sums over a piece of a plane of x, then of the squared deviations from the means.
template <bool kMasked, class T, class Acc>
NORMFUSE_ROW_LOOP Pair<Acc> piece_sums(const T* x, const BitsOf<Acc>* select, int64_t n) {
  Acc first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t p = 0; p < n; ++p) {
    const Acc v = widen(x[p]);
    first += in_first<kMasked>(select, p, v);
    if constexpr (kMasked) second += in_second(select, p, v);
  }
  return {{first, second}};
}
template <bool kMasked, class T, class Acc>
NORMFUSE_ROW_LOOP Pair<Acc> piece_squares(const T* x, const BitsOf<Acc>* select, int64_t n, const Pair<Acc> mean) {
  Acc first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t p = 0; p < n; ++p) {
    const Acc d = widen(x[p]) - mean.template at<kMasked>(select, p);
    first += in_first<kMasked>(select, p, d * d);
    if constexpr (kMasked) second += in_second(select, p, d * d);
  }
  return {{first, second}};
}

// Moments of a plane, piece by piece around each piece's own mean.
template <bool kMasked, class T>
NORMFUSE_CLONES static void plane_moments(const T* x, const BitsOf<AccOf<T>>* select, int64_t n,
                                          Moments<double>* parts) {
  using Acc = AccOf<T>;
  for (int64_t from = 0; from < n; from += kPlanePiece) {
    const int64_t length = std::min(kPlanePiece, n - from);
    const BitsOf<Acc>* piece = kMasked ? select + from : nullptr;
    int64_t selected = 0;
    for (int64_t p = 0; kMasked && p < length; ++p) selected += piece[p] & 1;
    const int64_t count[2] = {length - selected, selected};
    const Pair<Acc> sums = piece_sums<kMasked, T, Acc>(x + from, piece, length);
    Pair<Acc> mean;
    for (int part = 0; part < 2; ++part) mean.of[part] = count[part] > 0 ? sums.of[part] / Acc(count[part]) : Acc(0);
    const Pair<Acc> squares = piece_squares<kMasked, T, Acc>(x + from, piece, length, mean);
    for (int part = 0; part < 2; ++part) parts[part].add({count[part], mean.of[part], squares.of[part]});
  }
}

// The sums over a plane of dy and of dy (x - mean).
template <bool kMasked, class T>
NORMFUSE_CLONES static void plane_gradient_sums(const T* __restrict dy, const T* __restrict x,
                                                const BitsOf<AccOf<T>>* __restrict select, int64_t n,
                                                const Pair<AccOf<T>> mean, Pair<AccOf<T>>* sums_dy,
                                                Pair<AccOf<T>>* sums_dyd) {
  using Acc = AccOf<T>;
  for (int part = 0; part < 2; ++part) sums_dy->of[part] = sums_dyd->of[part] = 0;
  for (int64_t from = 0; from < n; from += kPlanePiece) {
    const int64_t end = std::min(n, from + kPlanePiece);
    Acc first = 0, second = 0, first_along = 0, second_along = 0;
#pragma omp simd reduction(+ : first, second, first_along, second_along)
    for (int64_t p = from; p < end; ++p) {
      const Acc d = widen(dy[p]), along = d * (widen(x[p]) - mean.template at<kMasked>(select, p));
      first += in_first<kMasked>(select, p, d);
      first_along += in_first<kMasked>(select, p, along);
      if constexpr (kMasked) {
        second += in_second(select, p, d);
        second_along += in_second(select, p, along);
      }
    }
    sums_dy->of[0] += first;
    sums_dyd->of[0] += first_along;
    sums_dy->of[1] += second;
    sums_dyd->of[1] += second_along;
  }
}

// y = scale (x - mean) + shift
template <bool kMasked, class T>
NORMFUSE_CLONES static void affine_plane(const T* __restrict x, const BitsOf<AccOf<T>>* __restrict select, int64_t n,
                                         const Pair<AccOf<T>> mean, const Pair<AccOf<T>> scale,
                                         const Pair<AccOf<T>> shift, T* __restrict y) {
#pragma GCC ivdep
  for (int64_t p = 0; p < n; ++p)
    narrow((widen(x[p]) - mean.template at<kMasked>(select, p)) * scale.template at<kMasked>(select, p) +
               shift.template at<kMasked>(select, p),
           &y[p]);
}

// dx = slope dy + pull (x - mean) + offset
template <bool kMasked, class T>
NORMFUSE_CLONES static void gradient_plane(const T* __restrict dy, const T* __restrict x,
                                           const BitsOf<AccOf<T>>* __restrict select, int64_t n,
                                           const Pair<AccOf<T>> mean, const Pair<AccOf<T>> slope,
                                           const Pair<AccOf<T>> pull, const Pair<AccOf<T>> offset, T* __restrict dx) {
#pragma GCC ivdep
  for (int64_t p = 0; p < n; ++p)
    narrow(slope.template at<kMasked>(select, p) * widen(dy[p]) +
               pull.template at<kMasked>(select, p) * (widen(x[p]) - mean.template at<kMasked>(select, p)) +
               offset.template at<kMasked>(select, p),
           &dx[p]);
}

}  // namespace normfuse::cpu
