// The operations as torch sees them: schemas and arguments of Unified and Power Norm, the row norms and DyT.
#include "bindings.h"

namespace normfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> unified_forward(Tensor x, std::optional<Tensor> pad_mask, Tensor weight, Tensor bias,
                                                   Tensor running_var, Tensor buffer_x2, Tensor iters,
                                                   Tensor skip_counter, int64_t warmup_iters, bool outlier_filtration,
                                                   double eps, double momentum, std::optional<Tensor> residual,
                                                   std::optional<Tensor> s) {
  const Input in(x);
  Tensor y = in.new_like_x(), stats = in.vectors(2), step = torch::stable::new_empty(x, {2}, ScalarType::Long);
  UnifiedForward a{};
  a.shape = in.shape;
  a.x = x.const_data_ptr();
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
  a.y = y.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  a.step = static_cast<int64_t*>(step.mutable_data_ptr());
  in.sum(residual, s, &a.residual, &a.s);
  run(&unified_forward_cpu, NORMFUSE_DEVICE(unified_forward_cuda), a, in);
  return {y, stats, step};
}

std::tuple<Tensor, Tensor, Tensor> unified_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor step,
                                                    Tensor ema_gz, Tensor buffer_gz, int64_t warmup_iters,
                                                    double momentum, std::optional<Tensor> grad_s) {
  const Input in(x);
  Tensor grad_x = in.new_like_x(), grad_weight = in.vector(), grad_bias = in.vector();
  UnifiedBackward a{};
  a.shape = in.shape;
  a.grad_y = in.like_x("grad_y", grad_y);
  a.x = x.const_data_ptr();
  a.weight = in.vector("weight", weight);
  a.stats = in.stack("stats", stats, 2);
  a.step = in.integers("step", step, 2);
  a.window = in.window("buffer_gz", buffer_gz);
  a.warmup_iters = warmup_iters;
  a.momentum = momentum;
  a.ema_gz = in.vector("ema_gz", ema_gz);
  a.buffer_gz = in.stack("buffer_gz", buffer_gz, a.window);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  a.grad_s = in.like_x("grad_s", grad_s);
  run(&unified_backward_cpu, NORMFUSE_DEVICE(unified_backward_cuda), a, in);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> power_forward(Tensor x, std::optional<Tensor> pad_mask, Tensor weight, Tensor bias,
                                                 Tensor running_phi, Tensor iters, int64_t warmup_iters,
                                                 int64_t group_num, double eps, double alpha_fwd,
                                                 std::optional<Tensor> residual, std::optional<Tensor> s,
                                                 double group_eps) {
  const Input in(x);
  Tensor y = in.new_like_x(), stats = in.vectors(3);
  PowerForward a{};
  a.shape = in.shape;
  a.x = x.const_data_ptr();
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
  Tensor row_scale = group_num ? torch::stable::new_empty(x, {in.shape.rows, group_num}, in.acc)
                               : torch::stable::new_empty(x, {0}, in.acc);
  a.y = y.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  a.row_scale = row_scale.mutable_data_ptr();
  in.sum(residual, s, &a.residual, &a.s);
  run(&power_forward_cpu, NORMFUSE_DEVICE(power_forward_cuda), a, in, group_num);
  return {y, stats, row_scale};
}

std::tuple<Tensor, Tensor, Tensor> power_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats,
                                                  Tensor row_scale, Tensor ema_gz, int64_t group_num, double alpha_bkw,
                                                  bool paper, std::optional<Tensor> grad_s) {
  const Input in(x);
  Tensor grad_x = in.new_like_x(), grad_weight = in.vector(), grad_bias = in.vector();
  PowerBackward a{};
  a.shape = in.shape;
  a.grad_y = in.like_x("grad_y", grad_y);
  a.x = x.const_data_ptr();
  a.weight = in.vector("weight", weight);
  a.stats = in.stack("stats", stats, 3);
  a.group_num = in.groups(group_num);
  const int64_t rows = group_num ? in.shape.rows : -1;
  a.row_scale = in.check("row_scale", row_scale, in.acc, rows, group_num).const_data_ptr();
  a.alpha_bkw = alpha_bkw;
  a.paper = paper;
  a.ema_gz = in.vector("ema_gz", ema_gz);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  a.grad_s = in.like_x("grad_s", grad_s);
  run(&power_backward_cpu, NORMFUSE_DEVICE(power_backward_cuda), a, in, group_num);
  return {grad_x, grad_weight, grad_bias};
}

