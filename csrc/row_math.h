// The arithmetic of the row norms on one row, shared by the host and the device kernels. The includer defines
// NORMFUSE_INLINE. n is the number of channels, m the row's mean where it is taken away and 0 elsewhere,
// z = (x - m) inv_std, g = w dy.
//
//   LayerNorm   inv_std = 1/sqrt(sum (x - m)^2 / n + eps)
//   RMSNorm     inv_std = 1/sqrt(sum x^2 / n + eps)
//   CRMSNorm    inv_std = 1/sqrt((sum x^2 + (sum x)^2) / (n + 1) + eps): the RMS of a row of n + 1 channels
//               with mean zero, whose last channel is left out because it is minus the sum of the others
//
// All three: dx = inv_std (g - offset - slope z), with
//   slope = sum g z / n, or / (n + 1) for CRMSNorm
//   offset = sum g / n for LayerNorm, 0 for RMSNorm, inv_std (sum x) slope for CRMSNorm
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels.h"

namespace normfuse {

// Whether the row's mean belongs to its statistics.
NORMFUSE_INLINE bool has_mean(RowNorm kind) { return kind != RowNorm::kRms; }

// What is taken away from the row's numbers.
template <class Acc>
NORMFUSE_INLINE Acc row_centre(RowNorm kind, Acc mean) {
  return kind == RowNorm::kLayer ? mean : Acc(0);
}

// squares = sum (x - m)^2
template <class Acc>
NORMFUSE_INLINE Acc row_inv_std(RowNorm kind, Acc mean, Acc squares, int64_t n, Acc eps) {
  const Acc sum = mean * Acc(n);
  const Acc mean_square = kind == RowNorm::kCentredRms ? (squares + sum * sum) / Acc(n + 1) : squares / Acc(n);
  return Acc(1) / std::sqrt(mean_square + eps);
}

template <class Acc>
struct RowGradient {
  Acc offset;
  Acc slope;
};

template <class Acc>
NORMFUSE_INLINE RowGradient<Acc> row_gradient(RowNorm kind, Acc mean, Acc inv_std, Acc sum_g, Acc sum_gz, int64_t n) {
  if (kind == RowNorm::kLayer) return {sum_g / Acc(n), sum_gz / Acc(n)};
  if (kind == RowNorm::kRms) return {Acc(0), sum_gz / Acc(n)};
  const Acc slope = sum_gz / Acc(n + 1);
  return {inv_std * mean * Acc(n) * slope, slope};
}

}  // namespace normfuse
