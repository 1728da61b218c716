// Power Norm, forward. xs = s x, with s = 1/sqrt(mean of the group's x^2 + group_eps) per row and group, or 1. With a
// residual, x + residual stands for x in what follows; whichever kernel reads it first writes it too.
//   power_sums          sums of xs^2 over all and over the valid rows, the step on each channel; after warm-up also
//                       y = w xs / sqrt(phi) + b. Reads x; after warm-up writes y: one pass is all there is.
//   power_apply         in warm-up y = w xs / sqrt(q + eps) + b. Reads x backwards, from L2 first, and writes y.
// With group scaling, where a row of a group fits on chip, three kernels stand in for power_sums:
//   power_prepare       w / sqrt(phi) per channel
//   power_grouped_sums  s, and what power_sums does to the matrix. Reads x; after warm-up writes y.
//   power_step          adds the sums, the step on each channel
// Where it does not fit, or is too narrow for a warp, power_sums stays, with a pass before it:
//   power_row_scale     s, a warp per row and group. Reads x.
// Tensors moved: 2 after warm-up, 3 in warm-up; one more where power_row_scale runs; two more with a residual.
// Whether it is warm-up is decided on the device. The counter moves in power_apply, when nobody reads it any more.
#include "teams.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kSegmentBlocksPerMultiprocessor) power_row_scale(PowerForward a) {
  using Acc = AccOf<T>;
  const int64_t width = a.shape.channels / a.group_num;
  for_each_segment(a.shape.rows * a.group_num, [&](int64_t segment) {
    const T* x = static_cast<const T*>(a.x) + segment * width;
    Acc sum = 0;
    const auto add = [&](const Pack<T, V>& x) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += widen(x.v[i]) * widen(x.v[i]);
    };
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + segment * width;
      walk_segment<T, V>({x, residual}, width, [&](int64_t c, const Pack<T, V>(&in)[2]) {
        const auto s = add_packs(in[0], in[1]);
        keep_pack(static_cast<T*>(a.s) + segment * width + c, s);
        add(s);
      });
    } else {
      walk_segment<T, V>({x}, width, [&](int64_t, const Pack<T, V>(&in)[1]) { add(in[0]); });
    }
    sum = add_lanes(sum);
    if (threadIdx.x == 0) static_cast<Acc*>(a.row_scale)[segment] = inverse_sqrt(sum / Acc(width) + Acc(a.group_eps));
  });
}

// y = scale s x + shift on one pack
template <class T, int V>
__device__ __forceinline__ Pack<T, V> affine(const Pack<T, V>& x, AccOf<T> s, const AccOf<T> (&scale)[V],
                                             const AccOf<T> (&shift)[V]) {
  Pack<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(widen(x.v[i]) * s * scale[i] + shift[i], &out.v[i]);
  return out;
}

