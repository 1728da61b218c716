// Power Norm on the host. With a residual, x + residual stands for x, and the gradient of that sum is added to dx.
// xs = x s is x after the group scaling, s = 1/sqrt(mean of the group's x^2 + group_eps), or x itself.
//   forward   s; sums of xs^2; y = xs scale + shift. Reads x and writes y; in warm-up a second pass writes y.
//   backward  sums of dy and dy xs; per group dot = mean of (slope dy - pull xs) xs; dx = s (slope dy - xs (pull + dot)).
//             Reads dy and x, writes dx.
// Rows are read from memory once: their group scales, sums and results are loops over rows in the first cache.
#include <vector>

#include "blocks.h"
#include "output.h"
#include "rows.h"

namespace normfuse {
namespace cpu {
namespace {

struct Groups {
  int64_t count;  // 1 where the scaling is off
  int64_t width;
  bool scaled;

  Groups(int64_t channels, int64_t group_num)
      : count(std::max<int64_t>(group_num, 1)), width(channels / count), scaled(group_num > 0) {}
};

// With the group scaling a row needs a sum over itself before anything else. Rows take these sums in turns of a few that
// stay in the first cache: the processor does not wait for the end of one sum before it begins the next. Calls
// body(first, count) for the turns, and for the last rows one by one.
template <class Body>
NORMFUSE_ROW_LOOP void for_turns(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile) body(r, std::integral_constant<int, kTile>());
  for (; r < rows; ++r) body(r, std::integral_constant<int, 1>());
}

template <class T>
NORMFUSE_CLONES void scale_rows(const T* x, int64_t rows, Groups groups, AccOf<T> group_eps, AccOf<T>* row_scale) {
  const AccOf<T> inv_width = AccOf<T>(1) / AccOf<T>(groups.width);
  for (int64_t i = 0; i < rows * groups.count; ++i)
    row_scale[i] =
        inverse_sqrt(row_sum_squares<T, AccOf<T>>(x + i * groups.width, groups.width) * inv_width + group_eps);
}

template <class T>
NORMFUSE_CLONES void sum_squares(const T* x, const bool* pad_mask, int64_t rows, int64_t n, Groups groups,
                                 const AccOf<T>* row_scale, AccOf<T>* sums) {
  for_tiles(rows, pad_mask, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
    if (!groups.scaled) return add_tile_squares<count>(x + r * n, stride * n, NoFactors(), sums, n);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t c = g * groups.width;
      const Factors<AccOf<T>, count> by(row_scale + r * groups.count + g, stride * groups.count);
      add_tile_squares<count>(x + r * n + c, stride * n, by, sums + c, groups.width);
    }
  });
}

// y and, if kFirst, the factors of the rows and the sums of xs^2
template <bool kFirst, class T>
NORMFUSE_CLONES void apply_affine(const T* x, int64_t rows, int64_t n, Groups groups, AccOf<T> group_eps,
                                  AccOf<T>* row_scale, const AccOf<T>* scale, const AccOf<T>* shift, AccOf<T>* sums,
                                  RowOutput<T> y) {
  if (!groups.scaled) {
    for_tiles(rows, nullptr, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
      write_affine<kFirst, count>(x + r * n, stride * n, NoFactors(), scale, shift, y.row(r), y.pitch(stride), sums, n);
      y.finish(r, stride, count);
    });
    return;
  }
  for_turns(rows, [&](int64_t r, auto count) NORMFUSE_ALWAYS_INLINE {
    AccOf<T>* s = row_scale + r * groups.count;
    if (kFirst) scale_rows(x + r * n, count, groups, group_eps, s);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t c = g * groups.width;
      const Factors<AccOf<T>, count> by(s + g, groups.count);
      write_affine<kFirst, count>(x + r * n + c, n, by, scale + c, shift + c, y.row(r) + c, y.pitch(1), sums + c,
                                  groups.width);
    }
    y.finish(r, 1, count);
  });
}

