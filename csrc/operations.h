// The operations: each checks its arguments (inputs.h), makes its results and calls its kernel. For torch and for the NumPy
// arrays of the emulator, by `Backend`; the arguments are those of the schemas in bindings.cpp.
#pragma once
#include <tuple>

#include "inputs.h"

namespace normfuse {

template <class Backend>
struct Operations {
  using Tensor = typename Backend::Tensor;
  using Maybe = std::optional<Tensor>;
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Row = Input<Backend>;
  using Grouped = StatGroupInput<Backend>;

  static void* data(const Tensor& t) { return Backend::data(t); }
  static int64_t* integers(const Tensor& t) { return static_cast<int64_t*>(Backend::data(t)); }

  // New gradients of x, weight and bias, which the arguments `a` of a backward are to write.
  template <class Args>
  static Three new_gradients(Args& a, const Row& in, Tensor grad_weight, Tensor grad_bias) {
    Tensor grad_x = in.new_like_x();
    a.grad_x = data(grad_x);
    a.grad_weight = data(grad_weight);
    a.grad_bias = data(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }

  // -- Unified and Power Norm --

  static Three unified_forward(Tensor x, Maybe pad_mask, Tensor weight, Tensor bias, Tensor running_var,
                               Tensor buffer_x2, Tensor iters, Tensor skip_counter, int64_t warmup_iters,
                               bool outlier_filtration, double eps, double momentum, Maybe residual, Maybe s) {
    const Row in(x);
    Tensor y = in.new_like_x(), stats = in.new_stack(2), step = in.new_integers(2);
    UnifiedForward a{};
    a.shape = in.shape;
    a.x = data(x);
    a.pad_mask = in.mask(pad_mask);
    a.weight = in.vector("weight", weight);
    a.bias = in.vector("bias", bias);
    a.window = in.window("buffer_x2", buffer_x2);
    a.warmup_iters = warmup_iters;
    a.outlier_filtration = outlier_filtration;
    a.eps = eps;
    a.momentum = momentum;
    a.running_var = in.vector("running_var", running_var);
    a.buffer_x2 = in.stack("buffer_x2", buffer_x2, a.window);
    a.iters = in.counter("iters", iters);
    a.skip_counter = in.counter("skip_counter", skip_counter);
    a.y = data(y);
    a.stats = data(stats);
    a.step = integers(step);
    in.sum(residual, s, &a.residual, &a.s);
    Backend::run(a, x, a.shape, int64_t(0));
    return {y, stats, step};
  }

  static Three unified_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor step, Tensor ema_gz,
                                Tensor buffer_gz, int64_t warmup_iters, double momentum, Maybe grad_s) {
    const Row in(x);
    UnifiedBackward a{};
    a.shape = in.shape;
    a.grad_y = in.like_x("grad_y", grad_y);
    a.x = data(x);
    a.weight = in.vector("weight", weight);
    a.stats = in.stack("stats", stats, 2);
    a.step = in.integers("step", step, 2);
    a.window = in.window("buffer_gz", buffer_gz);
    a.warmup_iters = warmup_iters;
    a.momentum = momentum;
    a.ema_gz = in.vector("ema_gz", ema_gz);
    a.buffer_gz = in.stack("buffer_gz", buffer_gz, a.window);
    a.grad_s = in.like_x("grad_s", grad_s);
    const Three gradients = new_gradients(a, in, in.new_vector(), in.new_vector());
    Backend::run(a, x, a.shape, int64_t(0));
    return gradients;
  }

  static Three power_forward(Tensor x, Maybe pad_mask, Tensor weight, Tensor bias, Tensor running_phi, Tensor iters,
                             int64_t warmup_iters, int64_t group_num, double eps, double group_eps, double alpha_fwd,
                             Maybe residual, Maybe s) {
    const Row in(x);
    Tensor y = in.new_like_x(), stats = in.new_stack(3);
    PowerForward a{};
    a.shape = in.shape;
    a.x = data(x);
    a.pad_mask = in.mask(pad_mask);
    a.weight = in.vector("weight", weight);
    a.bias = in.vector("bias", bias);
    a.warmup_iters = warmup_iters;
    a.group_num = in.groups(group_num);
    a.eps = eps;
    a.group_eps = group_eps;
    a.alpha_fwd = alpha_fwd;
    a.running_phi = in.vector("running_phi", running_phi);
    a.iters = in.counter("iters", iters);
    Tensor row_scale =
        group_num ? Backend::empty(x, {in.shape.rows, group_num}, in.acc) : Backend::empty(x, {0}, in.acc);
    a.y = data(y);
    a.stats = data(stats);
    a.row_scale = data(row_scale);
    in.sum(residual, s, &a.residual, &a.s);
    Backend::run(a, x, a.shape, group_num);
    return {y, stats, row_scale};
  }