// The step t of a channel, from its sums over all and over the valid rows.
template <class Acc>
__device__ __forceinline__ void step_channel(const PowerForward& a, unsigned long long valid_rows, int64_t t, int64_t c,
                                             const Acc (&sum)[2]) {
  const int64_t n = a.shape.channels;
  Acc *phi = static_cast<Acc*>(a.running_phi), *stats = static_cast<Acc*>(a.stats);
  const int64_t count = a.pad_mask ? int64_t(valid_rows) : a.shape.rows;
  const Acc q = mean_or(sum[1], count, phi[c]);
  const Acc inv_batch = inverse_sqrt(q + Acc(a.eps));
  stats[c] = power_uses_batch(t, a.warmup_iters) ? inv_batch : inverse_sqrt(phi[c] + Acc(a.eps));
  stats[n + c] = inv_batch;
  stats[2 * n + c] = count > 0 ? sum[0] / Acc(a.shape.rows) : Acc(NAN);
  if (count > 0) phi[c] = power_moved_phi(t, a.warmup_iters, q, phi[c], Acc(a.alpha_fwd));
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) power_sums(PowerForward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Place<T, V> place(a.shape.rows, n);
  const RowFactor<Acc> factor(a.row_scale, a.group_num, n, place.column);
  Acc* phi = static_cast<Acc*>(a.running_phi);
  const int64_t t = next_step(*a.iters);
  const bool warm = !power_uses_batch(t, a.warmup_iters);
  if (place.column == 0 && place.first == 0) *workspace.flag = !warm;

  Acc scale[V] = {}, shift[V] = {}, sums[2][V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    scale[i] = static_cast<const Acc*>(a.weight)[place.column + i] * inverse_sqrt(phi[place.column + i] + Acc(a.eps));
    shift[i] = static_cast<const Acc*>(a.bias)[place.column + i];
  }
  unsigned valid = 0;
  const auto add = [&](int64_t row, const Pack<T, V>& x) {
    const Acc s = factor(row), counts = a.pad_mask && a.pad_mask[row] ? Acc(0) : Acc(1);
    valid += counts != 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Acc xs = widen(x.v[i]) * s;
      sums[0][i] += xs * xs;
      if (counts != 0) sums[1][i] += xs * xs;
    }
    if (warm) place.store(static_cast<T*>(a.y), row, affine(x, s, scale, shift));
  };
  place.walk_sum(a.x, a.residual, a.s, add);
  TileCounters* tile = workspace.tiles + blockIdx.x;
  if (a.pad_mask && threadIdx.x == 0) atomicAdd(&tile->valid_rows, static_cast<unsigned long long>(valid));

  finish_columns(sums, n, static_cast<Acc*>(workspace.partial), workspace.tiles,
                 [&](int64_t c, const Acc(&sum)[2]) { step_channel(a, tile->valid_rows, t, c, sum); });
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) power_prepare(PowerForward a, Workspace workspace) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread == 0) {
    *workspace.flag = power_uses_batch(next_step(*a.iters), a.warmup_iters);
    workspace.tiles[0].valid_rows = 0;
  }
  if (thread >= a.shape.channels) return;
  const Acc weight = static_cast<const Acc*>(a.weight)[thread], phi = static_cast<const Acc*>(a.running_phi)[thread];
  static_cast<Acc*>(workspace.vectors)[thread] = weight * inverse_sqrt(phi + Acc(a.eps));
}

