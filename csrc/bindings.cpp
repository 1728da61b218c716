// The operations as torch sees them: schemas, tensors, dispatch. Knows torch only through its stable ABI, so that one library
// serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "operations.h"

namespace normfuse {
namespace {

using torch::headeronly::ScalarType;

void parallel(int64_t tasks, int64_t grain, const TaskRange& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

#ifdef NORMFUSE_WITH_CUDA
// Only torch's CUDA library has this function; weak, so that the same file also loads in a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

struct Torch {
  using Tensor = torch::stable::Tensor;
  using Type = ScalarType;

  static constexpr Type int64() { return ScalarType::Long; }
  static constexpr Type boolean() { return ScalarType::Bool; }
  static Type type(const Tensor& t) { return t.scalar_type(); }
  static int64_t dim(const Tensor& t) { return t.dim(); }
  static int64_t size(const Tensor& t, int64_t axis) { return t.size(axis); }
  static int64_t numel(const Tensor& t) { return t.numel(); }
  static bool contiguous(const Tensor& t) { return t.is_contiguous(); }
  static void* data(const Tensor& t) { return t.mutable_data_ptr(); }

  static const char* name_of(Type type) {
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
  static int64_t bytes_of(Type type) {
    switch (type) {
      case ScalarType::Double:
      case ScalarType::Long:
        return 8;
      case ScalarType::Float:
        return 4;
      case ScalarType::Bool:
        return 1;
      default:
        return 2;
    }
  }
  static std::optional<DType> dtype_of(Type type) {
    switch (type) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Double:
        return DType::kFloat64;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        return std::nullopt;
    }
  }
  static Type acc_of(Type type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  static bool same_device(const Tensor& t, const Tensor& x) {
    return t.get_device_index() == x.get_device_index() && t.is_cpu() == x.is_cpu();
  }
  static bool readable(const Tensor& t) { return t.is_cpu(); }
  // A storage can be freed behind its tensors.
  static void check_memory(const char* name, const Tensor& t) {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    const int64_t held = bytes / bytes_of(t.scalar_type()) - t.storage_offset();
    if (t.numel() != 0 && t.numel() > held)
      refuse(name, " has ", t.numel(), " elements, but its storage holds ", bytes,
             " bytes, as where fully sharded training has freed a parameter. Gather it first.");
  }
  static Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, Type type) {
    return torch::stable::new_empty(like, sizes, type);
  }
  static Tensor empty_like(const Tensor& x) {
    Tensor result = torch::stable::empty_like(x);
    if (x.is_cpu()) prefer_huge_pages(result.mutable_data_ptr(), x.numel() * bytes_of(x.scalar_type()));
    return result;
  }

  // `shape` is what cuda_workspace_bytes asks for.
  template <class Args, class... Shape>
  static void run(const Args& args, const Tensor& x, const Shape&... shape) {
    if (x.is_cpu()) return run_cpu(args, parallel);
#ifdef NORMFUSE_WITH_CUDA
    const auto index = x.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(index, &stream) != 0)
      refuse("this torch gives no CUDA stream.");
    const auto bytes = static_cast<int64_t>(cuda_workspace_bytes(shape...));
    const Tensor workspace = empty(x, {bytes}, ScalarType::Byte);
    const int error = run_cuda(args, workspace.mutable_data_ptr(), stream);
    if (error != 0) refuse("the kernel launch failed with CUDA error ", error, ".");
#else
    refuse("it was built without CUDA; rebuild it where nvcc is installed.");
#endif
  }
};

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
      "Tensor(b!) iters, int warmup_iters, int group_num, float eps, float group_eps, float alpha_fwd, Tensor? "
      "residual=None, Tensor(c!)? s=None) "
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

#define NORMFUSE_ENTRY(name, function) m.impl(name, TORCH_BOX(&normfuse::Operations<normfuse::Torch>::function))
STABLE_TORCH_LIBRARY_IMPL(normfuse, CPU, m) { NORMFUSE_OPERATIONS(NORMFUSE_ENTRY); }
STABLE_TORCH_LIBRARY_IMPL(normfuse, CUDA, m) { NORMFUSE_OPERATIONS(NORMFUSE_ENTRY); }
