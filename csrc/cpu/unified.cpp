// Unified Norm on the host.
//   forward   s = x + residual where there is one, which stands for x then;
//             q = mean over valid rows of x^2, then y = x scale + shift. Reads x, and x again with the last block
//             first while that is cached; writes y.
//   backward  sums of dy and dy x, then dx = slope dy - pull x (+ the gradient of s). Reads dy and x twice in the same way; writes dx.
#include <vector>

#include "blocks.h"
#include "output.h"
#include "rows.h"

namespace normfuse {
namespace cpu {
namespace {

template <class T>
NORMFUSE_CLONES void sum_squares(const T* x, const bool* pad_mask, int64_t rows, int64_t n, AccOf<T>* sums) {
  for_tiles(rows, pad_mask, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
    add_tile_squares<count>(x + r * n, stride * n, NoFactors(), sums, n);
  });
}

template <class T>
NORMFUSE_CLONES void apply_affine(const T* x, const AccOf<T>* scale, const AccOf<T>* shift, int64_t rows, int64_t n,
                                  RowOutput<T> y) {
  AccOf<T>* const no_sums = nullptr;
  for_tiles(rows, nullptr, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
    write_affine<false, count>(x + r * n, stride * n, NoFactors(), scale, shift, y.row(r), y.pitch(stride), no_sums, n);
    y.finish(r, stride, count);
  });
}

template <class T>
NORMFUSE_CLONES void sum_gradients(const T* dy, const T* x, int64_t rows, int64_t n, AccOf<T>* sums_dy,
                                   AccOf<T>* sums_dyx) {
  for_tiles(rows, nullptr, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
    add_tile_gradients<count>(dy + r * n, x + r * n, stride * n, sums_dy, sums_dyx, n);
  });
}

template <class T>
NORMFUSE_CLONES void apply_gradient(const T* dy, const T* x, const AccOf<T>* slope, const AccOf<T>* pull, int64_t rows,
                                    int64_t n, RowOutput<T> dx) {
  AccOf<T>*const no_sums_dy = nullptr, *const no_sums_dyx = nullptr;
  for_tiles(rows, nullptr, [&](int64_t r, int64_t stride, auto count) NORMFUSE_ALWAYS_INLINE {
    write_gradient<false, count>(dy + r * n, x + r * n, stride * n, NoFactors(), NoDots(), slope, pull, dx.row(r),
                                 dx.pitch(stride), no_sums_dy, no_sums_dyx, n);
    dx.finish(r, stride, count);
  });
}

// Unbiased variance of sqrt over all entries of the window.
template <class Acc>
double spread_of_roots(const Acc* buffer, int64_t count) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::sqrt(double(buffer[i]));
  for (int64_t i = 0; i < count; ++i) {
    const double d = std::sqrt(double(buffer[i])) - sum / double(count);
    squares += d * d;
  }
  return squares / double(count - 1);
}

// Enters q into the window and decides whether this step is an outlier, which must not stay in it.
template <class Acc>
bool enter_window(const UnifiedForward& a, int64_t t, const std::vector<Acc>& q) {
  const int64_t n = a.shape.channels;
  Acc* buffer = static_cast<Acc*>(a.buffer_x2);
  if (t == 0) return a.window <= 1;
  Acc* slot = buffer + slot_of(t, a.window) * n;
  const bool filter = a.outlier_filtration && t >= a.warmup_iters;
  const Acc spread = filter ? Acc(spread_of_roots(buffer, a.window * n)) : Acc(0);
  std::copy(q.begin(), q.end(), slot);
  bool outlier = false;
  for (int64_t c = 0; filter && c < n && !outlier; ++c) outlier = unified_is_outlier(buffer + c, a.window, n, spread);
  if (outlier) {
    std::copy_n(static_cast<const Acc*>(a.running_var), n, slot);
    *a.skip_counter += 1;
  }
  return outlier || a.window <= 1;
}