template <class T, int V, int kWarps>
__global__ void __launch_bounds__(Team<T, V, kWarps>::kBlockThreads, Team<T, V, kWarps>::resident(kWarpsWithSums))
    power_grouped_sums(PowerForward a, Workspace workspace) {
  using Acc = AccOf<T>;
  using Rows = Team<T, V, kWarps>;
  const int64_t width = a.shape.channels / a.group_num;
  const Rows team(a.shape.rows, a.shape.channels, width);
  const bool warm = !*workspace.flag;
  Acc sums[2][Rows::kPacks][V] = {};
  unsigned valid = 0;
  for (int64_t row = team.first; row < team.rows; row += team.stride) {
    typename Rows::Packs x;
    team.load(a.x, row, x);
    if (a.residual) {
      typename Rows::Packs residual;
      team.load(a.residual, row, residual);
      team.each([&](int p, int64_t c) {
        x[p] = add_packs(x[p], residual[p]);
        keep_pack(static_cast<T*>(a.s) + row * a.shape.channels + c, x[p]);
      });
    }
    Acc squares[1] = {0};
    team.each([&](int p, int64_t) {
#pragma unroll
      for (int i = 0; i < V; ++i) squares[0] += widen(x[p].v[i]) * widen(x[p].v[i]);
    });
    team.add(squares);
    const Acc s = inverse_sqrt(squares[0] / Acc(width) + Acc(a.group_eps));
    if (team.member == 0) static_cast<Acc*>(a.row_scale)[row * a.group_num + blockIdx.x] = s;
    const bool counts = !(a.pad_mask && a.pad_mask[row]);
    valid += counts;
    team.each([&](int p, int64_t c) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc xs = widen(x[p].v[i]) * s;
        sums[0][p][i] += xs * xs;
        if (counts) sums[1][p][i] += xs * xs;
      }
      if (!warm) return;
      const auto scale = load_vector<V>(workspace.vectors, c, Acc(1)), shift = load_vector<V>(a.bias, c, Acc(0));
      team.store(a.y, row, c, affine(x[p], s, scale.v, shift.v));
    });
  }
  if (a.pad_mask && team.member == 0 && blockIdx.x == 0)
    atomicAdd(&workspace.tiles[0].valid_rows, static_cast<unsigned long long>(valid));
  team.write_partial(sums, static_cast<Acc*>(workspace.partial));
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    power_step(PowerForward a, Workspace workspace, int64_t row_blocks) {
  add_partial<2>(static_cast<const Acc*>(workspace.partial), row_blocks, a.shape.channels,
                 [&](int64_t c, const Acc(&sum)[2]) {
                   step_channel(a, workspace.tiles[0].valid_rows, next_step(*a.iters), c, sum);
                 });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) power_apply(PowerForward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const Place<T, V> place(a.shape.rows, a.shape.channels);
  if (place.column == 0 && place.first == 0 && (a.pad_mask ? workspace.tiles[0].valid_rows > 0 : a.shape.rows > 0))
    *a.iters = next_step(*a.iters);
  if (!*workspace.flag) return;
  const RowFactor<Acc> factor(a.row_scale, a.group_num, a.shape.channels, place.column);
  Acc scale[V] = {}, shift[V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    scale[i] = static_cast<const Acc*>(a.weight)[place.column + i] * static_cast<const Acc*>(a.stats)[place.column + i];
    shift[i] = static_cast<const Acc*>(a.bias)[place.column + i];
  }
  place.walk_back({static_cast<const T*>(a.x)}, [&](int64_t row, const Pack<T, V>(&in)[1]) {
    place.store(static_cast<T*>(a.y), row, affine(in[0], factor(row), scale, shift));
  });
}

template <class T, int V>
int launch(const PowerForward& a, const Workspace& workspace, void* stream) {
  const ColumnGrid columns(a.shape, V);
  const int64_t rows = a.shape.rows, n = a.shape.channels;
  const bool fused =
      a.group_num > 0 && with_group_team<T, V>(n / a.group_num, [&](auto warps) {
        using Rows = Team<T, V, warps>;
        const dim3 grid = team_grid<Rows>(rows, a.group_num, kWarpsWithSums);
        NF_LAUNCH((power_prepare<AccOf<T>>), dim3(unsigned((n + kThreads - 1) / kThreads)), dim3(kThreads), stream, a,
                  workspace);
        NF_LAUNCH((power_grouped_sums<T, V, warps>), grid, team_block<Rows>(), stream, a, workspace);
        NF_LAUNCH((power_step<AccOf<T>>), partial_grid(n), columns.block(), stream, a, workspace, int64_t(grid.y));
      });
  if (!fused) {
    if (const int error = clear_counters(workspace, a.shape, stream)) return error;
    if (a.group_num > 0 && rows > 0)
      NF_LAUNCH((power_row_scale<T, V>), segment_grid(rows * a.group_num), columns.block(), stream, a);
    const PowerForward sums = a.group_num > 0 ? with_sum(a) : a;
    NF_LAUNCH((power_sums<T, V>), columns.grid(), columns.block(), stream, sums, workspace);
  }
  NF_LAUNCH((power_apply<T, V>), columns.grid(), columns.block(), stream, with_sum(a), workspace);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const PowerForward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  const int64_t width = args.shape.channels / (args.group_num > 0 ? args.group_num : 1);
  return cuda::with_packs(args.shape.dtype, width, {args.x, args.residual, args.bias, args.y, args.s},
                          [&](auto t, auto pack) { return cuda::launch<decltype(t), pack>(args, w, stream); });
}

}  // namespace normfuse
