// Every kernel under the emulator against the host kernels, on few small shapes: what the sanitizer builds
// run. The thorough comparison is in tests/kernels.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../host_types.h"
#include "../../kernels.h"
#include "../simt.h"
#include "check.h"

namespace {

using namespace normfuse;

void serial(int64_t tasks, int64_t, const TaskRange& body) { body(0, tasks); }

DType dtype_of(float) { return DType::kFloat32; }
DType dtype_of(double) { return DType::kFloat64; }
DType dtype_of(bfloat16) { return DType::kBFloat16; }
DType dtype_of(float16) { return DType::kFloat16; }

void set(float v, float* to) { *to = v; }
void set(float v, double* to) { *to = v; }
void set(float v, bfloat16* to) { *to = to_bfloat16(v); }
void set(float v, float16* to) { *to = to_float16(v); }
double get(double v) { return v; }
double get(bfloat16 v) { return to_float(v); }
double get(float16 v) { return to_float(v); }

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
std::vector<T> random(int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(0.25f, 2.f);
  std::vector<T> values(count);
  for (T& v : values) set(uniform(engine), &v);
  return values;
}

template <class T>
void check_close(const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i) CHECK(std::abs(get(a[i]) - get(b[i])) <= tolerance * (1 + std::abs(get(b[i]))));
}

// One training step of both norms on state and results of their own.
template <class T>
struct Step {
  Matrix shape;
  bool residual;  // dy and x, which are as good as any, stand for the residual and the gradient of s
  std::vector<T> x, dy, y, dx, s;
  std::vector<Acc<T>> weight, bias, running, ema, window_x2, window_gz, stats, row_scale, dw, db;
  std::vector<int64_t> iters{7}, skips{0}, step{0, 0};
  std::vector<char> mask;

  Step(int64_t rows, int64_t n, int64_t groups, bool residual = false)
      : shape{rows, n, dtype_of(T{})},
        residual(residual),
        x(random<T>(rows * n, 1)),
        dy(random<T>(rows * n, 2)),
        y(rows * n),
        dx(rows * n),
        s(x),
        weight(random<Acc<T>>(n, 3)),
        bias(random<Acc<T>>(n, 4)),
        running(random<Acc<T>>(n, 5)),
        ema(random<Acc<T>>(n, 6)),
        window_x2(random<Acc<T>>(3 * n, 7)),
        window_gz(random<Acc<T>>(3 * n, 8)),
        stats(3 * n),
        row_scale(rows * groups),
        dw(n),
        db(n),
        mask(rows) {
    for (int64_t r = 0; r < rows; r += 3) mask[r] = 1;
  }

  const bool* pad_mask() const { return reinterpret_cast<const bool*>(mask.data()); }

  UnifiedForward unified_forward(bool filter) {
    return {shape,
            x.data(),
            pad_mask(),
            weight.data(),
            bias.data(),
            3,
            2,
            filter,
            1e-5,
            0.9,
            running.data(),
            window_x2.data(),
            iters.data(),
            skips.data(),
            y.data(),
            stats.data(),
            step.data(),
            residual ? dy.data() : nullptr,
            residual ? s.data() : nullptr};
  }
  UnifiedBackward unified_backward() {
    return {shape,
            dy.data(),
            s.data(),
            weight.data(),
            stats.data(),
            step.data(),
            3,
            2,
            0.9,
            ema.data(),
            window_gz.data(),
            dx.data(),
            dw.data(),
            db.data(),
            residual ? x.data() : nullptr};
  }
  PowerForward power_forward(int64_t groups, int64_t warmup) {
    return {shape,
            x.data(),
            pad_mask(),
            weight.data(),
            bias.data(),
            warmup,
            groups,
            1e-5,
            1e-3,
            0.9,
            running.data(),
            iters.data(),
            y.data(),
            stats.data(),
            row_scale.data(),
            residual ? dy.data() : nullptr,
            residual ? s.data() : nullptr};
  }
  PowerBackward power_backward(int64_t groups, bool paper) {
    return {shape, dy.data(), s.data(),   weight.data(), stats.data(), row_scale.data(), groups,
            0.9,   paper,     ema.data(), dx.data(),     dw.data(),    db.data(),        residual ? x.data() : nullptr};
  }
};

