// The arithmetic of batch normalisation and its kin on one statistics group, the numbers that share statistics, on host
// and device. The includer defines NORMFUSE_INLINE. m is the mean taken away, w the gain,
// a the share of x itself that is added (or 0):
//
//   y  = w (x - m) inv_std + b + a x             = scale (x - m) + shift
//   dx = w inv_std dy + a dy + what comes through = slope dy + pull (x - m) + offset
//
// Through the statistics of n numbers, with s1 = sum dy and s2 = sum dy (x - m), comes
//
//   pull   = (2 dvar - w inv_std^3 s2) / (n - correction)
//   offset = (dmean - w inv_std s1) / n
//
// where the second term of the pull is absent if the variance is below its floor.
#pragma once
#include <cmath>
#include <cstdint>

#include "channel_math.h"
#include "kernels.h"

namespace normfuse {

// Of `count` numbers: their mean and the sum of their squared deviations from it.
template <class Acc>
struct Moments {
  int64_t count;
  Acc mean;
  Acc squares;

  NORMFUSE_INLINE void add(const Moments& other) {
    if (other.count == 0) return;
    const Acc share = Acc(other.count) / Acc(count + other.count), gap = other.mean - mean;
    mean += gap * share;
    squares += other.squares + gap * gap * (Acc(count) * share);
    count += other.count;
  }
};

// Of the gradient: sums of dy and dy (x - m).
template <class Acc>
struct GradientSums {
  Acc dy;
  Acc dyd;

  NORMFUSE_INLINE void add(const GradientSums& other) {
    dy += other.dy;
    dyd += other.dyd;
  }
};

template <class Acc>
struct StatGroupStats {
  Acc mean;
  Acc var;
  Acc inv_std;
};

template <class Acc>
NORMFUSE_INLINE Acc stat_group_inv_std(const BatchNormForward& a, Acc var, int64_t count) {
  const Acc floored = var < Acc(a.floor) ? Acc(a.floor) : var;
  return inverse_sqrt(floored + Acc(a.eps) + Acc(a.eps_total) / Acc(count > 1 ? count : 1));
}

template <class Acc>
NORMFUSE_INLINE StatGroupStats<Acc> own_stats(const BatchNormForward& a, Acc mean, Acc squares, int64_t count) {
  const Acc var = count > 0 ? squares / (Acc(count) - Acc(a.correction)) : Acc(0);
  return {mean, var, stat_group_inv_std(a, var, count)};
}

// The share of the new value in update number `step`, from 1 on; without a momentum all updates have the same share.
template <class Acc>
NORMFUSE_INLINE Acc moving_rate(double momentum, int64_t step) {
  return momentum < 0 ? Acc(1) / Acc(step > 1 ? step : 1) : Acc(momentum);
}

// The variance as it enters the running one. Negative where nothing was counted: such a group is no update at all.
template <class Acc>
NORMFUSE_INLINE Acc unbiased_var(Acc squares, int64_t count) {
  return count == 0 ? Acc(-1) : squares / Acc(count > 1 ? count - 1 : 1);
}

template <class Acc>
NORMFUSE_INLINE bool is_update(Acc unbiased) {
  return !(unbiased < Acc(0));
}

template <class Acc>
NORMFUSE_INLINE void move_running(Acc mean, Acc var, Acc rate, Acc* running_mean, Acc* running_var) {
  if (!usable(mean) || !usable(var)) return;
  *running_mean = (1 - rate) * *running_mean + rate * mean;
  *running_var = (1 - rate) * *running_var + rate * var;
}

// Running statistics that move first and normalise then, the variance around the mean as it was.
template <class Acc>
NORMFUSE_INLINE StatGroupStats<Acc> estimated_stats(const BatchNormForward& a, Acc mean, Acc squares, int64_t count,
                                                    Acc rate, Acc* running_mean, Acc* running_var) {
  const Acc change = mean - *running_mean, var = count > 0 ? squares / Acc(count) + change * change : Acc(0);
  if (count > 0 && usable(change) && usable(var)) {
    *running_mean += rate * change;
    *running_var += rate * (var - *running_var);
  }
  return {*running_mean, *running_var, stat_group_inv_std(a, *running_var, count)};
}

template <class Acc>
struct StatGroupAffine {
  Acc scale;
  Acc shift;
};

template <class Acc>
NORMFUSE_INLINE StatGroupAffine<Acc> affine_of_stat_group(const StatGroupStats<Acc>& stats, Acc weight, Acc bias,
                                                          Acc shortcut) {
  return {weight * stats.inv_std + shortcut, bias + shortcut * stats.mean};
}

template <class Acc>
struct StatGroupGradient {
  Acc slope;
  Acc pull;
  Acc offset;
};

template <class Acc>
NORMFUSE_INLINE StatGroupGradient<Acc> gradient_of_stat_group(const StatGroupStats<Acc>& stats, Acc weight,
                                                              Acc shortcut, Acc sum_dy, Acc sum_dyd, Acc grad_mean,
                                                              Acc grad_var, int64_t count, int64_t correction,
                                                              Acc floor) {
  const Acc scale = weight * stats.inv_std;
  if (count == 0) return {scale + shortcut, Acc(0), Acc(0)};
  const Acc through_var = stats.var < floor ? Acc(0) : scale * stats.inv_std * stats.inv_std * sum_dyd;
  return {scale + shortcut, (2 * grad_var - through_var) / (Acc(count) - Acc(correction)),
          (grad_mean - scale * sum_dy) / Acc(count)};
}

// Moving average batch normalisation: q is the quadratic mean of this step, t its number, or 0: see channel_math.h.
template <class Acc>
NORMFUSE_INLINE UnifiedStats<Acc> moving_average_forward_channel(int64_t t, int64_t window, int64_t warmup_iters, Acc q,
                                                                 Acc* column, int64_t stride, Acc eps, Acc momentum,
                                                                 Acc* running_var) {
  if (t == 0) return {inverse_sqrt(*running_var + eps), Acc(1)};
  column[slot_of(t, window) * stride] = usable(q) ? q : *running_var;
  const bool warm = t <= window || t < warmup_iters || !usable(q);
  const Acc var = warm ? q : arithmetic_mean(column, window, stride);
  const Acc r = clamped_ratio(t, warmup_iters, var, *running_var, eps);
  if (usable(q)) *running_var = momentum * *running_var + (1 - momentum) * var;
  return {inverse_sqrt(var + eps), r};
}

// m is the mean of w r dy z.
template <class Acc>
NORMFUSE_INLINE Coefficients<Acc> moving_average_backward_channel(int64_t t, int64_t window, int64_t warmup_iters,
                                                                  Acc m, Acc weight, UnifiedStats<Acc> stats,
                                                                  Acc* column, int64_t stride) {
  if (t == 0)
    return {weight * stats.r * stats.inv_std, arithmetic_mean(column, window, stride) * stats.inv_std * stats.inv_std};
  column[slot_of(t, window) * stride] = usable(m) ? m : arithmetic_mean(column, window, stride);
  const Acc pull = t <= window || t < warmup_iters ? m : arithmetic_mean(column, window, stride);
  return {weight * stats.r * stats.inv_std, pull * stats.inv_std * stats.inv_std};
}

}  // namespace normfuse
