// What the operations ask of the tensors that they are given, and where their results come from: the same for torch and for
// the NumPy arrays of the emulator. `Backend` says what a tensor is:
//
//   Tensor, Type            a tensor, and the type of its numbers
//   int64(), boolean()      Types
//   type, dim, size, numel, contiguous, data     of a Tensor
//   name_of, bytes_of       a Type's name, and the bytes of a number
//   dtype_of, acc_of        the DType of x (nothing: not supported), and the Type of statistics beside it
//   same_device             of two tensors
//   readable                whether a tensor's memory can be read here and now
//   check_memory            raises unless the memory is there that a contiguous tensor describes
//   empty, empty_like       new tensors on the device of another
//   run                     calls the kernel that takes these arguments
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "kernels.h"

namespace normfuse {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "normfuse: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The largest number of channels: products of it with small numbers stay in range, whatever else is empty.
constexpr int64_t kMostChannels = int64_t(1) << 40;

// Checks every other tensor of a call against x, [..., channels].
template <class Backend>
struct Input {
  using Tensor = typename Backend::Tensor;
  using Type = typename Backend::Type;
  using Maybe = std::optional<Tensor>;

  const Tensor& x;
  Matrix shape;
  Type acc;

  explicit Input(const Tensor& x, const char* name = "x") : x(x), shape(), acc(Backend::acc_of(Backend::type(x))) {
    if (Backend::dim(x) == 0 || !Backend::contiguous(x))
      refuse(name, " must be contiguous of shape [..., channels]. Use ", name, ".contiguous().");
    const int64_t channels = Backend::size(x, Backend::dim(x) - 1);
    if (channels <= 0) refuse(name, " has no channels (its last size is 0).");
    if (channels > kMostChannels)
      refuse(name, " has ", channels, " channels; at most ", kMostChannels, " are possible.");
    const std::optional<DType> dtype = Backend::dtype_of(Backend::type(x));
    if (!dtype)
      refuse(name, " is ", Backend::name_of(Backend::type(x)),
             "; float32, bfloat16, float16 and float64 are supported.");
    shape = {Backend::numel(x) / channels, channels, *dtype};
    Backend::check_memory(name, x);
  }

  void* like_x(const char* name, const Tensor& t) const {
    check_type(name, t, Backend::type(x));
    bool same = Backend::contiguous(t) && Backend::dim(t) == Backend::dim(x);
    for (int64_t i = 0; same && i < Backend::dim(x); ++i) same = Backend::size(t, i) == Backend::size(x, i);
    if (!same) refuse(name, " must be contiguous and of the shape of x.");
    return memory(name, t);
  }
  void* vector(const char* name, const Tensor& t) const { return of_type(name, t, acc, {shape.channels}); }
  void* stack(const char* name, const Tensor& t, int64_t rows) const {
    return of_type(name, t, acc, {rows, shape.channels});
  }
  void* scalar(const char* name, const Tensor& t) const { return one(name, t, acc); }
  void* like_x(const char* name, const Maybe& t) const { return t ? like_x(name, *t) : nullptr; }
  void* vector(const char* name, const Maybe& t) const { return t ? vector(name, *t) : nullptr; }
  void* scalar(const char* name, const Maybe& t) const { return t ? scalar(name, *t) : nullptr; }
  int64_t* integers(const char* name, const Tensor& t, int64_t size) const {
    return static_cast<int64_t*>(of_type(name, t, Backend::int64(), {size}));
  }
  const bool* mask(const char* name, const Maybe& t, std::initializer_list<int64_t> sizes) const {
    return t ? static_cast<const bool*>(of_type(name, *t, Backend::boolean(), sizes)) : nullptr;
  }
  const bool* mask(const Maybe& t) const { return mask("pad_mask", t, {shape.rows}); }
  // A number that counts steps. One that cannot be read is not: that would wait for it, and kernels take any number.
  int64_t* counter(const char* name, const Tensor& t) const {
    auto* value = static_cast<int64_t*>(one(name, t, Backend::int64()));
    if (Backend::readable(t) && *value < 0) refuse(name, " is ", *value, "; it counts steps and must be at least 0.");
    return value;
  }
  // A residual, and where its sum with x goes: both or neither.
  void sum(const Maybe& residual, const Maybe& s, const void** from, void** to) const {
    if (residual.has_value() != s.has_value()) refuse("residual and s, where x + residual is written, come together.");
    *from = like_x("residual", residual);
    *to = like_x("s", s);
  }
  int64_t window(const char* name, const Tensor& t) const {
    if (Backend::dim(t) != 2 || Backend::size(t, 0) <= 0)
      refuse(name, " must have shape [window, channels] with window >= 1.");
    return Backend::size(t, 0);
  }
  int64_t groups(int64_t group_num) const {
    if (group_num < 0 || (group_num != 0 && shape.channels % group_num != 0))
      refuse("group_num is ", group_num, "; it must divide the ", shape.channels,
             " channels, or be 0 to switch the group scaling off.");
    return group_num;
  }
  // The memory of a contiguous tensor of these sizes.
  void* of_type(const char* name, const Tensor& t, Type type, std::initializer_list<int64_t> sizes) const {
    check_type(name, t, type);
    bool same = Backend::contiguous(t) && Backend::dim(t) == int64_t(sizes.size());
    int64_t axis = 0;
    for (const int64_t size : sizes) same = same && Backend::size(t, axis++) == size;
    if (!same) {
      std::ostringstream wanted;
      for (const int64_t size : sizes) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
      refuse(name, " must be contiguous of shape [", wanted.str(), "].");
    }
    return memory(name, t);
  }
  void check_type(const char* name, const Tensor& t, Type type) const {
    if (!Backend::same_device(t, x)) refuse(name, " must be on the device of x.");
    if (!(Backend::type(t) == type))
      refuse(name, " is ", Backend::name_of(Backend::type(t)), "; with x of ", Backend::name_of(Backend::type(x)),
             " it must be ", Backend::name_of(type), ".");
  }
  static void* memory(const char* name, const Tensor& t) {
    Backend::check_memory(name, t);
    return Backend::data(t);
  }