// dots: of each row and group the mean of (slope dy - pull xs) xs
template <class T>
NORMFUSE_CLONES void dot_rows(const T* dy, const T* x, int64_t rows, Groups groups, const AccOf<T>* row_scale,
                              const AccOf<T>* slope, const AccOf<T>* pull, AccOf<T>* dots) {
  const AccOf<T> inv_width = AccOf<T>(1) / AccOf<T>(groups.width);
  for (int64_t i = 0; i < rows * groups.count; ++i) {
    const int64_t at = i * groups.width, c = i % groups.count * groups.width;
    dots[i] = inv_width * row_dot(dy + at, x + at, row_scale[i], slope + c, pull + c, groups.width);
  }
}

template <class T>
NORMFUSE_CLONES void backward_rows(const T* dy, const T* x, int64_t rows, int64_t n, Groups groups,
                                   const AccOf<T>* row_scale, const AccOf<T>* slope, const AccOf<T>* pull,
                                   AccOf<T>* sums_dy, AccOf<T>* sums_dyx, RowOutput<T> dx) {
  if (!groups.scaled) {
    for_tiles(rows, nullptr, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
      write_gradient<true, count>(dy + r * n, x + r * n, stride * n, NoFactors(), NoDots(), slope, pull, dx.row(r),
                                  dx.pitch(stride), sums_dy, sums_dyx, n);
      dx.finish(r, stride, count);
    });
    return;
  }
  std::vector<AccOf<T>> dots(kTile * groups.count);
  for_turns(rows, [&](int64_t r, auto count) NORMFUSE_ALWAYS_INLINE {
    const AccOf<T>* s = row_scale + r * groups.count;
    dot_rows(dy + r * n, x + r * n, count, groups, s, slope, pull, dots.data());
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t at = r * n + g * groups.width, c = g * groups.width;
      const Factors<AccOf<T>, count> by(s + g, groups.count);
      const Dots<AccOf<T>, count> dot(dots.data() + g, groups.count);
      write_gradient<true, count>(dy + at, x + at, n, by, dot, slope + c, pull + c, dx.row(r) + c, dx.pitch(1),
                                  sums_dy + c, sums_dyx + c, groups.width);
    }
    dx.finish(r, 1, count);
  });
}

template <class T>
void forward(const PowerForward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const Groups groups(n, a.group_num);
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const T* x = summed<T>(a);
  T* y = static_cast<T*>(a.y);
  Acc *row_scale = static_cast<Acc*>(a.row_scale), *phi = static_cast<Acc*>(a.running_phi);
  const Acc *weight = static_cast<const Acc*>(a.weight), *bias = static_cast<const Acc*>(a.bias);
  const int64_t t = next_step(*a.iters);
  const bool warm = !power_uses_batch(t, a.warmup_iters);
  std::vector<Acc> scale(n);
  for (int64_t c = 0; c < n; ++c) scale[c] = weight[c] * inverse_sqrt(phi[c] + Acc(a.eps));

  ColumnSums<Acc> sums(blocks, a.pad_mask ? 2 * n : n);  // over all rows, then over those that are not padding
  std::vector<Acc> total;
  const auto sum = [&](int64_t b) {
    Acc *sums_all = sums.start(b), *sums_valid = sums_all + n;
    each_piece<T>(a, blocks.first(b), blocks.length(b), [&](int64_t r, int64_t rows) {
      const T* from = x + r * n;
      Acc* s = row_scale + r * a.group_num;
      if (warm) {
        apply_affine<true, T>(from, rows, n, groups, Acc(a.group_eps), s, scale.data(), bias, sums_all,
                              {y + r * n, n, stream});
      } else {
        if (groups.scaled) scale_rows(from, rows, groups, Acc(a.group_eps), s);
        sum_squares(from, nullptr, rows, n, groups, s, sums_all);
      }
      if (a.pad_mask) sum_squares(from, a.pad_mask + r, rows, n, groups, s, sums_valid);
    });
  };
  const auto move_statistics = [&] {
    const Acc *sum_all = total.data(), *sum_valid = a.pad_mask ? sum_all + n : sum_all;
    const int64_t count = a.pad_mask ? std::count(a.pad_mask, a.pad_mask + a.shape.rows, false) : a.shape.rows;
    Acc *inv_used = static_cast<Acc*>(a.stats), *inv_batch = inv_used + n, *mean_all = inv_batch + n;
    for (int64_t c = 0; c < n; ++c) {
      const Acc q = mean_or(sum_valid[c], count, phi[c]);
      inv_batch[c] = inverse_sqrt(q + Acc(a.eps));
      inv_used[c] = warm ? inverse_sqrt(phi[c] + Acc(a.eps)) : inv_batch[c];
      mean_all[c] = count > 0 ? sum_all[c] / Acc(a.shape.rows) : Acc(NAN);
      if (count > 0) phi[c] = power_moved_phi(t, a.warmup_iters, q, phi[c], Acc(a.alpha_fwd));
      scale[c] = weight[c] * inv_used[c];
    }
    if (count > 0) *a.iters = t;
  };
  const auto apply = [&](int64_t b) {
    const int64_t r = blocks.first(b);
    apply_affine<false, T>(x + r * n, blocks.length(b), n, groups, Acc(a.group_eps), row_scale + r * a.group_num,
                           scale.data(), bias, nullptr, {y + r * n, n, stream});
  };
  std::vector<Phase> phases{blocks.each(sum), sums.total(total), once(move_statistics)};
  if (!warm) phases.push_back(blocks.each_backwards(apply));
  run_phases(parallel, phases);
}

