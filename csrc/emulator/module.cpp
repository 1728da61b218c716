// Python's way to the emulated kernels: normfuse_emulator.<operation>(arrays..., options...), with the
// arguments, results and in-place states of the torch operations of the same names. x is a float32, float64
// or float16 array, or a uint16 array that holds bfloat16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../kernels.h"
#include "simt.h"

namespace py = pybind11;
using namespace normfuse;

namespace {

DType dtype_of(const py::array& x) {
  if (x.dtype().kind() == 'u' && x.itemsize() == 2) return DType::kBFloat16;
  if (x.dtype().kind() == 'f' && x.itemsize() == 2) return DType::kFloat16;
  if (x.dtype().kind() == 'f' && x.itemsize() == 4) return DType::kFloat32;
  if (x.dtype().kind() == 'f' && x.itemsize() == 8) return DType::kFloat64;
  throw py::type_error("x must be float32, float64, float16, or uint16 holding bfloat16");
}

struct Input {
  const py::array& x;
  Matrix shape;
  py::dtype acc;

  explicit Input(const py::array& x)
      : x(x), shape{x.shape(0), x.shape(1), dtype_of(x)}, acc(x.itemsize() == 8 ? "float64" : "float32") {}

  // The array's memory, where the kernels also write states.
  void* data(py::array& array, const py::dtype& type, int64_t size) const {
    if (!array.dtype().is(type) || array.size() != size || !(array.flags() & py::array::c_style))
      throw py::value_error("an array has the wrong dtype, size or layout");
    return array.mutable_data();
  }
  void* acc_data(py::array& array, int64_t size) const { return data(array, acc, size); }
  int64_t* integers(py::array& array, int64_t size) const {
    return static_cast<int64_t*>(data(array, py::dtype::of<int64_t>(), size));
  }
  const bool* mask(std::optional<py::array>& array) const {
    return array ? static_cast<const bool*>(data(*array, py::dtype::of<bool>(), shape.rows)) : nullptr;
  }
  // The memory of a matrix like x, of a vector of acc numbers or of one number, that may be absent.
  void* matrix(std::optional<py::array>& array) const { return array ? data(*array, x.dtype(), size()) : nullptr; }
  void* vector(std::optional<py::array>& array) const { return array ? acc_data(*array, shape.channels) : nullptr; }
  void* scalar(std::optional<py::array>& array) const { return array ? acc_data(*array, 1) : nullptr; }
  int64_t size() const { return shape.rows * shape.channels; }
  py::array like_x() const { return py::array(x.dtype(), {shape.rows, shape.channels}); }
  py::array vectors(int64_t count) const { return py::array(acc, {count, shape.channels}); }
};

template <class Args>
void run(int (*kernel)(const Args&, void*, void*), const Args& args, int64_t groups = 0) {
  std::vector<char> workspace(cuda_workspace_bytes(args.shape, groups), char(0xff));
  py::gil_scoped_release nothing_of_python_below;
  if (kernel(args, workspace.data(), nullptr) != cudaSuccess) throw std::runtime_error("the launch failed");
}

py::tuple unified_forward(py::array x, std::optional<py::array> pad_mask, py::array weight, py::array bias,
                          py::array running_var, py::array buffer_x2, py::array iters, py::array skip_counter,
                          int64_t warmup_iters, bool outlier_filtration, double eps, double momentum,
                          std::optional<py::array> residual, std::optional<py::array> s) {
  const Input in(x);
  const int64_t n = in.shape.channels, window = buffer_x2.shape(0);
  py::array y = in.like_x(), stats = in.vectors(2), step(py::dtype::of<int64_t>(), 2);
  const UnifiedForward args{in.shape,
                            x.data(),
                            in.mask(pad_mask),
                            in.acc_data(weight, n),
                            in.acc_data(bias, n),
                            window,
                            warmup_iters,
                            outlier_filtration,
                            eps,
                            momentum,
                            in.acc_data(running_var, n),
                            in.acc_data(buffer_x2, window * n),
                            in.integers(iters, 1),
                            in.integers(skip_counter, 1),
                            y.mutable_data(),
                            stats.mutable_data(),
                            in.integers(step, 2),
                            in.matrix(residual),
                            in.matrix(s)};
  run(unified_forward_cuda, args);
  return py::make_tuple(y, stats, step);
}

py::tuple unified_backward(py::array grad_y, py::array x, py::array weight, py::array stats, py::array step,
                           py::array ema_gz, py::array buffer_gz, int64_t warmup_iters, double momentum,
                           std::optional<py::array> grad_s) {
  const Input in(x);
  const int64_t n = in.shape.channels, window = buffer_gz.shape(0);
  py::array grad_x = in.like_x(), grad_weight(in.acc, n), grad_bias(in.acc, n);
  const UnifiedBackward args{in.shape,
                             in.data(grad_y, x.dtype(), in.size()),
                             x.data(),
                             in.acc_data(weight, n),
                             in.acc_data(stats, 2 * n),
                             in.integers(step, 2),
                             window,
                             warmup_iters,
                             momentum,
                             in.acc_data(ema_gz, n),
                             in.acc_data(buffer_gz, window * n),
                             grad_x.mutable_data(),
                             grad_weight.mutable_data(),
                             grad_bias.mutable_data(),
                             in.matrix(grad_s)};
  run(unified_backward_cuda, args);
  return py::make_tuple(grad_x, grad_weight, grad_bias);
}

py::tuple power_forward(py::array x, std::optional<py::array> pad_mask, py::array weight, py::array bias,
                        py::array running_phi, py::array iters, int64_t warmup_iters, int64_t group_num, double eps,
                        double alpha_fwd, std::optional<py::array> residual, std::optional<py::array> s,
                        double group_eps) {
  const Input in(x);
  const int64_t n = in.shape.channels;
  py::array y = in.like_x(), stats = in.vectors(3), row_scale(in.acc, {in.shape.rows, group_num});
  const PowerForward args{in.shape,
                          x.data(),
                          in.mask(pad_mask),
                          in.acc_data(weight, n),
                          in.acc_data(bias, n),
                          warmup_iters,
                          group_num,
                          eps,
                          group_eps,
                          alpha_fwd,
                          in.acc_data(running_phi, n),
                          in.integers(iters, 1),
                          y.mutable_data(),
                          stats.mutable_data(),
                          row_scale.mutable_data(),
                          in.matrix(residual),
                          in.matrix(s)};
  run(power_forward_cuda, args, group_num);
  return py::make_tuple(y, stats, row_scale);
}

py::tuple power_backward(py::array grad_y, py::array x, py::array weight, py::array stats, py::array row_scale,
                         py::array ema_gz, int64_t group_num, double alpha_bkw, bool paper,
                         std::optional<py::array> grad_s) {
  const Input in(x);
  const int64_t n = in.shape.channels;
  py::array grad_x = in.like_x(), grad_weight(in.acc, n), grad_bias(in.acc, n);
  const PowerBackward args{in.shape,
                           in.data(grad_y, x.dtype(), in.size()),
                           x.data(),
                           in.acc_data(weight, n),
                           in.acc_data(stats, 3 * n),
                           in.acc_data(row_scale, in.shape.rows * group_num),
                           group_num,
                           alpha_bkw,
                           paper,
                           in.acc_data(ema_gz, n),
                           grad_x.mutable_data(),
                           grad_weight.mutable_data(),
                           grad_bias.mutable_data(),
                           in.matrix(grad_s)};
  run(power_backward_cuda, args, group_num);
  return py::make_tuple(grad_x, grad_weight, grad_bias);
}

py::tuple row_norm_forward(py::array x, std::optional<py::array> residual, std::optional<py::array> weight,
                           std::optional<py::array> bias, int64_t kind, double eps) {
  const Input in(x);
  const bool mean = RowNorm(kind) != RowNorm::kRms;
  py::array y = in.like_x(), s = residual ? in.like_x() : py::array(x.dtype(), 0);
  py::array stats(in.acc, {mean ? 2 : 1, int(in.shape.rows)});
  const RowNormForward args{
      in.shape,
      x.data(),
      in.matrix(residual),
      in.vector(weight),
      in.vector(bias),
      RowNorm(kind),
      eps,
      y.mutable_data(),
      residual ? s.mutable_data() : nullptr,
      stats.mutable_data(),
      mean ? static_cast<char*>(stats.mutable_data()) + in.shape.rows * in.acc.itemsize() : nullptr};
  run(row_norm_forward_cuda, args);
  return py::make_tuple(y, s, stats);
}

py::tuple row_norm_backward(py::array grad_y, std::optional<py::array> grad_s, py::array s,
                            std::optional<py::array> weight, py::array stats, int64_t kind) {
  const Input in(s);
  const bool mean = RowNorm(kind) != RowNorm::kRms;
  py::array grad_x = in.like_x(), grad_weight(in.acc, in.shape.channels), grad_bias(in.acc, in.shape.channels);
  const char* inv_std = static_cast<const char*>(in.acc_data(stats, (mean ? 2 : 1) * in.shape.rows));
  const RowNormBackward args{in.shape,
                             in.data(grad_y, s.dtype(), in.size()),
                             in.matrix(grad_s),
                             s.data(),
                             in.vector(weight),
                             inv_std,
                             mean ? inv_std + in.shape.rows * in.acc.itemsize() : nullptr,
                             RowNorm(kind),
                             grad_x.mutable_data(),
                             grad_weight.mutable_data(),
                             grad_bias.mutable_data()};
  run(row_norm_backward_cuda, args);
  return py::make_tuple(grad_x, grad_weight, grad_bias);
}

py::array dynamic_activation_forward(py::array x, py::array alpha, std::optional<py::array> shift, py::array weight,
                                     py::array bias, int64_t curve) {
  const Input in(x);
  py::array y = in.like_x();
  const DynamicActivationForward args{in.shape,
                                      x.data(),
                                      in.acc_data(alpha, 1),
                                      in.scalar(shift),
                                      in.acc_data(weight, in.shape.channels),
                                      in.acc_data(bias, in.shape.channels),
                                      Curve(curve),
                                      y.mutable_data()};
  run(dynamic_activation_forward_cuda, args);
  return y;
}

py::tuple dynamic_activation_backward(py::array grad_y, py::array x, py::array alpha, std::optional<py::array> shift,
                                      py::array weight, int64_t curve) {
  const Input in(x);
  const int64_t n = in.shape.channels;
  const std::vector<py::ssize_t> scalar;
  py::array grad_x = in.like_x(), grad_alpha(in.acc, scalar), grad_shift(in.acc, scalar);
  py::array grad_weight(in.acc, n), grad_bias(in.acc, n);
  const DynamicActivationBackward args{in.shape,
                                       in.data(grad_y, x.dtype(), in.size()),
                                       x.data(),
                                       in.acc_data(alpha, 1),
                                       in.scalar(shift),
                                       in.acc_data(weight, n),
                                       Curve(curve),
                                       grad_x.mutable_data(),
                                       grad_alpha.mutable_data(),
                                       grad_shift.mutable_data(),
                                       grad_weight.mutable_data(),
                                       grad_bias.mutable_data()};
  run(dynamic_activation_backward_cuda, args);
  return py::make_tuple(grad_x, grad_alpha, grad_shift, grad_weight, grad_bias);
}

// x [samples, channels, positions] of batch normalisation and its kin.
struct StatGroupInput {
  Input in;  // that sees [samples, channels]
  StatGroups stat_groups;