RowNorm row_norm_of(int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "normfuse: kind is ", kind,
                  "; it must be 0 (LayerNorm), 1 (RMSNorm) or 2 (CRMSNorm).");
  return RowNorm(kind);
}

std::tuple<Tensor, Tensor, Tensor> row_norm_forward(Tensor x, std::optional<Tensor> residual,
                                                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                    int64_t kind, double eps) {
  const Input in(x);
  RowNormForward a{};
  a.shape = in.shape;
  a.x = x.const_data_ptr();
  a.residual = in.like_x("residual", residual);
  a.weight = in.vector("weight", weight);
  a.bias = in.vector("bias", bias);
  a.kind = row_norm_of(kind);
  a.eps = eps;
  const bool mean = a.kind != RowNorm::kRms;
  Tensor y = in.new_like_x(), stats = torch::stable::new_empty(x, {mean ? 2 : 1, in.shape.rows}, in.acc);
  Tensor s = residual ? in.new_like_x() : torch::stable::new_empty(x, {0}, x.scalar_type());
  a.y = y.mutable_data_ptr();
  a.s = residual ? s.mutable_data_ptr() : nullptr;
  a.inv_std = stats.mutable_data_ptr();
  a.mean = mean ? static_cast<char*>(stats.mutable_data_ptr()) + in.shape.rows * element_size(in.acc) : nullptr;
  run(&row_norm_forward_cpu, NORMFUSE_DEVICE(row_norm_forward_cuda), a, in);
  return {y, s, stats};
}

std::tuple<Tensor, Tensor, Tensor> row_norm_backward(Tensor grad_y, std::optional<Tensor> grad_s, Tensor s,
                                                     std::optional<Tensor> weight, Tensor stats, int64_t kind) {
  const Input in(s, "s");
  Tensor grad_x = in.new_like_x(), grad_weight = in.vector(), grad_bias = in.vector();
  RowNormBackward a{};
  a.shape = in.shape;
  a.grad_y = in.like_x("grad_y", grad_y);
  a.grad_s = in.like_x("grad_s", grad_s);
  a.s = s.const_data_ptr();
  a.weight = in.vector("weight", weight);
  a.kind = row_norm_of(kind);
  const bool mean = a.kind != RowNorm::kRms;
  a.inv_std = in.check("stats", stats, in.acc, mean ? 2 : 1, in.shape.rows).const_data_ptr();
  a.mean = mean ? static_cast<const char*>(a.inv_std) + in.shape.rows * element_size(in.acc) : nullptr;
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  run(&row_norm_backward_cpu, NORMFUSE_DEVICE(row_norm_backward_cuda), a, in);
  return {grad_x, grad_weight, grad_bias};
}

Curve curve_of(int64_t curve) {
  STD_TORCH_CHECK(curve == 0 || curve == 1, "normfuse: curve is ", curve, "; it must be 0 (tanh) or 1 (erf).");
  return Curve(curve);
}

Tensor dynamic_activation_forward(Tensor x, Tensor alpha, std::optional<Tensor> shift, Tensor weight, Tensor bias,
                                  int64_t curve) {
  const Input in(x);
  Tensor y = in.new_like_x();
  DynamicActivationForward a{};
  a.shape = in.shape;
  a.x = x.const_data_ptr();
  a.alpha = in.scalar("alpha", alpha);
  a.shift = in.scalar("shift", shift);
  a.weight = in.vector("weight", weight);
  a.bias = in.vector("bias", bias);
  a.curve = curve_of(curve);
  a.y = y.mutable_data_ptr();
  run(&dynamic_activation_forward_cpu, NORMFUSE_DEVICE(dynamic_activation_forward_cuda), a, in);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_activation_backward(Tensor grad_y, Tensor x, Tensor alpha,
                                                                               std::optional<Tensor> shift,
                                                                               Tensor weight, int64_t curve) {
  const Input in(x);
  Tensor grad_x = in.new_like_x(), grad_weight = in.vector(), grad_bias = in.vector();
  Tensor grad_alpha = torch::stable::new_empty(x, {}, in.acc), grad_shift = torch::stable::new_empty(x, {}, in.acc);
  DynamicActivationBackward a{};
  a.shape = in.shape;
  a.grad_y = in.like_x("grad_y", grad_y);
  a.x = x.const_data_ptr();
  a.alpha = in.scalar("alpha", alpha);
  a.shift = in.scalar("shift", shift);
  a.weight = in.vector("weight", weight);
  a.curve = curve_of(curve);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_alpha = grad_alpha.mutable_data_ptr();
  a.grad_shift = grad_shift.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  run(&dynamic_activation_backward_cpu, NORMFUSE_DEVICE(dynamic_activation_backward_cuda), a, in);
  return {grad_x, grad_alpha, grad_shift, grad_weight, grad_bias};
}

}  // namespace
}  // namespace normfuse