template <class T>
void check_same(const Step<T>& a, const Step<T>& b) {
  const double tolerance = sizeof(T) == 2 ? 0.01 : 1e-4;  // a bfloat16 has 8 bits
  check_close(a.y, b.y, tolerance);
  check_close(a.dx, b.dx, tolerance);
  check_close(a.s, b.s, tolerance);
  for (const auto field : {&Step<T>::running, &Step<T>::ema, &Step<T>::window_x2, &Step<T>::window_gz, &Step<T>::stats,
                           &Step<T>::row_scale, &Step<T>::dw, &Step<T>::db})
    check_close(a.*field, b.*field, 1e-4);
  CHECK(a.iters == b.iters && a.skips == b.skips && a.step == b.step);
}

template <class T>
void check_unified(int64_t rows, int64_t n, bool filter, bool residual = false) {
  Step<T> device(rows, n, 0, residual), host(rows, n, 0, residual);
  std::vector<char> workspace(cuda_workspace_bytes(device.shape, 0), char(0xff));
  run_cuda(device.unified_forward(filter), workspace.data(), nullptr);
  run_cuda(device.unified_backward(), workspace.data(), nullptr);
  run_cpu(host.unified_forward(filter), serial);
  run_cpu(host.unified_backward(), serial);
  check_same(device, host);
}

template <class T>
void check_power(int64_t rows, int64_t n, int64_t groups, int64_t warmup, bool residual = false) {
  Step<T> device(rows, n, groups, residual), host(rows, n, groups, residual);
  std::vector<char> workspace(cuda_workspace_bytes(device.shape, groups), char(0xff));
  run_cuda(device.power_forward(groups, warmup), workspace.data(), nullptr);
  run_cuda(device.power_backward(groups, warmup == 0), workspace.data(), nullptr);
  run_cpu(host.power_forward(groups, warmup), serial);
  run_cpu(host.power_backward(groups, warmup == 0), serial);
  check_same(device, host);
}

template <class T>
void check_row_norm(int64_t rows, int64_t n, RowNorm kind, bool residual) {
  Step<T> device(rows, n, 0, residual), host(rows, n, 0, residual);
  std::vector<char> workspace(cuda_workspace_bytes(device.shape, 0), char(0xff));
  const auto train = [&](Step<T>& step, const auto& run) {
    std::vector<T>& s = step.s;
    std::vector<Acc<T>> inv_std(rows), mean(rows);
    void* mean_or_null = kind == RowNorm::kRms ? nullptr : mean.data();
    run(RowNormForward{step.shape, step.x.data(), residual ? step.dy.data() : nullptr, step.weight.data(),
                       step.bias.data(), kind, 1e-5, step.y.data(), residual ? s.data() : nullptr, inv_std.data(),
                       mean_or_null});
    run(RowNormBackward{step.shape, step.dy.data(), residual ? step.x.data() : nullptr, s.data(), step.weight.data(),
                        inv_std.data(), mean_or_null, kind, step.dx.data(), step.dw.data(), step.db.data()});
  };
  train(device, [&](const auto& a) { CHECK(run_cuda(a, workspace.data(), nullptr) == cudaSuccess); });
  train(host, [](const auto& a) { run_cpu(a, serial); });
  check_same(device, host);
}

template <class T>
void check_dynamic_activation(int64_t rows, int64_t n, Curve curve, bool shifted) {
  Step<T> device(rows, n, 0), host(rows, n, 0);
  std::vector<char> workspace(cuda_workspace_bytes(device.shape, 0), char(0xff));
  const auto train = [&](Step<T>& step, const auto& run) {
    const Acc<T>*alpha = step.running.data(), *shift = shifted ? alpha + 1 : nullptr;
    run(DynamicActivationForward{step.shape, step.x.data(), alpha, shift, step.weight.data(), step.bias.data(), curve,
                                 step.y.data()});
    run(DynamicActivationBackward{step.shape, step.dy.data(), step.x.data(), alpha, shift, step.weight.data(), curve,
                                  step.dx.data(), step.stats.data(), step.stats.data() + 1, step.dw.data(),
                                  step.db.data()});
  };
  train(device, [&](const auto& a) { CHECK(run_cuda(a, workspace.data(), nullptr) == cudaSuccess); });
  train(host, [](const auto& a) { run_cpu(a, serial); });
  check_same(device, host);
}

