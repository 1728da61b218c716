// Batch normalisation and its kin on the host; stat_group_math.h has the algebra.
//   forward   mean and squared deviations of every statistics group, then y = scale (x - mean) + shift. Reads x, and x
//             again with the last block first while that is cached; writes y.
//   backward  sums of dy and dy (x - mean), then dx = slope dy + pull (x - mean) + offset. Reads dy and x twice in the
//             same way, writes dx.
#include "stat_groups.h"

namespace normfuse {
namespace cpu {
namespace {

template <class Acc>
Acc number_of(const PerStatGroup& vectors, int64_t group, int64_t set, int64_t channel) {
  return static_cast<const Acc*>(vectors.data)[group * vectors.group_stride + set * vectors.set_stride + channel];
}

// use(group, set, channel, index) for every statistics group.
template <class T, class Use>
void each_stat_group(const StatGroupPasses<T>& passes, const Use& use) {
  for (int64_t g = 0; g < passes.groups; ++g)
    for (int64_t s = 0; s < passes.sets; ++s)
      for (int64_t c = 0; c < passes.stat_groups.channels; ++c) use(g, s, c, passes.at(g, s) + c);
}

template <class T>
void forward(const BatchNormForward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const StatGroupPasses<T> passes(a.stat_groups);
  const T* x = static_cast<const T*>(a.x);
  Acc *mean = static_cast<Acc*>(a.stats), *var = mean + passes.size, *inv_std = var + passes.size;

  AffineOfStatGroups<Acc> by{mean, {}, {}};
  if (a.weight.data) {
    by.scale.resize(passes.size);
    by.shift.resize(passes.size);
  }
  Acc *running_mean = static_cast<Acc*>(a.running_mean), *running_var = static_cast<Acc*>(a.running_var);
  const Acc shortcut = a.shortcut ? *static_cast<const Acc*>(a.shortcut) : Acc(0);
  const auto use_moments = [&](int64_t g, int64_t s, int64_t c, int64_t i) {
    const int64_t count = a.count[g * passes.sets + s];
    if (running_mean && count > 0 && s == 0 && c == 0) *a.num_batches_tracked = next_step(*a.num_batches_tracked);
    const Acc rate = running_mean ? moving_rate<Acc>(a.momentum, *a.num_batches_tracked) : Acc(0);
    if (running_mean && !a.estimated && count > 0)
      move_running(mean[i], unbiased_var(var[i], count), rate, running_mean + c, running_var + c);
    const auto stats = a.estimated ? estimated_stats(a, mean[i], var[i], count, rate, running_mean + c, running_var + c)
                                   : own_stats(a, mean[i], var[i], count);
    mean[i] = stats.mean;
    var[i] = stats.var;
    inv_std[i] = stats.inv_std;
    if (!a.weight.data) return;
    const auto affine =
        affine_of_stat_group(stats, number_of<Acc>(a.weight, g, s, c), number_of<Acc>(a.bias, g, s, c), shortcut);
    by.scale[i] = affine.scale;
    by.shift[i] = affine.shift;
  };
  std::vector<Phase> phases = passes.moments(x, mean, var, a.count);
  phases.push_back(once([&] { each_stat_group(passes, use_moments); }));
  if (a.weight.data) phases.push_back(passes.affine(x, by, static_cast<T*>(a.y)));
  run_phases(parallel, phases);
}

template <class T>
void backward(const BatchNormBackward& a, Parallel parallel) {
  using Acc = AccOf<T>;
  const StatGroupPasses<T> passes(a.stat_groups);
  const T *dy = static_cast<const T*>(a.grad_y), *x = static_cast<const T*>(a.x);
  const Acc *mean = static_cast<const Acc*>(a.stats), *var = mean + passes.size, *inv_std = var + passes.size;
  Acc *sum_dy = static_cast<Acc*>(a.grad_bias), *sum_dyd = static_cast<Acc*>(a.grad_weight);

  GradientOfStatGroups<Acc> by{mean, StatGroupVector<Acc>(passes.size), StatGroupVector<Acc>(passes.size),
                               StatGroupVector<Acc>(passes.size)};
  const Acc shortcut = a.shortcut ? *static_cast<const Acc*>(a.shortcut) : Acc(0);
  const auto of = [](const void* vectors, int64_t i) { return vectors ? static_cast<const Acc*>(vectors)[i] : Acc(0); };
  const auto use_sums = [&](int64_t g, int64_t s, int64_t c, int64_t i) {
    const auto k =
        gradient_of_stat_group<Acc>({mean[i], var[i], inv_std[i]}, number_of<Acc>(a.weight, g, s, c), shortcut,
                                    sum_dy[i], sum_dyd[i], of(a.grad_mean, i), of(a.grad_var, i),
                                    a.estimated ? 0 : a.count[g * passes.sets + s], a.correction, Acc(a.floor));
    by.slope[i] = k.slope;
    by.pull[i] = k.pull;
    by.offset[i] = k.offset;
    sum_dyd[i] *= inv_std[i];
  };
  std::vector<Phase> phases = passes.gradient_sums(dy, x, mean, sum_dy, sum_dyd);
  phases.push_back(once([&] { each_stat_group(passes, use_sums); }));
  phases.push_back(passes.gradient(dy, x, by, static_cast<T*>(a.grad_x)));
  run_phases(parallel, phases);
}

}  // namespace
}  // namespace cpu

void run_cpu(const BatchNormForward& args, Parallel parallel) {
  cpu::with_element_type(args.stat_groups.dtype, [&](auto t) { cpu::forward<decltype(t)>(args, parallel); });
}

void run_cpu(const BatchNormBackward& args, Parallel parallel) {
  cpu::with_element_type(args.stat_groups.dtype, [&](auto t) { cpu::backward<decltype(t)>(args, parallel); });
}

}  // namespace normfuse
