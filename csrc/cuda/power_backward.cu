// Power Norm, backward. xs = s x as in the forward; d = slope dy - pull xs is the gradient of xs.
//   power_gradient          dx = s (d - dot xs); sums of dy and dy xs; per channel dw = sum(dy z), db = sum(dy), ema_gz.
//                           Reads dy and x, writes dx.
// With a residual the gradient of the sum arrives as well, ds, and is added to dx by whichever kernel writes it.
// dot = mean of d xs per row and group, or 0. Slope and pull come from the state before this step, so without group
// scaling one pass is all there is. With it, where a row of a group fits on chip, three kernels stand in:
//   power_prepare_gradient           slope and pull per channel
//   power_grouped_gradient  dot, and what power_gradient does to the matrices. Reads dy and x, writes dx.
//   power_gradient_step     adds the sums; dw, db, ema_gz
// Where it does not fit, or is too narrow for a warp, power_gradient stays, with a pass before it:
//   power_row_dot           dot, a warp per row and group. Reads dy and x.
// Tensors moved: 3; 5 where power_row_dot runs; one more with ds.
#include "teams.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class Acc>
__device__ __forceinline__ Coefficients<Acc> coefficients(const PowerBackward& a, int64_t c) {
  const Acc* stats = static_cast<const Acc*>(a.stats);
  const Acc inv_grad = a.paper ? stats[c] : stats[a.shape.channels + c];
  return power_coefficients(static_cast<const Acc*>(a.weight)[c], static_cast<const Acc*>(a.ema_gz)[c], stats[c],
                            inv_grad, Acc(a.alpha_bkw));
}

// From a channel's sums of dy and dy xs.
template <class Acc>
__device__ __forceinline__ void step_channel(const PowerBackward& a, int64_t c, const Acc (&sum)[2]) {
  const int64_t n = a.shape.channels;
  const Acc *stats = static_cast<const Acc*>(a.stats), *weight = static_cast<const Acc*>(a.weight);
  Acc* ema = static_cast<Acc*>(a.ema_gz);
  const Acc mean_dyx = mean_or(sum[1], a.shape.rows, Acc(0));
  ema[c] = power_moved_ema(weight[c], ema[c], stats[c], mean_dyx, stats[2 * n + c], Acc(a.alpha_bkw));
  static_cast<Acc*>(a.grad_weight)[c] = stats[c] * sum[1];
  static_cast<Acc*>(a.grad_bias)[c] = sum[0];
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kSegmentBlocksPerMultiprocessor)
    power_row_dot(PowerBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const int64_t width = a.shape.channels / a.group_num;
  for_each_segment(a.shape.rows * a.group_num, [&](int64_t segment) {
    const Acc s = static_cast<const Acc*>(a.row_scale)[segment];
    const T *dy = static_cast<const T*>(a.grad_y) + segment * width, *x = static_cast<const T*>(a.x) + segment * width;
    const int64_t first_channel = segment % a.group_num * width;
    Acc sum = 0;
    walk_segment<T, V>({dy, x}, width, [&](int64_t c, const Pack<T, V>(&in)[2]) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const auto k = coefficients<Acc>(a, first_channel + c + i);
        const Acc xs = widen(in[1].v[i]) * s;
        sum += (k.slope * widen(in[0].v[i]) - k.pull * xs) * xs;
      }
    });
    sum = add_lanes(sum);
    if (threadIdx.x == 0) static_cast<Acc*>(workspace.rows)[segment] = sum / Acc(width);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    power_gradient(PowerBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Place<T, V> place(a.shape.rows, n);
  const RowFactor<Acc> scale_of(a.row_scale, a.group_num, n, place.column);
  const RowFactor<Acc> dot_of(workspace.rows, a.group_num, n, place.column, Acc(0));
  Acc slope[V] = {}, pull[V] = {}, sums[2][V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    const auto k = coefficients<Acc>(a, place.column + i);
    slope[i] = k.slope;
    pull[i] = k.pull;
  }
  place.template walk_gradients<false>(
      a.grad_y, a.x, a.grad_s, [&](int64_t row, const Pack<T, V>& dys, const Pack<T, V>& x, const Pack<T, V>* ds) {
        const Acc s = scale_of(row), dot = dot_of(row);
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Acc dy = widen(dys.v[i]), xs = widen(x.v[i]) * s;
          sums[0][i] += dy;
          sums[1][i] += dy * xs;
          const Acc dx = s * (slope[i] * dy - (pull[i] + dot) * xs);
          narrow(ds ? dx + widen(ds->v[i]) : dx, &out.v[i]);
        }
        place.store(static_cast<T*>(a.grad_x), row, out);
      });
  finish_columns(sums, n, static_cast<Acc*>(workspace.partial), workspace.tiles,
                 [&](int64_t c, const Acc(&sum)[2]) { step_channel(a, c, sum); });
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) power_prepare_gradient(PowerBackward a, Workspace workspace) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= a.shape.channels) return;
  const auto k = coefficients<Acc>(a, c);
  static_cast<Acc*>(workspace.vectors)[c] = k.slope;
  static_cast<Acc*>(workspace.vectors)[a.shape.channels + c] = k.pull;
}