// Batch normalisation in two groups of samples, or of two regions, and the moving average on the same numbers.
template <class T>
void check_stat_groups(int64_t samples, int64_t n, int64_t positions, bool masked, bool regions) {
  const int64_t rows = samples * positions;
  Step<T> device(rows, n, 0), host(rows, n, 0);
  const auto train = [&](Step<T>& step, const auto& run) {
    const StatGroups stat_groups{
        samples, n, positions, step.shape.dtype, samples / 2, masked ? step.pad_mask() : nullptr, regions};
    StatGroups whole = stat_groups;
    whole.group_size = samples;
    whole.regions = false;
    run(MovingAverageForward{whole, step.x.data(), step.weight.data(), step.bias.data(), 3, 2, 1e-3, 0.9,
                             step.running.data(), step.window_x2.data(), step.iters.data(), step.y.data(),
                             step.stats.data(), step.step.data()});
    whole.mask = nullptr;
    run(MovingAverageBackward{whole, step.dy.data(), step.x.data(), step.weight.data(), step.stats.data(),
                              step.step.data(), 3, 2, step.window_gz.data(), step.dx.data(), step.dw.data(),
                              step.db.data()});
    step.s = step.dx;  // compared too

    const int64_t size = stat_groups.groups() * stat_groups.sets() * n;
    std::vector<Acc<T>> stats(3 * size), grads(2 * size);
    std::vector<int64_t> count(stat_groups.groups() * stat_groups.sets());
    BatchNormForward a{};
    a.stat_groups = stat_groups;
    a.x = step.x.data();
    a.weight = {step.weight.data(), 0, 0};
    a.bias = {step.bias.data(), 0, 0};
    a.momentum = -1;
    a.eps = 1e-3;
    if (!regions) {
      a.running_mean = step.ema.data();
      a.running_var = step.running.data();
      a.num_batches_tracked = step.iters.data();
    }
    a.y = step.y.data();
    a.stats = stats.data();
    a.count = count.data();
    run(a);
    BatchNormBackward b{};
    b.stat_groups = stat_groups;
    b.grad_y = step.dy.data();
    b.x = step.x.data();
    b.weight = a.weight;
    b.stats = stats.data();
    b.count = count.data();
    b.grad_x = step.dx.data();
    b.grad_weight = grads.data();
    b.grad_bias = grads.data() + size;
    run(b);
    std::copy_n(grads.begin(), n, step.dw.begin());
    std::copy_n(grads.begin() + size, n, step.db.begin());
  };
  train(device, [](const auto& a) {
    std::vector<char> workspace(cuda_workspace_bytes(a.stat_groups), char(0xff));
    CHECK(run_cuda(a, workspace.data(), nullptr) == cudaSuccess);
  });
  train(host, [](const auto& a) { run_cpu(a, serial); });
  check_same(device, host);
}

template <class T>
void check_type() {
  check_stat_groups<T>(40, 7, 1, true, false);  // rows: the scalar path and packs
  check_stat_groups<T>(40, 48, 1, true, true);
  check_stat_groups<T>(4, 9, 7, false, false);  // planes: the same
  check_stat_groups<T>(4, 9, 64, true, true);
  for (const int64_t n : {7, 48}) {  // the scalar path, and packs with a part of the tile empty
    check_unified<T>(37, n, false);
    check_unified<T>(37, n, true, true);
    check_power<T>(37, n, 0, 0);
    check_power<T>(37, n, 1, 0, true);
    check_power<T>(37, n, n == 7 ? 7 : 3, 100, n == 7);
    check_row_norm<T>(37, n, RowNorm::kLayer, n == 7);
    check_row_norm<T>(37, n, RowNorm::kRms, n == 48);
    check_dynamic_activation<T>(37, n, Curve::kTanh, n == 48);
    check_dynamic_activation<T>(37, n, Curve::kErf, true);
  }
  if constexpr (std::is_same_v<T, float>) {
    check_row_norm<T>(3, 520, RowNorm::kCentredRms, true);  // a block of 4 warps a row
    check_row_norm<T>(2, 2056, RowNorm::kLayer, true);      // of 16 warps
    check_row_norm<T>(2, 8200, RowNorm::kLayer, true);      // and a row that is not kept
    check_stat_groups<T>(2, 2, 2049, true, false);          // a block a plane
  }
}

}  // namespace

int main() {
  simt::options().workers = 2;
  check_type<float>();
  simt::options().order = simt::Order::kRandom;
  check_type<bfloat16>();
  check_type<float16>();
  check_type<double>();
}
