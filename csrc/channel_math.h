// The arithmetic of one training step on one channel, shared by the host and the device kernels. `Acc` is
// float or double. The includer defines NORMFUSE_INLINE (inline on the host, a device function under nvcc).
//
// z is x divided by the statistic, w the gain, t the step counter after its increment, q the quadratic mean
// of the batch's valid rows. Windows are read as column[i * stride], i < window. t = 0 stands for a batch without a valid
// row, which moves nothing: it is normalised by the running statistic. No counter, whatever its value, leaves the memory.
#pragma once
#include <cmath>
#include <cstdint>

namespace normfuse {

template <class Acc>
NORMFUSE_INLINE Acc inverse_sqrt(Acc v) {
  return Acc(1) / std::sqrt(v);
}

// The step after `iters`; past the largest number it goes on from the smallest, as torch's add does.
NORMFUSE_INLINE int64_t next_step(int64_t iters) { return int64_t(uint64_t(iters) + 1); }

// The entry of a window that step t takes, from 0 to window - 1.
NORMFUSE_INLINE int64_t slot_of(int64_t t, int64_t window) {
  const int64_t rest = t % window;
  return rest < 0 ? rest + window : rest;
}

template <class Acc>
NORMFUSE_INLINE Acc mean_or(Acc sum, int64_t count, Acc otherwise) {
  return count > 0 ? sum / Acc(count) : otherwise;
}

// A step's number that is not finite shows in the step's results but never enters a statistic.
template <class Acc>
NORMFUSE_INLINE bool usable(Acc v) {
  return v - v == Acc(0);
}

template <class Acc>
NORMFUSE_INLINE Acc arithmetic_mean(const Acc* column, int64_t window, int64_t stride) {
  Acc sum = 0;
  for (int64_t i = 0; i < window; ++i) sum += column[i * stride];
  return sum / Acc(window);
}

template <class Acc>
NORMFUSE_INLINE Acc geometric_mean(const Acc* column, int64_t window, int64_t stride) {
  Acc sum = 0;
  for (int64_t i = 0; i < window; ++i) sum += std::log(column[i * stride]);
  return std::exp(sum / Acc(window));
}

// dx = slope * dy - pull * x
template <class Acc>
struct Coefficients {
  Acc slope;
  Acc pull;
};

struct UnifiedStep {
  int64_t t;
  bool skip;
  int64_t window;
  int64_t warmup_iters;

  NORMFUSE_INLINE bool uses_window() const { return !(t <= window || t < warmup_iters || skip); }
};

// Outlier test of the unified forward, after q entered the window: spread is the variance of all entries before.
template <class Acc>
NORMFUSE_INLINE bool unified_is_outlier(const Acc* column, int64_t window, int64_t stride, Acc spread) {
  const Acc gap = arithmetic_mean(column, window, stride) - geometric_mean(column, window, stride);
  return gap > spread * Acc(window);
}

template <class Acc>
struct UnifiedStats {
  Acc inv_std;
  Acc r;
};

// sqrt(var + eps) / sqrt(running_var + eps), clamped; 1 in the first thousand steps and in the warm-up.
template <class Acc>
NORMFUSE_INLINE Acc clamped_ratio(int64_t t, int64_t warmup_iters, Acc var, Acc running_var, Acc eps) {
  if (t <= (warmup_iters > 1000 ? warmup_iters : 1000)) return Acc(1);
  const Acc r = std::sqrt(var + eps) / std::sqrt(running_var + eps);
  return r < Acc(0.2) ? Acc(0.2) : r > Acc(5) ? Acc(5) : r;
}

// var = q or the window's geometric mean; r = sqrt(var + eps) / sqrt(running_var + eps), clamped; then
// running_var moves. The window holds q already.
template <class Acc>
NORMFUSE_INLINE UnifiedStats<Acc> unified_forward_channel(const UnifiedStep& step, Acc q, Acc* column, int64_t stride,
                                                          Acc eps, Acc momentum, Acc* running_var) {
  if (step.t == 0) return {inverse_sqrt(*running_var + eps), Acc(1)};
  if (!usable(q)) column[slot_of(step.t, step.window) * stride] = *running_var;
  const Acc var = step.uses_window() && usable(q) ? geometric_mean(column, step.window, stride) : q;
  const Acc r = step.skip ? Acc(1) : clamped_ratio(step.t, step.warmup_iters, var, *running_var, eps);
  if (usable(q)) *running_var = momentum * *running_var + (1 - momentum) * var;
  return {inverse_sqrt(var + eps), r};
}

// m = mean of w r dy z; the gradient window turns it into ema_gz; dx = (w r dy - ema_gz z) / sqrt(var + eps).
template <class Acc>
NORMFUSE_INLINE Coefficients<Acc> unified_backward_channel(const UnifiedStep& step, Acc m, Acc weight,
                                                           UnifiedStats<Acc> stats, Acc* column, int64_t stride,
                                                           Acc momentum, Acc* ema_gz) {
  if (step.t == 0) return {weight * stats.r * stats.inv_std, *ema_gz * stats.inv_std * stats.inv_std};
  column[slot_of(step.t, step.window) * stride] = step.skip || !usable(m) ? *ema_gz : m;
  const Acc mg = step.uses_window() ? arithmetic_mean(column, step.window, stride) : m;
  if (usable(m)) *ema_gz = momentum * *ema_gz + (1 - momentum) * mg;
  const Acc pull = step.skip && usable(m) ? mg : *ema_gz;
  return {weight * stats.r * stats.inv_std, pull * stats.inv_std * stats.inv_std};
}

// What PowerNorm divides by in step t, before running_phi moves.
NORMFUSE_INLINE bool power_uses_batch(int64_t t, int64_t warmup_iters) { return t <= warmup_iters; }

template <class Acc>
NORMFUSE_INLINE Acc power_moved_phi(int64_t t, int64_t warmup_iters, Acc q, Acc phi, Acc alpha_fwd) {
  if (!usable(q)) return phi;
  if (t < warmup_iters) phi = phi * ((Acc(t) - 1) / Acc(t)) + q / Acc(t);
  return alpha_fwd * phi + (1 - alpha_fwd) * q;
}

// a = w dy - (1 - alpha) ema_gz z; dx = a * inv_grad, with the old ema_gz. z = x * inv_used.
template <class Acc>
NORMFUSE_INLINE Coefficients<Acc> power_coefficients(Acc weight, Acc ema_gz, Acc inv_used, Acc inv_grad,
                                                     Acc alpha_bkw) {
  return {weight * inv_grad, (1 - alpha_bkw) * ema_gz * inv_used * inv_grad};
}

// ema_gz + mean of a z, from the means over all rows of dy x and of x squared.
template <class Acc>
NORMFUSE_INLINE Acc power_moved_ema(Acc weight, Acc ema_gz, Acc inv_used, Acc mean_dyx, Acc mean_x2, Acc alpha_bkw) {
  const Acc step = weight * inv_used * mean_dyx - (1 - alpha_bkw) * ema_gz * inv_used * inv_used * mean_x2;
  return usable(step) ? ema_gz + step : ema_gz;
}

}  // namespace normfuse