  static Three power_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor row_scale, Tensor ema_gz,
                              int64_t group_num, double alpha_bkw, bool paper, Maybe grad_s) {
    const Row in(x);
    PowerBackward a{};
    a.shape = in.shape;
    a.grad_y = in.like_x("grad_y", grad_y);
    a.x = data(x);
    a.weight = in.vector("weight", weight);
    a.stats = in.stack("stats", stats, 3);
    a.group_num = in.groups(group_num);
    a.row_scale = group_num ? in.of_type("row_scale", row_scale, in.acc, {in.shape.rows, group_num})
                            : in.of_type("row_scale", row_scale, in.acc, {0});
    a.alpha_bkw = alpha_bkw;
    a.paper = paper;
    a.ema_gz = in.vector("ema_gz", ema_gz);
    a.grad_s = in.like_x("grad_s", grad_s);
    const Three gradients = new_gradients(a, in, in.new_vector(), in.new_vector());
    Backend::run(a, x, a.shape, group_num);
    return gradients;
  }

  // -- LayerNorm and its relatives --

  static RowNorm row_norm_of(int64_t kind) {
    if (kind < 0 || kind > 2) refuse("kind is ", kind, "; it must be 0 (LayerNorm), 1 (RMSNorm) or 2 (CRMSNorm).");
    return RowNorm(kind);
  }
  // Of statistics [2, rows], the second row; RMSNorm has none.
  static char* means_of(void* stats, const Row& in, RowNorm kind) {
    return kind == RowNorm::kRms ? nullptr : static_cast<char*>(stats) + in.shape.rows * Backend::bytes_of(in.acc);
  }

  static Three row_norm_forward(Tensor x, Maybe residual, Maybe weight, Maybe bias, int64_t kind, double eps) {
    const Row in(x);
    RowNormForward a{};
    a.shape = in.shape;
    a.x = data(x);
    a.residual = in.like_x("residual", residual);
    a.weight = in.vector("weight", weight);
    a.bias = in.vector("bias", bias);
    a.kind = row_norm_of(kind);
    a.eps = eps;
    Tensor y = in.new_like_x(), stats = Backend::empty(x, {a.kind == RowNorm::kRms ? 1 : 2, in.shape.rows}, in.acc);
    Tensor s = residual ? in.new_like_x() : Backend::empty(x, {0}, Backend::type(x));
    a.y = data(y);
    a.s = residual ? data(s) : nullptr;
    a.inv_std = data(stats);
    a.mean = means_of(a.inv_std, in, a.kind);
    Backend::run(a, x, a.shape, int64_t(0));
    return {y, s, stats};
  }

  static Three row_norm_backward(Tensor grad_y, Maybe grad_s, Tensor s, Maybe weight, Tensor stats, int64_t kind) {
    const Row in(s, "s");
    RowNormBackward a{};
    a.shape = in.shape;
    a.grad_y = in.like_x("grad_y", grad_y);
    a.grad_s = in.like_x("grad_s", grad_s);
    a.s = data(s);
    a.weight = in.vector("weight", weight);
    a.kind = row_norm_of(kind);
    void* from = in.of_type("stats", stats, in.acc, {a.kind == RowNorm::kRms ? 1 : 2, in.shape.rows});
    a.inv_std = from;
    a.mean = means_of(from, in, a.kind);
    const Three gradients = new_gradients(a, in, in.new_vector(), in.new_vector());
    Backend::run(a, s, a.shape, int64_t(0));
    return gradients;
  }

  // -- Dynamic Tanh and Dynamic erf --

  static Curve curve_of(int64_t curve) {
    if (curve != 0 && curve != 1) refuse("curve is ", curve, "; it must be 0 (tanh) or 1 (erf).");
    return Curve(curve);
  }