  StatGroupInput(const py::array& x, std::optional<py::array>& mask, int64_t group_size, bool regions)
      : in(x), stat_groups{x.shape(0),
                           x.shape(1),
                           x.shape(2),
                           in.shape.dtype,
                           group_size > 0 ? group_size : std::max<int64_t>(x.shape(0), 1),
                           nullptr,
                           regions} {
    if (mask)
      stat_groups.mask =
          static_cast<const bool*>(in.data(*mask, py::dtype::of<bool>(), stat_groups.samples * stat_groups.positions));
  }
  int64_t size() const { return stat_groups.samples * stat_groups.channels * stat_groups.positions; }
  int64_t count() const { return stat_groups.groups() * stat_groups.sets() * stat_groups.channels; }
  py::array like_x() const {
    return py::array(in.x.dtype(), {stat_groups.samples, stat_groups.channels, stat_groups.positions});
  }
  py::array per_stat_group() const {
    return py::array(in.acc, {stat_groups.groups(), stat_groups.sets(), stat_groups.channels});
  }
  PerStatGroup broadcast(py::array& array) const {
    const int64_t n = stat_groups.channels, groups = array.shape(0), sets = array.shape(1);
    return {in.acc_data(array, groups * sets * n), groups == 1 ? 0 : sets * n, sets == 1 ? 0 : n};
  }
  const void* optional(std::optional<py::array>& array, int64_t size) const {
    return array ? in.acc_data(*array, size) : nullptr;
  }
  template <class Args>
  void run(int (*kernel)(const Args&, void*, void*), const Args& args) const {
    std::vector<char> workspace(cuda_workspace_bytes(args.stat_groups), char(0xff));
    py::gil_scoped_release nothing_of_python_below;
    if (kernel(args, workspace.data(), nullptr) != cudaSuccess) throw std::runtime_error("the launch failed");
  }
};

py::tuple normalise_stat_groups(BatchNormForward args, const StatGroupInput& x, std::optional<py::array>& weight,
                                std::optional<py::array>& bias, std::optional<py::array>& shortcut) {
  const StatGroups& stat_groups = x.stat_groups;
  py::array y = weight ? x.like_x() : py::array(x.in.x.dtype(), 0),
            stats(x.in.acc, {int64_t(3), stat_groups.groups(), stat_groups.sets(), stat_groups.channels}),
            count(py::dtype::of<int64_t>(), {stat_groups.groups(), stat_groups.sets()});
  args.stat_groups = stat_groups;
  args.x = x.in.x.data();
  if (weight) {
    args.weight = x.broadcast(*weight);
    args.bias = x.broadcast(*bias);
  }
  args.shortcut = x.optional(shortcut, 1);
  args.y = y.mutable_data();
  args.stats = stats.mutable_data();
  args.count = static_cast<int64_t*>(count.mutable_data());
  x.run(batch_norm_forward_cuda, args);
  return py::make_tuple(y, stats, count);
}

py::tuple batch_norm_forward(py::array x, std::optional<py::array> mask, std::optional<py::array> weight,
                             std::optional<py::array> bias, std::optional<py::array> shortcut, py::array running_mean,
                             py::array running_var, py::array num_batches_tracked, int64_t group_size, bool estimated,
                             std::optional<double> momentum, double eps, double floor) {
  const StatGroupInput in(x, mask, group_size, false);
  BatchNormForward args{};
  args.estimated = estimated;
  args.momentum = momentum.value_or(-1.0);
  args.eps = eps;
  args.floor = floor;
  args.running_mean = in.in.acc_data(running_mean, in.stat_groups.channels);
  args.running_var = in.in.acc_data(running_var, in.stat_groups.channels);
  args.num_batches_tracked = in.in.integers(num_batches_tracked, 1);
  return normalise_stat_groups(args, in, weight, bias, shortcut);
}

py::tuple stat_group_norm_forward(py::array x, std::optional<py::array> mask, std::optional<py::array> weight,
                                  std::optional<py::array> bias, std::optional<py::array> shortcut, int64_t group_size,
                                  int64_t correction, double eps, double eps_total) {
  BatchNormForward args{};
  args.correction = correction;
  args.eps = eps;
  args.eps_total = eps_total;
  return normalise_stat_groups(args, StatGroupInput(x, mask, group_size, true), weight, bias, shortcut);
}

py::tuple batch_norm_backward(py::array grad_y, std::optional<py::array> grad_mean, std::optional<py::array> grad_var,
                              py::array x, std::optional<py::array> mask, py::array weight,
                              std::optional<py::array> shortcut, py::array stats, py::array count, int64_t group_size,
                              bool regions, int64_t correction, bool estimated, double floor) {
  const StatGroupInput in(x, mask, group_size, regions);
  py::array grad_x = in.like_x(), grad_weight = in.per_stat_group(), grad_bias = in.per_stat_group();
  const BatchNormBackward args{in.stat_groups,
                               in.in.data(grad_y, x.dtype(), in.size()),
                               in.optional(grad_mean, in.count()),
                               in.optional(grad_var, in.count()),
                               x.data(),
                               in.broadcast(weight),
                               in.optional(shortcut, 1),
                               in.in.acc_data(stats, 3 * in.count()),
                               in.in.integers(count, in.count() / in.stat_groups.channels),
                               correction,
                               estimated,
                               floor,
                               grad_x.mutable_data(),
                               grad_weight.mutable_data(),
                               grad_bias.mutable_data()};
  in.run(batch_norm_backward_cuda, args);
  return py::make_tuple(grad_x, grad_weight, grad_bias);
}

py::tuple moving_average_forward(py::array x, std::optional<py::array> pad_mask, py::array weight, py::array bias,
                                 py::array running_var, py::array buffer_x2, py::array iters, int64_t warmup_iters,
                                 double eps, double momentum) {
  const StatGroupInput in(x, pad_mask, 0, false);
  const int64_t n = in.stat_groups.channels, window = buffer_x2.shape(0);
  py::array y = in.like_x(), stats = in.in.vectors(2), step(py::dtype::of<int64_t>(), 1);
  const MovingAverageForward args{in.stat_groups,
                                  x.data(),
                                  in.in.acc_data(weight, n),
                                  in.in.acc_data(bias, n),
                                  window,
                                  warmup_iters,
                                  eps,
                                  momentum,
                                  in.in.acc_data(running_var, n),
                                  in.in.acc_data(buffer_x2, window * n),
                                  in.in.integers(iters, 1),
                                  y.mutable_data(),
                                  stats.mutable_data(),
                                  in.in.integers(step, 1)};
  in.run(moving_average_forward_cuda, args);
  return py::make_tuple(y, stats, step);
}

py::tuple moving_average_backward(py::array grad_y, py::array x, py::array weight, py::array stats, py::array step,
                                  py::array buffer_gz, int64_t warmup_iters) {
  std::optional<py::array> no_mask;
  const StatGroupInput in(x, no_mask, 0, false);
  const int64_t n = in.stat_groups.channels, window = buffer_gz.shape(0);
  py::array grad_x = in.like_x(), grad_weight(in.in.acc, n), grad_bias(in.in.acc, n);
  const MovingAverageBackward args{in.stat_groups,
                                   in.in.data(grad_y, x.dtype(), in.size()),
                                   x.data(),
                                   in.in.acc_data(weight, n),
                                   in.in.acc_data(stats, 2 * n),
                                   in.in.integers(step, 1),
                                   window,
                                   warmup_iters,
                                   in.in.acc_data(buffer_gz, window * n),
                                   grad_x.mutable_data(),
                                   grad_weight.mutable_data(),
                                   grad_bias.mutable_data()};
  in.run(moving_average_backward_cuda, args);
  return py::make_tuple(grad_x, grad_weight, grad_bias);
}

void configure(const std::string& order, unsigned seed, unsigned workers, int multiprocessors) {
  simt::Options o;
  if (order == "reverse")
    o.order = simt::Order::kReverse;
  else if (order == "random")
    o.order = simt::Order::kRandom;
  else if (order != "forward")
    throw py::value_error("order must be forward, reverse or random");
  o.seed = seed;
  o.workers = workers;
  o.multiprocessors = multiprocessors;
  simt::options() = o;
}

}  // namespace

PYBIND11_MODULE(normfuse_emulator, m) {
  m.def("unified_norm_forward", &unified_forward);
  m.def("unified_norm_backward", &unified_backward);
  m.def("power_norm_forward", &power_forward);
  m.def("power_norm_backward", &power_backward);
  m.def("row_norm_forward", &row_norm_forward);
  m.def("row_norm_backward", &row_norm_backward);
  m.def("dynamic_activation_forward", &dynamic_activation_forward);
  m.def("dynamic_activation_backward", &dynamic_activation_backward);
  m.def("batch_norm_forward", &batch_norm_forward);
  m.def("stat_group_norm_forward", &stat_group_norm_forward);
  m.def("batch_norm_backward", &batch_norm_backward);
  m.def("moving_average_norm_forward", &moving_average_forward);
  m.def("moving_average_norm_backward", &moving_average_backward);
  m.def("configure", &configure, py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 1u,
        py::arg("workers") = 1u, py::arg("multiprocessors") = 4);
}
