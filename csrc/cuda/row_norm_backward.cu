// LayerNorm, RMSNorm and CRMSNorm, backward; row_math.h has the algebra. ds is the gradient of s, where s is a
// result of its own.
//   row_norm_gradient       a row on chip, held by a warp or a block: sums of g and g z over the row,
//                           dx = inv_std (g - offset - slope z) + ds; sums of dy z and dy over the columns.
//                           Reads dy, s (and ds), writes dx.
//   row_norm_columns        dw, db: adds what the blocks of row_norm_gradient left.
//   row_norm_wide_gradient  dx of a row that does not fit on chip: a block walks it twice.
//   row_norm_wide_columns   dw, db of wide rows. Reads dy and s.
// Tensors moved: 3, with ds 4; for wide rows four more reads, of which L2 serves two.
#include "teams.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class Acc>
struct RowStatistics {
  Acc mean, inv_std, centre;

  __device__ RowStatistics(const RowNormBackward& a, int64_t row)
      : mean(a.mean ? static_cast<const Acc*>(a.mean)[row] : Acc(0)),
        inv_std(static_cast<const Acc*>(a.inv_std)[row]),
        centre(row_centre(a.kind, mean)) {}

  template <class T>
  __device__ __forceinline__ Acc normalised(T s) const {
    return (widen(s) - centre) * inv_std;
  }
};

// sums += g, g z
template <class T, int V>
__device__ __forceinline__ void add_row_sums(const RowStatistics<AccOf<T>>& row, const Pack<T, V>& dy,
                                             const Pack<T, V>& s, const Pack<AccOf<T>, V>& weight,
                                             AccOf<T> (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const AccOf<T> g = weight.v[i] * widen(dy.v[i]);
    sums[0] += g;
    sums[1] += g * row.normalised(s.v[i]);
  }
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> gradient(const RowNormBackward& a, const RowStatistics<AccOf<T>>& row,
                                               RowGradient<AccOf<T>> k, const Pack<T, V>& dy, const Pack<T, V>& s,
                                               int64_t at, int64_t c) {
  using Acc = AccOf<T>;
  const auto weight = load_vector<V>(a.weight, c, Acc(1));
  Acc dx[V];
#pragma unroll
  for (int i = 0; i < V; ++i)
    dx[i] = row.inv_std * (weight.v[i] * widen(dy.v[i]) - k.offset - k.slope * row.normalised(s.v[i]));
  if (a.grad_s) {
    const auto ds = load_pack<T, V>(static_cast<const T*>(a.grad_s) + at + c);
#pragma unroll
    for (int i = 0; i < V; ++i) dx[i] += widen(ds.v[i]);
  }
  Pack<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(dx[i], &out.v[i]);
  return out;
}

template <class T, int V, int kWarps>
__global__ void __launch_bounds__(Team<T, V, kWarps>::kBlockThreads, Team<T, V, kWarps>::resident(kWarpsWithSums))
    row_norm_gradient(RowNormBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  using Rows = Team<T, V, kWarps>;
  const int64_t n = a.shape.channels;
  const Rows team(a.shape.rows, n, n);
  Acc sums[2][Rows::kPacks][V] = {};
  for (int64_t row = team.first; row < team.rows; row += team.stride) {
    typename Rows::Packs dy, s;
    team.load(a.grad_y, row, dy);
    team.load(a.s, row, s);
    const RowStatistics<Acc> statistics(a, row);
    Acc row_sums[2] = {0, 0};
    team.each([&](int p, int64_t c) {
      add_row_sums(statistics, dy[p], s[p], load_vector<V>(a.weight, c, Acc(1)), row_sums);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[0][p][i] += widen(dy[p].v[i]) * statistics.normalised(s[p].v[i]);
        sums[1][p][i] += widen(dy[p].v[i]);
      }
    });
    team.add(row_sums);
    const auto k = row_gradient(a.kind, statistics.mean, statistics.inv_std, row_sums[0], row_sums[1], n);
    team.each(
        [&](int p, int64_t c) { team.store(a.grad_x, row, c, gradient(a, statistics, k, dy[p], s[p], row * n, c)); });
  }
  team.write_partial(sums, static_cast<Acc*>(workspace.partial));
}