  static Tensor dynamic_activation_forward(Tensor x, Tensor alpha, Maybe shift, Tensor weight, Tensor bias,
                                           int64_t curve) {
    const Row in(x);
    Tensor y = in.new_like_x();
    DynamicActivationForward a{};
    a.shape = in.shape;
    a.x = data(x);
    a.alpha = in.scalar("alpha", alpha);
    a.shift = in.scalar("shift", shift);
    a.weight = in.vector("weight", weight);
    a.bias = in.vector("bias", bias);
    a.curve = curve_of(curve);
    a.y = data(y);
    Backend::run(a, x, a.shape, int64_t(0));
    return y;
  }

  static Five dynamic_activation_backward(Tensor grad_y, Tensor x, Tensor alpha, Maybe shift, Tensor weight,
                                          int64_t curve) {
    const Row in(x);
    Tensor grad_alpha = Backend::empty(x, {}, in.acc), grad_shift = Backend::empty(x, {}, in.acc);
    DynamicActivationBackward a{};
    a.shape = in.shape;
    a.grad_y = in.like_x("grad_y", grad_y);
    a.x = data(x);
    a.alpha = in.scalar("alpha", alpha);
    a.shift = in.scalar("shift", shift);
    a.weight = in.vector("weight", weight);
    a.curve = curve_of(curve);
    a.grad_alpha = data(grad_alpha);
    a.grad_shift = data(grad_shift);
    const auto [grad_x, grad_weight, grad_bias] = new_gradients(a, in, in.new_vector(), in.new_vector());
    Backend::run(a, x, a.shape, int64_t(0));
    return {grad_x, grad_alpha, grad_shift, grad_weight, grad_bias};
  }

  // -- Batch normalisation and its kin --

  // Of a variance: divided by n or by n - 1.
  static int64_t correction_of(int64_t correction) {
    if (correction != 0 && correction != 1) refuse("correction is ", correction, "; it must be 0 or 1.");
    return correction;
  }

  // Runs the forward whose state and options are set in `a`.
  static Three normalise_stat_groups(BatchNormForward a, const Grouped& given, const Maybe& weight, const Maybe& bias,
                                     const Maybe& shortcut) {
    if (weight.has_value() != bias.has_value()) refuse("weight and bias come together.");
    const Tensor& x = given.in.x;
    const StatGroups& stat_groups = given.stat_groups;
    Tensor y = weight ? given.in.new_like_x() : Backend::empty(x, {0}, Backend::type(x));
    Tensor stats = Backend::empty(x, {3, stat_groups.groups(), stat_groups.sets(), stat_groups.channels}, given.in.acc);
    Tensor count = Backend::empty(x, {stat_groups.groups(), stat_groups.sets()}, Backend::int64());
    a.stat_groups = stat_groups;
    a.x = data(x);
    if (weight) {
      a.weight = given.broadcast("weight", *weight);
      a.bias = given.broadcast("bias", *bias);
    }
    a.shortcut = given.number("shortcut", shortcut);
    a.y = data(y);
    a.stats = data(stats);
    a.count = integers(count);
    Backend::run(a, x, a.stat_groups);
    return {y, stats, count};
  }

  static Three batch_norm_forward(Tensor x, Maybe mask, Tensor weight, Tensor bias, Maybe shortcut, Tensor running_mean,
                                  Tensor running_var, Tensor num_batches_tracked, int64_t group_size, bool estimated,
                                  std::optional<double> momentum, double eps, double floor) {
    const Grouped in(x, mask, group_size, false);
    if (estimated && in.stat_groups.groups() != 1) refuse("estimated statistics have one group.");
    BatchNormForward a{};
    a.estimated = estimated;
    a.momentum = momentum.value_or(-1.0);
    a.eps = eps;
    a.floor = floor;
    a.running_mean = in.vector("running_mean", running_mean);
    a.running_var = in.vector("running_var", running_var);
    a.num_batches_tracked = in.in.counter("num_batches_tracked", num_batches_tracked);
    return normalise_stat_groups(a, in, weight, bias, shortcut);
  }

  static Three stat_group_norm_forward(Tensor x, Maybe mask, Maybe weight, Maybe bias, Maybe shortcut,
                                       int64_t group_size, int64_t correction, double eps, double eps_total) {
    BatchNormForward a{};
    a.correction = correction_of(correction);
    a.eps = eps;
    a.eps_total = eps_total;
    return normalise_stat_groups(a, Grouped(x, mask, group_size, true), weight, bias, shortcut);
  }