template <class T, int V, int kWarps>
__global__ void __launch_bounds__(Team<T, V, kWarps>::kBlockThreads, Team<T, V, kWarps>::resident(kWarpsWithSums))
    power_grouped_gradient(PowerBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  using Rows = Team<T, V, kWarps>;
  const int64_t width = a.shape.channels / a.group_num;
  const Rows team(a.shape.rows, a.shape.channels, width);
  const Acc *slopes = static_cast<const Acc*>(workspace.vectors), *pulls = slopes + a.shape.channels;
  Acc sums[2][Rows::kPacks][V] = {};
  for (int64_t row = team.first; row < team.rows; row += team.stride) {
    typename Rows::Packs dys, xs;
    team.load(a.grad_y, row, dys);
    team.load(a.x, row, xs);
    const Acc s = static_cast<const Acc*>(a.row_scale)[row * a.group_num + blockIdx.x];
    Acc dot[1] = {0};
    team.each([&](int p, int64_t c) {
      const auto slope = load_vector<V>(slopes, c, Acc(0)), pull = load_vector<V>(pulls, c, Acc(0));
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc dy = widen(dys[p].v[i]), x = widen(xs[p].v[i]) * s;
        sums[0][p][i] += dy;
        sums[1][p][i] += dy * x;
        dot[0] += (slope.v[i] * dy - pull.v[i] * x) * x;
      }
    });
    team.add(dot);
    dot[0] /= Acc(width);
    team.each([&](int p, int64_t c) {
      const auto slope = load_vector<V>(slopes, c, Acc(0)), pull = load_vector<V>(pulls, c, Acc(0));
      Pack<T, V> ds, out;
      if (a.grad_s) ds = load_pack<T, V>(static_cast<const T*>(a.grad_s) + row * a.shape.channels + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc x = widen(xs[p].v[i]) * s;
        const Acc dx = s * (slope.v[i] * widen(dys[p].v[i]) - (pull.v[i] + dot[0]) * x);
        narrow(a.grad_s ? dx + widen(ds.v[i]) : dx, &out.v[i]);
      }
      team.store(a.grad_x, row, c, out);
    });
  }
  team.write_partial(sums, static_cast<Acc*>(workspace.partial));
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    power_gradient_step(PowerBackward a, Workspace workspace, int64_t row_blocks) {
  add_partial<2>(static_cast<const Acc*>(workspace.partial), row_blocks, a.shape.channels,
                 [&](int64_t c, const Acc(&sum)[2]) { step_channel(a, c, sum); });
}

template <class T, int V>
int launch(const PowerBackward& a, const Workspace& workspace, void* stream) {
  const ColumnGrid columns(a.shape, V);
  const int64_t rows = a.shape.rows, n = a.shape.channels;
  const bool fused = a.group_num > 0 && with_group_team<T, V>(n / a.group_num, [&](auto warps) {
                       using Rows = Team<T, V, warps>;
                       const dim3 grid = team_grid<Rows>(rows, a.group_num, kWarpsWithSums);
                       NF_LAUNCH((power_prepare_gradient<AccOf<T>>), dim3(unsigned((n + kThreads - 1) / kThreads)),
                                 dim3(kThreads), stream, a, workspace);
                       NF_LAUNCH((power_grouped_gradient<T, V, warps>), grid, team_block<Rows>(), stream, a, workspace);
                       NF_LAUNCH((power_gradient_step<AccOf<T>>), partial_grid(n), columns.block(), stream, a,
                                 workspace, int64_t(grid.y));
                     });
  if (!fused) {
    if (const int error = clear_counters(workspace, a.shape, stream)) return error;
    if (a.group_num > 0 && rows > 0)
      NF_LAUNCH((power_row_dot<T, V>), segment_grid(rows * a.group_num), columns.block(), stream, a, workspace);
    NF_LAUNCH((power_gradient<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const PowerBackward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  const int64_t width = args.shape.channels / (args.group_num > 0 ? args.group_num : 1);
  return cuda::with_packs(args.shape.dtype, width, {args.grad_y, args.x, args.grad_s, args.grad_x},
                          [&](auto t, auto pack) { return cuda::launch<decltype(t), pack>(args, w, stream); });
}

}  // namespace normfuse
