// Schemas and arguments of batch normalisation and its kin.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "bindings.h"

namespace normfuse {
namespace {

// Of a variance: divided by n or by n - 1.
int64_t correction_of(int64_t correction) {
  STD_TORCH_CHECK(correction == 0 || correction == 1, "normfuse: correction is ", correction, "; it must be 0 or 1.");
  return correction;
}

// x [samples, channels, positions] of batch normalisation and its kin.
struct StatGroupInput {
  StatGroups stat_groups;
  Input in;  // that sees [samples * channels, positions]

  StatGroupInput(const Tensor& x, const std::optional<Tensor>& mask, int64_t group_size, bool regions,
                 const char* mask_name = "mask")
      : in(x) {
    STD_TORCH_CHECK(x.dim() == 3, "normfuse: x must have shape [samples, channels, positions].");
    const int64_t samples = x.size(0), channels = x.size(1), positions = x.size(2), all = std::max<int64_t>(samples, 1);
    STD_TORCH_CHECK(channels > 0 && channels <= kMostChannels, "normfuse: x has ", channels,
                    " channels; it must have from 1 to ", kMostChannels, ".");
    STD_TORCH_CHECK(group_size >= 0, "normfuse: group_size is ", group_size,
                    "; it must be at least 1, or 0 for one group.");
    stat_groups = {samples, channels, positions, in.shape.dtype, group_size > 0 ? std::min(group_size, all) : all,
                   nullptr, regions};
    if (mask)
      stat_groups.mask =
          static_cast<const bool*>(in.check(mask_name, *mask, ScalarType::Bool, samples, positions).const_data_ptr());
  }

  int64_t size() const { return stat_groups.groups() * stat_groups.sets() * stat_groups.channels; }
  Tensor per_stat_group(std::initializer_list<int64_t> before, ScalarType type, bool channels) const {
    std::vector<int64_t> shape(before);
    shape.insert(shape.end(), {stat_groups.groups(), stat_groups.sets()});
    if (channels) shape.push_back(stat_groups.channels);
    return torch::stable::new_empty(in.x, shape, type);
  }
  const void* vector(const char* name, const Tensor& t) const {
    return in.check(name, t, in.acc, -1, stat_groups.channels).const_data_ptr();
  }
  void* state(const char* name, const Tensor& t) const {
    return in.check(name, t, in.acc, -1, stat_groups.channels).mutable_data_ptr();
  }
  void* window(const char* name, const Tensor& t) const {
    return in.check(name, t, in.acc, in.window(name, t), stat_groups.channels).mutable_data_ptr();
  }
  const void* number(const char* name, const std::optional<Tensor>& t) const {
    return t ? in.check(name, *t, in.acc, -1, 1).const_data_ptr() : nullptr;
  }
  // Contiguous [groups or 1, sets or 1, channels].
  PerStatGroup broadcast(const char* name, const Tensor& t) const {
    in.check_type(name, t, in.acc);
    const auto fits = [&](int64_t dim, int64_t size) { return t.size(dim) == size || t.size(dim) == 1; };
    STD_TORCH_CHECK(t.is_contiguous() && t.dim() == 3 && fits(0, stat_groups.groups()) && fits(1, stat_groups.sets()) &&
                        t.size(2) == stat_groups.channels,
                    "normfuse: ", name, " must be contiguous of shape [", stat_groups.groups(), " or 1, ",
                    stat_groups.sets(), " or 1, ", stat_groups.channels, "].");
    check_memory(name, t);
    const int64_t n = stat_groups.channels, sets = t.size(1);
    return {t.const_data_ptr(), t.size(0) == 1 ? 0 : sets * n, sets == 1 ? 0 : n};
  }
  // As many acc numbers as there are statistics groups, times `times`.
  const void* of_stat_groups(const char* name, const Tensor& t, int64_t times = 1) const {
    in.check_type(name, t, in.acc);
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() == times * size(), "normfuse: ", name, " must be contiguous with ",
                    times * size(), " numbers.");
    check_memory(name, t);
    return t.const_data_ptr();
  }
  const void* of_stat_groups(const char* name, const std::optional<Tensor>& t) const {
    return t ? of_stat_groups(name, *t) : nullptr;
  }
};

template <class Args>
void run(typename Kernel<Args>::Host host, typename Kernel<Args>::Device device, const Args& args,
         const StatGroupInput& x) {
  if (x.in.x.is_cpu())
    host(args, parallel);
  else
    run_on_device(device, args, x.in.x, x.stat_groups);
}

using Normalised = std::tuple<Tensor, Tensor, Tensor>;

// Runs the forward whose state and options are set in `a`.
Normalised normalise_stat_groups(BatchNormForward a, const StatGroupInput& x, const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& shortcut) {
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "normfuse: weight and bias come together.");
  const Tensor& in = x.in.x;
  Tensor y = weight ? x.in.new_like_x() : torch::stable::new_empty(in, {0}, in.scalar_type());
  Tensor stats = x.per_stat_group({3}, x.in.acc, true), count = x.per_stat_group({}, ScalarType::Long, false);
  a.stat_groups = x.stat_groups;
  a.x = in.const_data_ptr();
  if (weight) {
    a.weight = x.broadcast("weight", *weight);
    a.bias = x.broadcast("bias", *bias);
  }
  a.shortcut = x.number("shortcut", shortcut);
  a.y = y.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  a.count = static_cast<int64_t*>(count.mutable_data_ptr());
  run(&batch_norm_forward_cpu, NORMFUSE_DEVICE(batch_norm_forward_cuda), a, x);
  return {y, stats, count};
}