  static Three batch_norm_backward(Tensor grad_y, Maybe grad_mean, Maybe grad_var, Tensor x, Maybe mask, Tensor weight,
                                   Maybe shortcut, Tensor stats, Tensor count, int64_t group_size, bool regions,
                                   int64_t correction, bool estimated, double floor) {
    const Grouped in(x, mask, group_size, regions);
    BatchNormBackward a{};
    a.stat_groups = in.stat_groups;
    a.grad_y = in.in.like_x("grad_y", grad_y);
    a.grad_mean = in.of_stat_groups("grad_mean", grad_mean);
    a.grad_var = in.of_stat_groups("grad_var", grad_var);
    a.x = data(x);
    a.weight = in.broadcast("weight", weight);
    a.shortcut = in.number("shortcut", shortcut);
    a.stats = in.of_stat_groups("stats", stats, 3);
    a.count = static_cast<const int64_t*>(
        in.in.of_type("count", count, Backend::int64(), {in.stat_groups.groups(), in.stat_groups.sets()}));
    a.correction = correction_of(correction);
    a.estimated = estimated;
    a.floor = floor;
    const Three gradients = new_gradients(a, in.in, in.new_per_stat_group(), in.new_per_stat_group());
    Backend::run(a, x, a.stat_groups);
    return gradients;
  }

  static Three moving_average_forward(Tensor x, Maybe pad_mask, Tensor weight, Tensor bias, Tensor running_var,
                                      Tensor buffer_x2, Tensor iters, int64_t warmup_iters, double eps,
                                      double momentum) {
    const Grouped in(x, pad_mask, 0, false, "pad_mask");
    Tensor y = in.in.new_like_x(), stats = Backend::empty(x, {2, in.stat_groups.channels}, in.in.acc);
    Tensor step = in.in.new_integers(1);
    MovingAverageForward a{};
    a.stat_groups = in.stat_groups;
    a.x = data(x);
    a.weight = in.vector("weight", weight);
    a.bias = in.vector("bias", bias);
    a.window = in.in.window("buffer_x2", buffer_x2);
    a.warmup_iters = warmup_iters;
    a.eps = eps;
    a.momentum = momentum;
    a.running_var = in.vector("running_var", running_var);
    a.buffer_x2 = in.stack("buffer_x2", buffer_x2, a.window);
    a.iters = in.in.counter("iters", iters);
    a.y = data(y);
    a.stats = data(stats);
    a.step = integers(step);
    Backend::run(a, x, a.stat_groups);
    return {y, stats, step};
  }

  static Three moving_average_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor step,
                                       Tensor buffer_gz, int64_t warmup_iters) {
    const Grouped in(x, std::nullopt, 0, false);
    MovingAverageBackward a{};
    a.stat_groups = in.stat_groups;
    a.grad_y = in.in.like_x("grad_y", grad_y);
    a.x = data(x);
    a.weight = in.vector("weight", weight);
    a.stats = in.stack("stats", stats, 2);
    a.step = in.in.integers("step", step, 1);
    a.window = in.in.window("buffer_gz", buffer_gz);
    a.warmup_iters = warmup_iters;
    a.buffer_gz = in.stack("buffer_gz", buffer_gz, a.window);
    const Three gradients = new_gradients(a, in.in, in.new_vector(), in.new_vector());
    Backend::run(a, x, a.stat_groups);
    return gradients;
  }
};

// The operations' names, as entry(name, function).
#define NORMFUSE_OPERATIONS(entry)                                   \
  entry("unified_norm_forward", unified_forward);                    \
  entry("unified_norm_backward", unified_backward);                  \
  entry("power_norm_forward", power_forward);                        \
  entry("power_norm_backward", power_backward);                      \
  entry("row_norm_forward", row_norm_forward);                       \
  entry("row_norm_backward", row_norm_backward);                     \
  entry("dynamic_activation_forward", dynamic_activation_forward);   \
  entry("dynamic_activation_backward", dynamic_activation_backward); \
  entry("batch_norm_forward", batch_norm_forward);                   \
  entry("stat_group_norm_forward", stat_group_norm_forward);         \
  entry("batch_norm_backward", batch_norm_backward);                 \
  entry("moving_average_norm_forward", moving_average_forward);      \
  entry("moving_average_norm_backward", moving_average_backward)

}  // namespace normfuse
