// LayerNorm, RMSNorm and CRMSNorm on the host; row_math.h has the algebra.
//   forward   s = x + residual; sum s, then sum (s - m)^2, then y = w (s - m) inv_std + b.
//             Reads x (and residual), writes y (and s).
//   backward  sums of g and g z over the row, of dy z and dy over the columns, then dx = inv_std (g - offset - slope z),
//             plus the gradient of s. Reads dy and s (and ds), writes dx.
// Each row is read from memory once: the loops over it find it in the first cache.
#include <vector>

#include "blocks.h"
#include "output.h"
#include "rows.h"

namespace normfuse {
namespace cpu {
namespace {

template <class Acc>
NORMFUSE_ROW_LOOP Acc row_sum(const Acc* __restrict s, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += s[c];
  return sum;
}

template <class Acc>
NORMFUSE_ROW_LOOP Acc row_sum_deviations(const Acc* __restrict s, Acc centre, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += (s[c] - centre) * (s[c] - centre);
  return sum;
}

// Rows that lie one after another, and the vectors of length n they share.
template <class T>
struct ForwardRows {
  using Acc = AccOf<T>;
  const T *x, *residual;
  const Acc *weight, *bias;
  RowNorm kind;
  Acc eps;
  T* s;
  Acc *inv_std, *mean, *copy;
};

template <class T>
NORMFUSE_CLONES void forward_rows(const ForwardRows<T>& a, int64_t rows, int64_t n, RowOutput<T> y) {
  using Acc = AccOf<T>;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = a.x + r * n;
    if (a.residual) {
      add_numbers(from, a.residual + r * n, a.s + r * n, n);
      from = a.s + r * n;
    }
    const Acc* s = widen_row(from, a.copy, n);
    const Acc mean = has_mean(a.kind) ? row_sum(s, n) / Acc(n) : Acc(0), centre = row_centre(a.kind, mean);
    const Acc inv_std = row_inv_std(a.kind, mean, row_sum_deviations(s, centre, n), n, a.eps);
    a.inv_std[r] = inv_std;
    if (a.mean) a.mean[r] = mean;
    T* to = y.row(r);
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) narrow((s[c] - centre) * inv_std * a.weight[c] + a.bias[c], &to[c]);
    y.finish(r);
  }
}

template <class T>
struct BackwardRows {
  using Acc = AccOf<T>;
  const T *dy, *ds, *s;
  const Acc* weight;
  RowNorm kind;
  const Acc *inv_std, *mean;
  Acc *sums_dyz, *sums_dy, *copy_dy, *copy_s;
};

template <class T>
NORMFUSE_CLONES void backward_rows(const BackwardRows<T>& a, int64_t rows, int64_t n, RowOutput<T> dx) {
  using Acc = AccOf<T>;
  const Acc* __restrict weight = a.weight;
  Acc* __restrict sums_dyz = a.sums_dyz, * __restrict sums_dy = a.sums_dy;
  for (int64_t r = 0; r < rows; ++r) {
    const Acc* __restrict dy = widen_row(a.dy + r * n, a.copy_dy, n), * __restrict s =
                                                                          widen_row(a.s + r * n, a.copy_s, n);
    const Acc mean = a.mean ? a.mean[r] : Acc(0), inv_std = a.inv_std[r], centre = row_centre(a.kind, mean);
    Acc sum_g = 0, sum_gz = 0;
#pragma omp simd reduction(+ : sum_g, sum_gz)
    for (int64_t c = 0; c < n; ++c) {
      const Acc z = (s[c] - centre) * inv_std, g = weight[c] * dy[c];
      sums_dyz[c] += dy[c] * z;
      sums_dy[c] += dy[c];
      sum_g += g;
      sum_gz += g * z;
    }
    const auto k = row_gradient(a.kind, mean, inv_std, sum_g, sum_gz, n);
    T* to = dx.row(r);
    if (a.ds) {
      const T* __restrict ds = a.ds + r * n;
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
        const Acc z = (s[c] - centre) * inv_std;
        narrow(inv_std * (weight[c] * dy[c] - k.offset - k.slope * z) + widen(ds[c]), &to[c]);
      }
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
        const Acc z = (s[c] - centre) * inv_std;
        narrow(inv_std * (weight[c] * dy[c] - k.offset - k.slope * z), &to[c]);
      }
    }
    dx.finish(r);
  }
}

// The vector itself, or one filled with what stands for it.
template <class Acc>
class VectorOr {
 public:
  VectorOr(const void* given, int64_t n, Acc otherwise) : given_(static_cast<const Acc*>(given)) {
    if (!given_) filled_.assign(n, otherwise);
  }
  const Acc* data() const { return given_ ? given_ : filled_.data(); }

 private:
  const Acc* given_;
  std::vector<Acc> filled_;
};

template <class T>
void forward(const RowNormForward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const VectorOr<Acc> weight(a.weight, n, Acc(1)), bias(a.bias, n, Acc(0));
  const auto pass = [&](int64_t b) {
    std::vector<Acc> copy(std::is_same_v<T, Acc> ? 0 : n);
    const int64_t r = blocks.first(b), at = r * n;
    const ForwardRows<T> rows{
        rows_of<T>(a.x, at), rows_of<T>(a.residual, at), weight.data(),           bias.data(), a.kind, Acc(a.eps),
        rows_of<T>(a.s, at), rows_of<Acc>(a.inv_std, r), rows_of<Acc>(a.mean, r), copy.data()};
    forward_rows<T>(rows, blocks.length(b), n, {rows_of<T>(a.y, at), n, stream});
  };
  run_phases(parallel, {blocks.each(pass)});
}

template <class T>
void backward(const RowNormBackward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const RowBlocks blocks(a.shape);
  const int64_t n = a.shape.channels;
  const bool stream = worth_streaming(a.shape.rows * n * sizeof(T));
  const VectorOr<Acc> weight(a.weight, n, Acc(1));
  ColumnSums<Acc> sums(blocks, 2 * n);  // of dy z, then of dy
  std::vector<Acc> total;
  const auto pass = [&](int64_t b) {
    std::vector<Acc> copies(std::is_same_v<T, Acc> ? 0 : 2 * n);
    Acc* of_block = sums.start(b);
    const int64_t r = blocks.first(b), at = r * n;
    const BackwardRows<T> rows{rows_of<T>(a.grad_y, at),
                               rows_of<T>(a.grad_s, at),
                               rows_of<T>(a.s, at),
                               weight.data(),
                               a.kind,
                               rows_of<Acc>(a.inv_std, r),
                               rows_of<Acc>(a.mean, r),
                               of_block,
                               of_block + n,
                               copies.data(),
                               copies.data() + (copies.empty() ? 0 : n)};
    backward_rows<T>(rows, blocks.length(b), n, {rows_of<T>(a.grad_x, at), n, stream});
  };
  run_phases(parallel, {blocks.each(pass), sums.total(total)});
  std::copy_n(total.begin(), n, static_cast<Acc*>(a.grad_weight));
  std::copy_n(total.begin() + n, n, static_cast<Acc*>(a.grad_bias));
}

}  // namespace
}  // namespace cpu

void run_cpu(const RowNormForward& args, Parallel parallel) {
  cpu::with_element_type(args.shape.dtype, [&](auto t) { cpu::forward<decltype(t)>(args, parallel); });
}

void run_cpu(const RowNormBackward& args, Parallel parallel) {
  cpu::with_element_type(args.shape.dtype, [&](auto t) { cpu::backward<decltype(t)>(args, parallel); });
}

}  // namespace normfuse
