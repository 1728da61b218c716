// What the files that register operations share: checks, allocation, dispatch. They are the only ones that know torch, and
// only through its stable ABI, so that one library serves every torch from TORCH_TARGET_VERSION on.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

namespace normfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
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

inline int64_t element_size(ScalarType type) {
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

// The largest number of channels: products of it with small numbers stay in range, whatever else is empty.
constexpr int64_t kMostChannels = int64_t(1) << 40;

// Raises unless the memory is there that the contiguous t describes: a storage can be freed behind its tensors.
inline void check_memory(const char* name, const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t held = bytes / element_size(t.scalar_type()) - t.storage_offset();
  STD_TORCH_CHECK(t.numel() == 0 || t.numel() <= held, "normfuse: ", name, " has ", t.numel(),
                  " elements, but its storage holds ", bytes,
                  " bytes, as where fully sharded training has freed a parameter. Gather it first.");
}

// What the checks of one call need to know about x.
struct Input {
  Matrix shape;
  ScalarType acc;
  const Tensor& x;

  explicit Input(const Tensor& x, const char* name = "x") : x(x) {
    STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), "normfuse: ", name,
                    " must be contiguous of shape [..., channels]. Use ", name, ".contiguous().");
    const int64_t channels = x.size(x.dim() - 1);
    STD_TORCH_CHECK(channels > 0, "normfuse: ", name, " has no channels (its last size is 0).");
    STD_TORCH_CHECK(channels <= kMostChannels, "normfuse: ", name, " has ", channels, " channels; at most ",
                    kMostChannels, " are possible.");
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
      STD_TORCH_CHECK(type == ScalarType::Float, "normfuse: ", name, " is ", name_of(type),
                      "; float32, bfloat16, float16 and float64 are supported.");
    check_memory(name, x);
  }

  void check_type(const char* name, const Tensor& t, ScalarType type) const {
    STD_TORCH_CHECK(t.get_device_index() == x.get_device_index() && t.is_cpu() == x.is_cpu(), "normfuse: ", name,
                    " must be on the device of x.");
    STD_TORCH_CHECK(t.scalar_type() == type, "normfuse: ", name, " is ", name_of(t.scalar_type()), "; with x of ",
                    name_of(x.scalar_type()), " it must be ", name_of(type), ".");
  }
  // A number that counts steps. One on the device is not read: that would wait for it, and kernels take any number.
  int64_t* counter(const char* name, const Tensor& t) const {
    check_type(name, t, ScalarType::Long);
    STD_TORCH_CHECK(t.numel() == 1, "normfuse: ", name, " must hold one number, not ", t.numel(), ".");
    check_memory(name, t);
    auto* value = static_cast<int64_t*>(t.mutable_data_ptr());
    if (t.is_cpu())
      STD_TORCH_CHECK(*value >= 0, "normfuse: ", name, " is ", *value, "; it counts steps and must be at least 0.");
    return value;
  }
  const Tensor& check(const char* name, const Tensor& t, ScalarType type, int64_t rows, int64_t columns) const {
    check_type(name, t, type);
    const bool vector = rows < 0;
    STD_TORCH_CHECK(t.is_contiguous() && t.dim() == (vector ? 1 : 2) && t.size(t.dim() - 1) == columns &&
                        (vector || t.size(0) == rows),
                    "normfuse: ", name, " must be contiguous of shape [",
                    vector ? std::string() : std::to_string(rows) + ", ", columns, "].");
    check_memory(name, t);
    return t;
  }
  void* vector(const char* name, const Tensor& t) const {
    return check(name, t, acc, -1, shape.channels).mutable_data_ptr();
  }
  void* scalar(const char* name, const Tensor& t) const {
    check_type(name, t, acc);
    STD_TORCH_CHECK(t.numel() == 1, "normfuse: ", name, " must hold one number, not ", t.numel(), ".");
    check_memory(name, t);
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
    check_memory(name, t);
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

inline void parallel(int64_t tasks, int64_t grain, const TaskRange& body) {
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

template <class Args, class... Shape>
void run_on_device(typename Kernel<Args>::Device kernel, const Args& args, const Tensor& x, const Shape&... shape) {
  const auto index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                  "normfuse: this torch gives no CUDA stream.");
  const auto bytes = static_cast<int64_t>(cuda_workspace_bytes(shape...));
  const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  const int error = kernel(args, workspace.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == 0, "normfuse: the kernel launch failed with CUDA error ", error, ".");
}
#define NORMFUSE_DEVICE(kernel) &kernel
#else
template <class Args, class... Shape>
void run_on_device(typename Kernel<Args>::Device, const Args&, const Tensor&, const Shape&...) {
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
    run_on_device(device, args, in.x, in.shape, group_num);
}

}  // namespace normfuse