template <class T>
void forward(const UnifiedForward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const T* x = summed<T>(a);

  ColumnSums<Acc> squares(blocks, n);
  std::vector<Acc> q, scale(n);
  const auto sum = [&](int64_t b) {
    Acc* sums = squares.start(b);
    each_piece<T>(a, blocks.first(b), blocks.length(b), [&](int64_t r, int64_t rows) {
      sum_squares(x + r * n, a.pad_mask ? a.pad_mask + r : nullptr, rows, n, sums);
    });
  };
  const auto move_statistics = [&] {
    const int64_t valid = a.pad_mask ? std::count(a.pad_mask, a.pad_mask + a.shape.rows, false) : a.shape.rows;
    Acc* running = static_cast<Acc*>(a.running_var);
    for (int64_t c = 0; c < n; ++c) q[c] = mean_or(q[c], valid, running[c]);

    const int64_t t = valid > 0 ? next_step(*a.iters) : 0;
    if (valid > 0) *a.iters = t;
    const UnifiedStep step{t, enter_window(a, t, q), a.window, a.warmup_iters};
    a.step[0] = t;
    a.step[1] = step.skip;
    Acc *inv_std = static_cast<Acc*>(a.stats), *ratio = inv_std + n;
    for (int64_t c = 0; c < n; ++c) {
      const auto stats = unified_forward_channel(step, q[c], static_cast<Acc*>(a.buffer_x2) + c, n, Acc(a.eps),
                                                 Acc(a.momentum), running + c);
      inv_std[c] = stats.inv_std;
      ratio[c] = stats.r;
      scale[c] = static_cast<const Acc*>(a.weight)[c] * stats.inv_std;
    }
  };
  const auto apply = [&](int64_t b) {
    const int64_t first = blocks.first(b) * n;
    apply_affine<T>(x + first, scale.data(), static_cast<const Acc*>(a.bias), blocks.length(b), n,
                    {static_cast<T*>(a.y) + first, n, stream});
  };
  run_phases(parallel, {blocks.each(sum), squares.total(q), once(move_statistics), blocks.each_backwards(apply)});
}

template <class T>
void backward(const UnifiedBackward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.grad_y);

  ColumnSums<Acc> sums(blocks, 2 * n);  // of dy, then of dy x
  std::vector<Acc> total, slope(n), pull(n);
  const auto sum = [&](int64_t b) {
    const int64_t first = blocks.first(b) * n;
    Acc* of_block = sums.start(b);
    sum_gradients(dy + first, x + first, blocks.length(b), n, of_block, of_block + n);
  };
  const auto move_statistics = [&] {
    const UnifiedStep step{a.step[0], a.step[1] != 0, a.window, a.warmup_iters};
    const Acc *weight = static_cast<const Acc*>(a.weight), *inv_std = static_cast<const Acc*>(a.stats),
              *ratio = inv_std + n, *sum_dy = total.data(), *sum_dyx = sum_dy + n;
    for (int64_t c = 0; c < n; ++c) {
      const Acc weight_gradient = ratio[c] * inv_std[c] * sum_dyx[c];
      const Acc m = mean_or(weight[c] * weight_gradient, a.shape.rows, Acc(0));
      const auto k =
          unified_backward_channel(step, m, weight[c], {inv_std[c], ratio[c]}, static_cast<Acc*>(a.buffer_gz) + c, n,
                                   Acc(a.momentum), static_cast<Acc*>(a.ema_gz) + c);
      slope[c] = k.slope;
      pull[c] = k.pull;
      static_cast<Acc*>(a.grad_weight)[c] = weight_gradient;
      static_cast<Acc*>(a.grad_bias)[c] = sum_dy[c];
    }
  };
  const auto apply = [&](int64_t b) {
    const int64_t first = blocks.first(b) * n;
    apply_gradient<T>(dy + first, x + first, slope.data(), pull.data(), blocks.length(b), n,
                      {static_cast<T*>(a.grad_x) + first, n, stream, rows_of<T>(a.grad_s, first)});
  };
  run_phases(parallel, {blocks.each(sum), sums.total(total), once(move_statistics), blocks.each_backwards(apply)});
}

}  // namespace
}  // namespace cpu

void run_cpu(const UnifiedForward& args, Parallel parallel) {
  cpu::with_element_type(args.shape.dtype, [&](auto t) { cpu::forward<decltype(t)>(args, parallel); });
}

void run_cpu(const UnifiedBackward& args, Parallel parallel) {
  cpu::with_element_type(args.shape.dtype, [&](auto t) { cpu::backward<decltype(t)>(args, parallel); });
}

}  // namespace normfuse
