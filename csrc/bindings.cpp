// The operations as torch sees them: schemas, checks, allocation, dispatch. The only file that knows torch,
// and only through its stable ABI, so that one library serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace normfuse {
namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

size_t element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// What the checks of one call need to know about x.
struct Input {
  Matrix shape;
  ScalarType acc;
  const Tensor& x;

  explicit Input(const Tensor& x) : x(x) {
    STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(),
                    "normfuse: x must be contiguous of shape [..., channels]. Use x.contiguous().");
    const int64_t channels = x.size(x.dim() - 1);
    STD_TORCH_CHECK(channels > 0, "normfuse: x has no channels (its last size is 0).");
    const ScalarType type = x.scalar_type();
    acc = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    shape = {x.numel() / channels, channels, DType::kFloat32};
    if (type == ScalarType::Double)
      shape.dtype = DType::kFloat64;
    else if (type == ScalarType::BFloat16)
      shape.dtype = DType::kBFloat16;
    else if (type == ScalarType::Half)
      shape.dtype = DType::kFloat16;
    else
      STD_TORCH_CHECK(type == ScalarType::Float, "normfuse: x is ", name_of(type),
                      "; float32, bfloat16, float16 and float64 are supported.");
  }

  void check_type(const char* name, const Tensor& t, ScalarType type) const {
    STD_TORCH_CHECK(t.get_device_index() == x.get_device_index() && t.is_cpu() == x.is_cpu(), "normfuse: ", name,
                    " must be on the device of x.");
    STD_TORCH_CHECK(t.scalar_type() == type, "normfuse: ", name, " is ", name_of(t.scalar_type()), "; with x of ",
                    name_of(x.scalar_type()), " it must be ", name_of(type), ".");
  }
  const Tensor& check(const char* name, const Tensor& t, ScalarType type, int64_t rows, int64_t columns) const {
    check_type(name, t, type);
    const bool vector = rows < 0;
    STD_TORCH_CHECK(t.is_contiguous() && t.dim() == (vector ? 1 : 2) && t.size(t.dim() - 1) == columns &&
                        (vector || t.size(0) == rows),
                    "normfuse: ", name, " must be contiguous of shape [",
                    vector ? std::string() : std::to_string(rows) + ", ", columns, "].");
    return t;
  }
  void* vector(const char* name, const Tensor& t) const {
    return check(name, t, acc, -1, shape.channels).mutable_data_ptr();
  }
  void* scalar(const char* name, const Tensor& t) const {
    check_type(name, t, acc);
    STD_TORCH_CHECK(t.numel() == 1, "normfuse: ", name, " must hold one number, not ", t.numel(), ".");
    return t.mutable_data_ptr();
  }
  void* scalar(const char* name, const std::optional<Tensor>& t) const { return t ? scalar(name, *t) : nullptr; }
  void* stack(const char* name, const Tensor& t, int64_t rows) const {
    return check(name, t, acc, rows, shape.channels).mutable_data_ptr();
  }
  void* like_x(const char* name, const Tensor& t) const {
    check_type(name, t, x.scalar_type());
    bool same = t.is_contiguous() && t.dim() == x.dim();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
    STD_TORCH_CHECK(same, "normfuse: ", name, " must be contiguous and of the shape of x.");
    return t.mutable_data_ptr();
  }
  void* like_x(const char* name, const std::optional<Tensor>& t) const { return t ? like_x(name, *t) : nullptr; }
  void* vector(const char* name, const std::optional<Tensor>& t) const { return t ? vector(name, *t) : nullptr; }
  // A residual, and where its sum with x goes: both or neither.
  void sum(const std::optional<Tensor>& residual, const std::optional<Tensor>& s, const void** from, void** to) const {
    STD_TORCH_CHECK(residual.has_value() == s.has_value(),
                    "normfuse: residual and s, where x + residual is written, come together.");
    *from = like_x("residual", residual);
    *to = like_x("s", s);
  }
  int64_t* integers(const char* name, const Tensor& t, int64_t size) const {
    return static_cast<int64_t*>(check(name, t, ScalarType::Long, -1, size).mutable_data_ptr());
  }
  const bool* mask(const std::optional<Tensor>& t) const {
    if (!t) return nullptr;
    return static_cast<const bool*>(check("pad_mask", *t, ScalarType::Bool, -1, shape.rows).const_data_ptr());
  }
  int64_t window(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) > 0, "normfuse: ", name,
                    " must have shape [window, channels] with window >= 1.");
    return t.size(0);
  }
  int64_t groups(int64_t group_num) const {
    STD_TORCH_CHECK(group_num >= 0 && (group_num == 0 || shape.channels % group_num == 0), "normfuse: group_num is ",
                    group_num, "; it must divide the ", shape.channels,
                    " channels, or be 0 to switch the group scaling off.");
    return group_num;
  }

  Tensor new_like_x() const {
    Tensor result = torch::stable::empty_like(x);
    if (x.is_cpu()) prefer_huge_pages(result.mutable_data_ptr(), x.numel() * element_size(x.scalar_type()));
    return result;
  }
  Tensor vectors(int64_t count) const { return torch::stable::new_empty(x, {count, shape.channels}, acc); }
  Tensor vector() const { return torch::stable::new_empty(x, {shape.channels}, acc); }
};

void parallel(int64_t tasks, int64_t grain, const TaskRange& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

template <class Args>
struct Kernel {
  using Host = void (*)(const Args&, Parallel);
  using Device = int (*)(const Args&, void* workspace, void* stream);
};

#ifdef NORMFUSE_WITH_CUDA
// Only torch's CUDA library has this function; weak, so that the same file also loads in a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

template <class Args>
void run_on_device(typename Kernel<Args>::Device kernel, const Args& args, const Input& in, int64_t group_num) {
  const auto index = in.x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                  "normfuse: this torch gives no CUDA stream.");
  const auto bytes = static_cast<int64_t>(cuda_workspace_bytes(in.shape, group_num));
  const Tensor workspace = torch::stable::new_empty(in.x, {bytes}, ScalarType::Byte);
  const int error = kernel(args, workspace.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == 0, "normfuse: the kernel launch failed with CUDA error ", error, ".");
}
#define NORMFUSE_DEVICE(kernel) &kernel
#else
template <class Args>
void run_on_device(typename Kernel<Args>::Device, const Args&, const Input&, int64_t) {
  STD_TORCH_CHECK(false, "normfuse was built without CUDA; rebuild it where nvcc is installed.");
}
#define NORMFUSE_DEVICE(kernel) nullptr
#endif

template <class Args>
void run(typename Kernel<Args>::Host host, typename Kernel<Args>::Device device, const Args& args, const Input& in,
         int64_t group_num = 0) {
  if (in.x.is_cpu())
    host(args, parallel);
  else
    run_on_device(device, args, in, group_num);
}

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
  a.iters = in.integers("iters", iters, 1);
  a.skip_counter = in.integers("skip_counter", skip_counter, 1);
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
                                                 std::optional<Tensor> residual, std::optional<Tensor> s) {
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
  a.alpha_fwd = alpha_fwd;
  a.running_phi = in.vector("running_phi", running_phi);
  a.iters = in.integers("iters", iters, 1);
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
  const Input in(s);
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
      "Tensor(c!)? s=None) "
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