Normalised batch_norm_forward(Tensor x, std::optional<Tensor> mask, Tensor weight, Tensor bias,
                              std::optional<Tensor> shortcut, Tensor running_mean, Tensor running_var,
                              Tensor num_batches_tracked, int64_t group_size, bool estimated,
                              std::optional<double> momentum, double eps, double floor) {
  const StatGroupInput in(x, mask, group_size, false);
  STD_TORCH_CHECK(!estimated || in.stat_groups.groups() == 1, "normfuse: estimated statistics have one group.");
  BatchNormForward a{};
  a.estimated = estimated;
  a.momentum = momentum.value_or(-1.0);
  a.eps = eps;
  a.floor = floor;
  a.running_mean = in.state("running_mean", running_mean);
  a.running_var = in.state("running_var", running_var);
  a.num_batches_tracked = in.in.counter("num_batches_tracked", num_batches_tracked);
  return normalise_stat_groups(a, in, weight, bias, shortcut);
}

Normalised stat_group_norm_forward(Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                                   std::optional<Tensor> bias, std::optional<Tensor> shortcut, int64_t group_size,
                                   int64_t correction, double eps, double eps_total) {
  BatchNormForward a{};
  a.correction = correction_of(correction);
  a.eps = eps;
  a.eps_total = eps_total;
  return normalise_stat_groups(a, StatGroupInput(x, mask, group_size, true), weight, bias, shortcut);
}

Normalised batch_norm_backward(Tensor grad_y, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var, Tensor x,
                               std::optional<Tensor> mask, Tensor weight, std::optional<Tensor> shortcut, Tensor stats,
                               Tensor count, int64_t group_size, bool regions, int64_t correction, bool estimated,
                               double floor) {
  const StatGroupInput in(x, mask, group_size, regions);
  Tensor grad_x = in.in.new_like_x(), grad_weight = in.per_stat_group({}, in.in.acc, true),
         grad_bias = in.per_stat_group({}, in.in.acc, true);
  BatchNormBackward a{};
  a.stat_groups = in.stat_groups;
  a.grad_y = in.in.like_x("grad_y", grad_y);
  a.grad_mean = in.of_stat_groups("grad_mean", grad_mean);
  a.grad_var = in.of_stat_groups("grad_var", grad_var);
  a.x = x.const_data_ptr();
  a.weight = in.broadcast("weight", weight);
  a.shortcut = in.number("shortcut", shortcut);
  a.stats = in.of_stat_groups("stats", stats, 3);
  a.count = static_cast<int64_t*>(
      in.in.check("count", count, ScalarType::Long, in.stat_groups.groups(), in.stat_groups.sets()).mutable_data_ptr());
  a.correction = correction_of(correction);
  a.estimated = estimated;
  a.floor = floor;
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  run(&batch_norm_backward_cpu, NORMFUSE_DEVICE(batch_norm_backward_cuda), a, in);
  return {grad_x, grad_weight, grad_bias};
}

