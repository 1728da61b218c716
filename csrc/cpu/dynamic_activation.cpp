// Dynamic Tanh and Dynamic erf on the host; curve_math.h has f. With u = alpha x + shift and g = w dy f'(u):
//   forward   y = w f(u) + b. Reads x, writes y.
//   backward  dx = alpha g; sums of dy f(u) and dy over the columns, of g x and g over everything. Reads dy and x,
//             writes dx.
#include <vector>

#include "blocks.h"
#include "output.h"
#include "rows.h"

namespace normfuse {
namespace cpu {
namespace {

// Rows that lie one after another, and what they share.
template <class T>
struct Rows {
  using Acc = AccOf<T>;
  const T *x, *dy;
  Acc alpha, shift;
  const Acc *weight, *bias;
  Acc *sums_dyf, *sums_dy;
  Acc* copies;  // room for three rows as acc, where they are not
};

template <Curve kCurve, class T>
NORMFUSE_CLONES void forward_rows(const Rows<T>& a, int64_t rows, int64_t n, RowOutput<T> y) {
  using Acc = AccOf<T>;
  const Acc alpha = a.alpha, shift = a.shift;
  const Acc* __restrict weight = a.weight, * __restrict bias = a.bias;
  for (int64_t r = 0; r < rows; ++r) {
    const Acc* __restrict x = widen_row(a.x + r * n, a.copies, n);
    Acc* __restrict to = wide_row(y.row(r), a.copies + n);
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) to[c] = weight[c] * curve_value<kCurve>(alpha * x[c] + shift) + bias[c];
    store_row(to, y.row(r), n);
    y.finish(r);
  }
}

// Of g x and g over some rows.
struct Totals {
  double gx = 0, g = 0;
};

template <Curve kCurve, class T>
NORMFUSE_CLONES Totals backward_rows(const Rows<T>& a, int64_t rows, int64_t n, RowOutput<T> dx) {
  using Acc = AccOf<T>;
  const Acc alpha = a.alpha, shift = a.shift;
  const Acc* __restrict weight = a.weight;
  Acc* __restrict sums_dyf = a.sums_dyf, * __restrict sums_dy = a.sums_dy;
  Totals totals;
  for (int64_t r = 0; r < rows; ++r) {
    const Acc* __restrict x = widen_row(a.x + r * n, a.copies, n);
    const Acc* __restrict dy = widen_row(a.dy + r * n, a.copies + n, n);
    Acc* __restrict to = wide_row(dx.row(r), a.copies + 2 * n);
    Acc sum_gx = 0, sum_g = 0;
#pragma omp simd reduction(+ : sum_gx, sum_g)
    for (int64_t c = 0; c < n; ++c) {
      const auto f = curve_point<kCurve>(alpha * x[c] + shift);
      const Acc g = weight[c] * dy[c] * f.slope;
      sums_dyf[c] += dy[c] * f.value;
      sums_dy[c] += dy[c];
      sum_gx += g * x[c];
      sum_g += g;
      to[c] = alpha * g;
    }
    store_row(to, dx.row(r), n);
    dx.finish(r);
    totals.gx += double(sum_gx);
    totals.g += double(sum_g);
  }
  return totals;
}

template <class Acc>
Acc number(const void* given) {
  return given ? *static_cast<const Acc*>(given) : Acc(0);
}

template <Curve kCurve, class T>
void forward(const DynamicActivationForward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const auto pass = [&](int64_t b) {
    const int64_t first = blocks.first(b) * n;
    std::vector<Acc> copies(3 * n);
    const Rows<T> rows{rows_of<T>(a.x, first),
                       nullptr,
                       number<Acc>(a.alpha),
                       number<Acc>(a.shift),
                       static_cast<const Acc*>(a.weight),
                       static_cast<const Acc*>(a.bias),
                       nullptr,
                       nullptr,
                       copies.data()};
    forward_rows<kCurve, T>(rows, blocks.length(b), n, {rows_of<T>(a.y, first), n, stream});
  };
  run_phases(parallel, {blocks.each(pass)});
}

template <Curve kCurve, class T>
void backward(const DynamicActivationBackward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  ColumnSums<Acc> sums(blocks, 2 * n);  // of dy f, then of dy
  std::vector<Acc> total;
  std::vector<Totals> totals(blocks.count);
  const auto pass = [&](int64_t b) {
    const int64_t first = blocks.first(b) * n;
    Acc* of_block = sums.start(b);
    std::vector<Acc> copies(3 * n);
    const Rows<T> rows{rows_of<T>(a.x, first),
                       rows_of<T>(a.grad_y, first),
                       number<Acc>(a.alpha),
                       number<Acc>(a.shift),
                       static_cast<const Acc*>(a.weight),
                       nullptr,
                       of_block,
                       of_block + n,
                       copies.data()};
    totals[b] = backward_rows<kCurve, T>(rows, blocks.length(b), n, {rows_of<T>(a.grad_x, first), n, stream});
  };
  run_phases(parallel, {blocks.each(pass), sums.total(total)});
  std::copy_n(total.begin(), n, static_cast<Acc*>(a.grad_weight));
  std::copy_n(total.begin() + n, n, static_cast<Acc*>(a.grad_bias));
  Totals sum;
  for (const Totals& block : totals) {
    sum.gx += block.gx;
    sum.g += block.g;
  }
  *static_cast<Acc*>(a.grad_alpha) = Acc(sum.gx);
  *static_cast<Acc*>(a.grad_shift) = Acc(sum.g);
}

// Calls run(curve, T{}) with what the arguments name.
template <class Args, class Run>
void with_types(const Args& args, const Run& run) {
  with_curve(args.curve, [&](auto curve) { with_element_type(args.shape.dtype, [&](auto t) { run(curve, t); }); });
}

}  // namespace
}  // namespace cpu

void run_cpu(const DynamicActivationForward& args, Parallel parallel) {
  cpu::with_types(args, [&](auto curve, auto t) { cpu::forward<curve, decltype(t)>(args, parallel); });
}

void run_cpu(const DynamicActivationBackward& args, Parallel parallel) {
  cpu::with_types(args, [&](auto curve, auto t) { cpu::backward<curve, decltype(t)>(args, parallel); });
}

}  // namespace normfuse
