// Dynamic Tanh and Dynamic erf, backward; curve_math.h has f. With u = alpha x + shift and g = w dy f'(u):
//   dynamic_activation_gradient  dx = alpha g; sums of dy f(u), dy, g x and g, the first two of which are dw and db.
//                                Reads dy and x, writes dx.
//   dynamic_activation_totals    dalpha and dshift: adds the sums of g x and g over the channels; one block.
// Tensors moved: 3.
#include "columns.cuh"
#include "rows.cuh"

namespace normfuse {
namespace cuda {
namespace {

// The standard library's functions in float64 take more registers than two blocks on a multiprocessor leave.
template <class T>
constexpr int kResident = std::is_same_v<T, double> ? 1 : kBlocksPerMultiprocessor;

template <Curve kCurve, class T, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    dynamic_activation_gradient(DynamicActivationBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Place<T, V> place(a.shape.rows, n);
  const Acc alpha = number<Acc>(a.alpha), shift = number<Acc>(a.shift);
  Acc weight[V] = {};
  for (int i = 0; i < V && place.inside; ++i) weight[i] = static_cast<const Acc*>(a.weight)[place.column + i];
  // What is not wanted per channel is added up in a thread's first channel.
  Acc sums[4][V] = {};
  place.walk({static_cast<const T*>(a.grad_y), static_cast<const T*>(a.x)}, [&](int64_t row, const Pack<T, V>(&in)[2]) {
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Acc dy = widen(in[0].v[i]), x = widen(in[1].v[i]);
      const auto f = curve_point<kCurve>(alpha * x + shift);
      const Acc g = weight[i] * dy * f.slope;
      sums[0][i] += dy * f.value;
      sums[1][i] += dy;
      sums[2][0] += g * x;
      sums[3][0] += g;
      narrow(alpha * g, &out.v[i]);
    }
    place.store(static_cast<T*>(a.grad_x), row, out);
  });
  finish_columns(sums, n, static_cast<Acc*>(workspace.partial), workspace.tiles, [&](int64_t c, const Acc(&sum)[4]) {
    static_cast<Acc*>(a.grad_weight)[c] = sum[0];
    static_cast<Acc*>(a.grad_bias)[c] = sum[1];
    static_cast<Acc*>(workspace.vectors)[c] = sum[2];
    static_cast<Acc*>(workspace.vectors)[n + c] = sum[3];
  });
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 1)
    dynamic_activation_totals(DynamicActivationBackward a, Workspace workspace) {
  NF_SHARED(double, shared, kThreads);
  const int64_t n = a.shape.channels;
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  for (int s = 0; s < 2; ++s) {
    const Acc* vector = static_cast<const Acc*>(workspace.vectors) + s * n;
    double added[1] = {0};
    for (int64_t c = thread; c < n; c += kThreads) added[0] += double(vector[c]);
    const double total = add_lanes(add_thread_rows(added, shared));  // over the first warp; the others hold zeros
    if (thread == 0) *static_cast<Acc*>(s == 0 ? a.grad_alpha : a.grad_shift) = Acc(total);
  }
}

template <Curve kCurve, class T, int V>
int launch(const DynamicActivationBackward& a, const Workspace& workspace, void* stream) {
  const ColumnGrid columns(a.shape, V);
  if (const int error = clear_counters(workspace, a.shape, stream)) return error;
  NF_LAUNCH((dynamic_activation_gradient<kCurve, T, V>), columns.grid(), columns.block(), stream, a, workspace);
  NF_LAUNCH((dynamic_activation_totals<AccOf<T>>), dim3(1), ColumnGrid::block(), stream, a, workspace);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const DynamicActivationBackward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  return with_curve(args.curve, [&](auto curve) {
    return cuda::with_packs(args.shape.dtype, args.shape.channels, {args.grad_y, args.x, args.grad_x},
                            [&](auto t, auto pack) { return cuda::launch<curve, decltype(t), pack>(args, w, stream); });
  });
}

}  // namespace normfuse
