// Moving average batch normalisation on the host: the passes of batch normalisation, around zero instead of the mean.
#include "stat_groups.h"

namespace normfuse {
namespace cpu {
namespace {

template <class T>
void forward(const MovingAverageForward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const StatGroupPasses<T> passes(a.stat_groups);
  const T* x = static_cast<const T*>(a.x);
  const int64_t n = a.stat_groups.channels;
  StatGroupVector<Acc> mean(n), squares(n);
  int64_t count = 0;
  const StatGroupVector<Acc> zero(n);
  AffineOfStatGroups<Acc> by{zero.data(), StatGroupVector<Acc>(n), StatGroupVector<Acc>(n)};
  Acc *running_var = static_cast<Acc*>(a.running_var), *inv_std = static_cast<Acc*>(a.stats), *ratio = inv_std + n;
  const auto move_statistics = [&] {
    const int64_t t = count > 0 ? next_step(*a.iters) : 0;
    if (count > 0) *a.iters = t;
    for (int64_t c = 0; c < n; ++c) {
      const Acc q = count > 0 ? squares[c] / Acc(count) + mean[c] * mean[c] : running_var[c];
      const auto stats =
          moving_average_forward_channel(t, a.window, a.warmup_iters, q, static_cast<Acc*>(a.buffer_x2) + c, n,
                                         Acc(a.eps), Acc(a.momentum), running_var + c);
      inv_std[c] = stats.inv_std;
      ratio[c] = stats.r;
      by.scale[c] = static_cast<const Acc*>(a.weight)[c] * stats.r * stats.inv_std;
      by.shift[c] = static_cast<const Acc*>(a.bias)[c];
    }
    *a.step = t;
  };
  std::vector<Phase> phases = passes.moments(x, mean.data(), squares.data(), &count);
  phases.push_back(once(move_statistics));
  phases.push_back(passes.affine(x, by, static_cast<T*>(a.y)));
  run_phases(parallel, phases);
}

template <class T>
void backward(const MovingAverageBackward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const StatGroupPasses<T> passes(a.stat_groups);
  const T *dy = static_cast<const T*>(a.grad_y), *x = static_cast<const T*>(a.x);
  const int64_t n = a.stat_groups.channels, count = a.stat_groups.samples * a.stat_groups.positions;
  const StatGroupVector<Acc> zero(n);
  Acc *sum_dy = static_cast<Acc*>(a.grad_bias), *sum_dyx = static_cast<Acc*>(a.grad_weight);

  GradientOfStatGroups<Acc> by{zero.data(), StatGroupVector<Acc>(n), StatGroupVector<Acc>(n), zero};
  const Acc *weight = static_cast<const Acc*>(a.weight), *inv_std = static_cast<const Acc*>(a.stats),
            *ratio = inv_std + n;
  const auto move_statistics = [&] {
    for (int64_t c = 0; c < n; ++c) {
      sum_dyx[c] *= ratio[c] * inv_std[c];
      const Acc m = mean_or(weight[c] * sum_dyx[c], count, Acc(0));
      const auto k = moving_average_backward_channel(*a.step, a.window, a.warmup_iters, m, weight[c],
                                                     {inv_std[c], ratio[c]}, static_cast<Acc*>(a.buffer_gz) + c, n);
      by.slope[c] = k.slope;
      by.pull[c] = -k.pull;
    }
  };
  std::vector<Phase> phases = passes.gradient_sums(dy, x, zero.data(), sum_dy, sum_dyx);
  phases.push_back(once(move_statistics));
  phases.push_back(passes.gradient(dy, x, by, static_cast<T*>(a.grad_x)));
  run_phases(parallel, phases);
}

}  // namespace
}  // namespace cpu

void run_cpu(const MovingAverageForward& args, Parallel parallel) {
  cpu::with_element_type(args.stat_groups.dtype, [&](auto t) { cpu::forward<decltype(t)>(args, parallel); });
}

void run_cpu(const MovingAverageBackward& args, Parallel parallel) {
  cpu::with_element_type(args.stat_groups.dtype, [&](auto t) { cpu::backward<decltype(t)>(args, parallel); });
}

}  // namespace normfuse