template <class T>
void backward(const PowerBackward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const Groups groups(n, a.group_num);
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.grad_y);
  const Acc *weight = static_cast<const Acc*>(a.weight), *inv_used = static_cast<const Acc*>(a.stats);
  const Acc *inv_batch = inv_used + n, *mean_x2 = inv_batch + n, *row_scale = static_cast<const Acc*>(a.row_scale);
  Acc* ema = static_cast<Acc*>(a.ema_gz);
  std::vector<Acc> slope(n), pull(n);
  for (int64_t c = 0; c < n; ++c) {
    const auto k =
        power_coefficients(weight[c], ema[c], inv_used[c], a.paper ? inv_used[c] : inv_batch[c], Acc(a.alpha_bkw));
    slope[c] = k.slope;
    pull[c] = k.pull;
  }

  ColumnSums<Acc> sums(blocks, 2 * n);  // of dy, then of dy xs
  std::vector<Acc> total;
  const auto pass = [&](int64_t b) {
    const int64_t r = blocks.first(b);
    Acc* of_block = sums.start(b);
    backward_rows<T>(dy + r * n, x + r * n, blocks.length(b), n, groups, row_scale + r * a.group_num, slope.data(),
                     pull.data(), of_block, of_block + n,
                     {static_cast<T*>(a.grad_x) + r * n, n, stream, rows_of<T>(a.grad_s, r * n)});
  };
  run_phases(parallel, {blocks.each(pass), sums.total(total)});

  const Acc *sum_dy = total.data(), *sum_dyx = sum_dy + n;
  for (int64_t c = 0; c < n; ++c) {
    const Acc mean_dyx = mean_or(sum_dyx[c], a.shape.rows, Acc(0));
    ema[c] = power_moved_ema(weight[c], ema[c], inv_used[c], mean_dyx, mean_x2[c], Acc(a.alpha_bkw));
    static_cast<Acc*>(a.grad_weight)[c] = inv_used[c] * sum_dyx[c];
    static_cast<Acc*>(a.grad_bias)[c] = sum_dy[c];
  }
}

}  // namespace
}  // namespace cpu

void run_cpu(const PowerForward& args, Parallel parallel) {
  cpu::with_element_type(args.shape.dtype, [&](auto t) { cpu::forward<decltype(t)>(args, parallel); });
}

void run_cpu(const PowerBackward& args, Parallel parallel) {
  cpu::with_element_type(args.shape.dtype, [&](auto t) { cpu::backward<decltype(t)>(args, parallel); });
}

}  // namespace normfuse