  // New tensors.
  Tensor new_like_x() const { return Backend::empty_like(x); }
  Tensor new_vector() const { return Backend::empty(x, {shape.channels}, acc); }
  Tensor new_stack(int64_t rows) const { return Backend::empty(x, {rows, shape.channels}, acc); }
  Tensor new_integers(int64_t size) const { return Backend::empty(x, {size}, Backend::int64()); }

 private:
  void* one(const char* name, const Tensor& t, Type type) const {
    check_type(name, t, type);
    if (Backend::numel(t) != 1) refuse(name, " must hold one number, not ", Backend::numel(t), ".");
    return memory(name, t);
  }
};

// The same for x [samples, channels, positions] of batch normalisation and its kin.
template <class Backend>
struct StatGroupInput {
  using Tensor = typename Backend::Tensor;
  using Maybe = std::optional<Tensor>;

  Input<Backend> in;  // that sees [samples * channels, positions]
  StatGroups stat_groups;

  StatGroupInput(const Tensor& x, const Maybe& mask, int64_t group_size, bool regions, const char* mask_name = "mask")
      : in(x), stat_groups() {
    if (Backend::dim(x) != 3) refuse("x must have shape [samples, channels, positions].");
    const int64_t samples = Backend::size(x, 0), channels = Backend::size(x, 1), positions = Backend::size(x, 2),
                  all = std::max<int64_t>(samples, 1);
    if (channels <= 0 || channels > kMostChannels)
      refuse("x has ", channels, " channels; it must have from 1 to ", kMostChannels, ".");
    if (group_size < 0) refuse("group_size is ", group_size, "; it must be at least 1, or 0 for one group.");
    stat_groups = {samples,
                   channels,
                   positions,
                   in.shape.dtype,
                   group_size > 0 ? std::min(group_size, all) : all,
                   in.mask(mask_name, mask, {samples, positions}),
                   regions};
  }

  int64_t size() const { return stat_groups.groups() * stat_groups.sets() * stat_groups.channels; }
  void* vector(const char* name, const Tensor& t) const { return in.of_type(name, t, in.acc, {stat_groups.channels}); }
  void* stack(const char* name, const Tensor& t, int64_t rows) const {
    return in.of_type(name, t, in.acc, {rows, stat_groups.channels});
  }
  const void* number(const char* name, const Maybe& t) const { return t ? in.of_type(name, *t, in.acc, {1}) : nullptr; }
  // Contiguous [groups or 1, sets or 1, channels].
  PerStatGroup broadcast(const char* name, const Tensor& t) const {
    in.check_type(name, t, in.acc);
    const auto fits = [&](int64_t dim, int64_t size) {
      return Backend::size(t, dim) == size || Backend::size(t, dim) == 1;
    };
    if (!Backend::contiguous(t) || Backend::dim(t) != 3 || !fits(0, stat_groups.groups()) ||
        !fits(1, stat_groups.sets()) || Backend::size(t, 2) != stat_groups.channels)
      refuse(name, " must be contiguous of shape [", stat_groups.groups(), " or 1, ", stat_groups.sets(), " or 1, ",
             stat_groups.channels, "].");
    const int64_t n = stat_groups.channels, sets = Backend::size(t, 1);
    return {in.memory(name, t), Backend::size(t, 0) == 1 ? 0 : sets * n, sets == 1 ? 0 : n};
  }
  // As many acc numbers as there are statistics groups, times `times`.
  const void* of_stat_groups(const char* name, const Tensor& t, int64_t times = 1) const {
    in.check_type(name, t, in.acc);
    if (!Backend::contiguous(t) || Backend::numel(t) != times * size())
      refuse(name, " must be contiguous with ", times * size(), " numbers.");
    return in.memory(name, t);
  }
  const void* of_stat_groups(const char* name, const Maybe& t) const { return t ? of_stat_groups(name, *t) : nullptr; }

  Tensor new_vector() const { return Backend::empty(in.x, {stat_groups.channels}, in.acc); }
  Tensor new_per_stat_group() const {
    return Backend::empty(in.x, {stat_groups.groups(), stat_groups.sets(), stat_groups.channels}, in.acc);
  }
};

}  // namespace normfuse