Normalised moving_average_forward(Tensor x, std::optional<Tensor> pad_mask, Tensor weight, Tensor bias,
                                  Tensor running_var, Tensor buffer_x2, Tensor iters, int64_t warmup_iters, double eps,
                                  double momentum) {
  const StatGroupInput in(x, pad_mask, 0, false, "pad_mask");
  Tensor y = in.in.new_like_x(), stats = torch::stable::new_empty(x, {2, in.stat_groups.channels}, in.in.acc),
         step = torch::stable::new_empty(x, {1}, ScalarType::Long);
  MovingAverageForward a{};
  a.stat_groups = in.stat_groups;
  a.x = x.const_data_ptr();
  a.weight = in.vector("weight", weight);
  a.bias = in.vector("bias", bias);
  a.window = in.in.window("buffer_x2", buffer_x2);
  a.warmup_iters = warmup_iters;
  a.eps = eps;
  a.momentum = momentum;
  a.running_var = in.state("running_var", running_var);
  a.buffer_x2 = in.window("buffer_x2", buffer_x2);
  a.iters = in.in.counter("iters", iters);
  a.y = y.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  a.step = static_cast<int64_t*>(step.mutable_data_ptr());
  run(&moving_average_forward_cpu, NORMFUSE_DEVICE(moving_average_forward_cuda), a, in);
  return {y, stats, step};
}

Normalised moving_average_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor step, Tensor buffer_gz,
                                   int64_t warmup_iters) {
  const StatGroupInput in(x, std::nullopt, 0, false);
  Tensor grad_x = in.in.new_like_x(), grad_weight = torch::stable::new_empty(x, {in.stat_groups.channels}, in.in.acc),
         grad_bias = torch::stable::new_empty(x, {in.stat_groups.channels}, in.in.acc);
  MovingAverageBackward a{};
  a.stat_groups = in.stat_groups;
  a.grad_y = in.in.like_x("grad_y", grad_y);
  a.x = x.const_data_ptr();
  a.weight = in.vector("weight", weight);
  a.stats = in.in.check("stats", stats, in.in.acc, 2, in.stat_groups.channels).const_data_ptr();
  a.step = in.in.integers("step", step, 1);
  a.window = in.in.window("buffer_gz", buffer_gz);
  a.warmup_iters = warmup_iters;
  a.buffer_gz = in.window("buffer_gz", buffer_gz);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  run(&moving_average_backward_cpu, NORMFUSE_DEVICE(moving_average_backward_cuda), a, in);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace normfuse

STABLE_TORCH_LIBRARY_FRAGMENT(normfuse, m) {
  m.def(
      "batch_norm_forward(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor? shortcut, Tensor(a!) "
      "running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, int group_size, bool estimated, float? "
      "momentum, float eps, float floor=0.) -> (Tensor y, Tensor stats, Tensor count)");
  m.def(
      "stat_group_norm_forward(Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? shortcut, int group_size, "
      "int "
      "correction, float eps, float eps_total=0.) -> (Tensor y, Tensor stats, Tensor count)");
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor? mask, Tensor weight, "
      "Tensor? shortcut, Tensor stats, Tensor count, int group_size, bool regions, int correction, bool estimated, "
      "float floor=0.) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "moving_average_norm_forward(Tensor x, Tensor? pad_mask, Tensor weight, Tensor bias, Tensor(a!) running_var, "
      "Tensor(b!) buffer_x2, Tensor(c!) iters, int warmup_iters, float eps, float momentum) "
      "-> (Tensor y, Tensor stats, Tensor step)");
  m.def(
      "moving_average_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor step, Tensor(a!) "
      "buffer_gz, int warmup_iters) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

#define NORMFUSE_REGISTER(m)                                                           \
  m.impl("batch_norm_forward", TORCH_BOX(&normfuse::batch_norm_forward));              \
  m.impl("stat_group_norm_forward", TORCH_BOX(&normfuse::stat_group_norm_forward));    \
  m.impl("batch_norm_backward", TORCH_BOX(&normfuse::batch_norm_backward));            \
  m.impl("moving_average_norm_forward", TORCH_BOX(&normfuse::moving_average_forward)); \
  m.impl("moving_average_norm_backward", TORCH_BOX(&normfuse::moving_average_backward))

STABLE_TORCH_LIBRARY_IMPL(normfuse, CPU, m) { NORMFUSE_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(normfuse, CUDA, m) { NORMFUSE_REGISTER(m); }
