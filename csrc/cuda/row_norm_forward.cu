// LayerNorm, RMSNorm and CRMSNorm, forward; row_math.h has the algebra. s = x + residual, or x.
//   row_norm_rows  a row on chip, held by a warp or a block: s, its sum, its sum of squares around the centre,
//                  y = w (s - centre) inv_std + b. Reads x (and residual), writes y (and s).
//   row_norm_wide  a row that does not fit there: a block walks it three times, from L2 as far as that reaches.
// Tensors moved: 2, with a residual 4; for wide rows two more reads, of which L2 serves most.
#include "teams.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class Acc>
__device__ __forceinline__ void store_statistics(const RowNormForward& a, int64_t row, Acc mean, Acc inv_std) {
  static_cast<Acc*>(a.inv_std)[row] = inv_std;
  if (a.mean) static_cast<Acc*>(a.mean)[row] = mean;
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> normalised(const RowNormForward& a, const Pack<T, V>& s, int64_t c,
                                                 AccOf<T> centre, AccOf<T> inv_std) {
  using Acc = AccOf<T>;
  const auto weight = load_vector<V>(a.weight, c, Acc(1)), bias = load_vector<V>(a.bias, c, Acc(0));
  Pack<T, V> y;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow((widen(s.v[i]) - centre) * inv_std * weight.v[i] + bias.v[i], &y.v[i]);
  return y;
}

template <class T, int V, int kWarps>
__global__ void __launch_bounds__(Team<T, V, kWarps>::kBlockThreads, Team<T, V, kWarps>::resident(kWarpsWithSums))
    row_norm_rows(RowNormForward a) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Team<T, V, kWarps> team(a.shape.rows, n, n);
  for (int64_t row = team.first; row < team.rows; row += team.stride) {
    typename Team<T, V, kWarps>::Packs s;
    team.load(a.x, row, s);
    if (a.residual) {
      typename Team<T, V, kWarps>::Packs residual;
      team.load(a.residual, row, residual);
      team.each([&](int p, int64_t c) {
        s[p] = add_packs(s[p], residual[p]);
        team.store(a.s, row, c, s[p]);
      });
    }
    Acc sum[1] = {0}, squares[1] = {0};
    if (has_mean(a.kind)) {
      team.each([&](int p, int64_t) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[0] += widen(s[p].v[i]);
      });
      team.add(sum);
    }
    const Acc mean = sum[0] / Acc(n), centre = row_centre(a.kind, mean);
    team.each([&](int p, int64_t) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc d = widen(s[p].v[i]) - centre;
        squares[0] += d * d;
      }
    });
    team.add(squares);
    const Acc inv_std = row_inv_std(a.kind, mean, squares[0], n, Acc(a.eps));
    if (team.member == 0) store_statistics(a, row, mean, inv_std);
    team.each([&](int p, int64_t c) { team.store(a.y, row, c, normalised(a, s[p], c, centre, inv_std)); });
  }
}

template <class T, int V>
__global__ void __launch_bounds__(Team<T, V, 16>::kBlockThreads, Team<T, V, 16>::resident(kWarpsWithoutSums))
    row_norm_wide(RowNormForward a) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Team<T, V, 16> team(a.shape.rows, n, n);
  for (int64_t row = team.first; row < team.rows; row += team.stride) {
    const T *x = static_cast<const T*>(a.x) + row * n, *s = a.residual ? static_cast<const T*>(a.s) + row * n : x;
    const auto walk = [&](const auto& use) {
      for (int64_t c = int64_t(team.member) * V; c < n; c += team.kSize * V) use(c);
    };
    Acc sum[1] = {0}, squares[1] = {0};
    walk([&](int64_t c) {
      auto pack = load_pack<T, V>(x + c);
      if (a.residual) {
        pack = add_packs(pack, load_pack<T, V>(static_cast<const T*>(a.residual) + row * n + c));
        keep_pack(static_cast<T*>(a.s) + row * n + c, pack);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) sum[0] += widen(pack.v[i]);
    });
    team.add(sum);
    const Acc mean = has_mean(a.kind) ? sum[0] / Acc(n) : Acc(0), centre = row_centre(a.kind, mean);
    walk([&](int64_t c) {
      const auto pack = load_pack<T, V>(s + c);
#pragma unroll
      for (int i = 0; i < V; ++i) squares[0] += (widen(pack.v[i]) - centre) * (widen(pack.v[i]) - centre);
    });
    team.add(squares);
    const Acc inv_std = row_inv_std(a.kind, mean, squares[0], n, Acc(a.eps));
    if (team.member == 0) store_statistics(a, row, mean, inv_std);
    walk([&](int64_t c) { team.store(a.y, row, c, normalised(a, load_pack<T, V>(s + c), c, centre, inv_std)); });
  }
}

template <class T, int V>
int launch(const RowNormForward& a, void* stream) {
  const int64_t rows = a.shape.rows;
  if (rows == 0) return cudaSuccess;
  const bool on_chip = with_team<T, V>(a.shape.channels, [&](auto warps) {
    using Rows = Team<T, V, warps>;
    NF_LAUNCH((row_norm_rows<T, V, warps>), team_grid<Rows>(rows, 1, kWarpsWithoutSums), team_block<Rows>(), stream, a);
  });
  using Wide = Team<T, V, 16>;
  if (!on_chip)
    NF_LAUNCH((row_norm_wide<T, V>), team_grid<Wide>(rows, 1, kWarpsWithoutSums), team_block<Wide>(), stream, a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const RowNormForward& args, void*, void* stream) {
  return cuda::with_packs(args.shape.dtype, args.shape.channels,
                          {args.x, args.residual, args.weight, args.bias, args.y, args.s},
                          [&](auto t, auto pack) { return cuda::launch<decltype(t), pack>(args, stream); });
}

}  // namespace normfuse