template <class Acc>
__device__ __forceinline__ void finish_channel(const RowNormBackward& a, int64_t c, const Acc (&sums)[2]) {
  static_cast<Acc*>(a.grad_weight)[c] = sums[0];
  static_cast<Acc*>(a.grad_bias)[c] = sums[1];
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    row_norm_columns(RowNormBackward a, Workspace workspace, int64_t row_blocks) {
  add_partial<2>(static_cast<const Acc*>(workspace.partial), row_blocks, a.shape.channels,
                 [&](int64_t c, const Acc(&sums)[2]) { finish_channel(a, c, sums); });
}

template <class T, int V>
__global__ void __launch_bounds__(Team<T, V, 16>::kBlockThreads, Team<T, V, 16>::resident(kWarpsWithoutSums))
    row_norm_wide_gradient(RowNormBackward a) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Team<T, V, 16> team(a.shape.rows, n, n);
  for (int64_t row = team.first; row < team.rows; row += team.stride) {
    const T *dy = static_cast<const T*>(a.grad_y) + row * n, *s = static_cast<const T*>(a.s) + row * n;
    const auto walk = [&](const auto& use) {
      for (int64_t c = int64_t(team.member) * V; c < n; c += team.kSize * V)
        use(c, load_pack<T, V>(dy + c), load_pack<T, V>(s + c));
    };
    const RowStatistics<Acc> statistics(a, row);
    Acc row_sums[2] = {0, 0};
    walk([&](int64_t c, const Pack<T, V>& dy, const Pack<T, V>& s) {
      add_row_sums(statistics, dy, s, load_vector<V>(a.weight, c, Acc(1)), row_sums);
    });
    team.add(row_sums);
    const auto k = row_gradient(a.kind, statistics.mean, statistics.inv_std, row_sums[0], row_sums[1], n);
    walk([&](int64_t c, const Pack<T, V>& dy, const Pack<T, V>& s) {
      team.store(a.grad_x, row, c, gradient(a, statistics, k, dy, s, row * n, c));
    });
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    row_norm_wide_columns(RowNormBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const Place<T, V> place(a.shape.rows, a.shape.channels);
  Acc sums[2][V] = {};
  place.walk({static_cast<const T*>(a.grad_y), static_cast<const T*>(a.s)}, [&](int64_t r, const Pack<T, V>(&in)[2]) {
    const RowStatistics<Acc> row(a, r);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0][i] += widen(in[0].v[i]) * row.normalised(in[1].v[i]);
      sums[1][i] += widen(in[0].v[i]);
    }
  });
  finish_columns(sums, a.shape.channels, static_cast<Acc*>(workspace.partial), workspace.tiles,
                 [&](int64_t c, const Acc(&sum)[2]) { finish_channel(a, c, sum); });
}

template <class T, int V>
int launch(const RowNormBackward& a, const Workspace& workspace, void* stream) {
  const int64_t rows = a.shape.rows, n = a.shape.channels;
  const bool on_chip = with_team<T, V>(n, [&](auto warps) {
    using Rows = Team<T, V, warps>;
    const dim3 grid = team_grid<Rows>(rows, 1, kWarpsWithSums);
    NF_LAUNCH((row_norm_gradient<T, V, warps>), grid, team_block<Rows>(), stream, a, workspace);
    NF_LAUNCH((row_norm_columns<AccOf<T>>), partial_grid(n), ColumnGrid::block(), stream, a, workspace,
              int64_t(grid.y));
  });
  if (!on_chip) {
    using Wide = Team<T, V, 16>;
    const ColumnGrid columns(a.shape, V);
    if (const int error = clear_counters(workspace, a.shape, stream)) return error;
    NF_LAUNCH((row_norm_wide_gradient<T, V>), team_grid<Wide>(rows, 1, kWarpsWithoutSums), team_block<Wide>(), stream,
              a);
    NF_LAUNCH((row_norm_wide_columns<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const RowNormBackward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  return cuda::with_packs(args.shape.dtype, args.shape.channels,
                          {args.grad_y, args.grad_s, args.s, args.weight, args.grad_x},
                          [&](auto t, auto pack) { return cuda::launch<decltype(t), pack>(args, w, stream); });
}

}  // namespace normfuse