STABLE_TORCH_LIBRARY_FRAGMENT(normfuse, m) {
  m.def(
      "unified_norm_forward(Tensor x, Tensor? pad_mask, Tensor weight, Tensor bias, Tensor(a!) running_var, "
      "Tensor(b!) buffer_x2, Tensor(c!) iters, Tensor(d!) skip_counter, int warmup_iters, bool "
      "outlier_filtration, "
      "float eps, float momentum, Tensor? residual=None, Tensor(e!)? s=None) -> (Tensor y, Tensor stats, Tensor step)");
  m.def(
      "unified_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor step, Tensor(a!) "
      "ema_gz, "
      "Tensor(b!) buffer_gz, int warmup_iters, float momentum, Tensor? grad_s=None) -> (Tensor grad_x, Tensor "
      "grad_weight, Tensor "
      "grad_bias)");
  m.def(
      "power_norm_forward(Tensor x, Tensor? pad_mask, Tensor weight, Tensor bias, Tensor(a!) running_phi, "
      "Tensor(b!) iters, int warmup_iters, int group_num, float eps, float alpha_fwd, Tensor? residual=None, "
      "Tensor(c!)? s=None, float group_eps=1e-05) "
      "-> (Tensor y, Tensor stats, Tensor row_scale)");
  m.def(
      "power_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor stats, Tensor row_scale, "
      "Tensor(a!) ema_gz, "
      "int group_num, float alpha_bkw, bool paper, Tensor? grad_s=None) -> (Tensor grad_x, Tensor grad_weight, Tensor "
      "grad_bias)");
  m.def(
      "row_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int kind, float eps) "
      "-> (Tensor y, Tensor s, Tensor stats)");
  m.def(
      "row_norm_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor? weight, Tensor stats, int kind) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "dynamic_activation_forward(Tensor x, Tensor alpha, Tensor? shift, Tensor weight, Tensor bias, int curve) "
      "-> Tensor y");
  m.def(
      "dynamic_activation_backward(Tensor grad_y, Tensor x, Tensor alpha, Tensor? shift, Tensor weight, int curve) "
      "-> (Tensor grad_x, Tensor grad_alpha, Tensor grad_shift, Tensor grad_weight, Tensor grad_bias)");
}

#define NORMFUSE_REGISTER(m)                                                              \
  m.impl("unified_norm_forward", TORCH_BOX(&normfuse::unified_forward));                  \
  m.impl("unified_norm_backward", TORCH_BOX(&normfuse::unified_backward));                \
  m.impl("power_norm_forward", TORCH_BOX(&normfuse::power_forward));                      \
  m.impl("power_norm_backward", TORCH_BOX(&normfuse::power_backward));                    \
  m.impl("row_norm_forward", TORCH_BOX(&normfuse::row_norm_forward));                     \
  m.impl("row_norm_backward", TORCH_BOX(&normfuse::row_norm_backward));                   \
  m.impl("dynamic_activation_forward", TORCH_BOX(&normfuse::dynamic_activation_forward)); \
  m.impl("dynamic_activation_backward", TORCH_BOX(&normfuse::dynamic_activation_backward))

STABLE_TORCH_LIBRARY_IMPL(normfuse, CPU, m) { NORMFUSE_REGISTER(m); }
STABLE_TORCH_LIBRARY_IMPL(normfuse, CUDA, m) { NORMFUSE_REGISTER(m); }
