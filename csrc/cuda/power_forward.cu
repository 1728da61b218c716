// Power Norm, forward. xs = s x, with s = 1/sqrt(mean of the group's x^2 + eps) per row and group, or 1.
//   power_row_scale  s, a warp per row and group; only with group scaling. Reads x.
//   power_sums       sums of xs^2 over all and over the valid rows, the step on each channel; after warm-up also
//                    y = w xs / sqrt(phi) + b. Reads x; after warm-up writes y: one pass is all there is.
//   power_apply      in warm-up y = w xs / sqrt(q + eps) + b. Reads x backwards, from L2 first, and writes y.
// Tensors moved: 2 after warm-up, 3 in warm-up; one more with group scaling.
// Whether it is warm-up is decided on the device. The counter moves in power_apply, when nobody reads it any more.
#include "columns.cuh"
#include "rows.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kThreads) power_row_scale(PowerForward a) {
  using Acc = AccOf<T>;
  const int64_t width = a.shape.channels / a.group_num;
  for_each_segment(a.shape.rows * a.group_num, [&](int64_t segment) {
    const T* x = static_cast<const T*>(a.x) + segment * width;
    Acc sum = 0;
    walk_segment<T, V>({x}, width, [&](int64_t, const Pack<T, V>(&in)[1]) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += widen(in[0].v[i]) * widen(in[0].v[i]);
    });
    sum = add_lanes(sum);
    if (threadIdx.x == 0) static_cast<Acc*>(a.row_scale)[segment] = inverse_sqrt(sum / Acc(width) + Acc(a.eps));
  });
}

// y = scale s x + shift on one pack
template <class T, int V>
__device__ __forceinline__ void write_pack(const Place<T, V>& place, void* y, int64_t row, const Pack<T, V>& x,
                                           AccOf<T> s, const AccOf<T> (&scale)[V], const AccOf<T> (&shift)[V]) {
  Pack<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(widen(x.v[i]) * s * scale[i] + shift[i], &out.v[i]);
  place.store(static_cast<T*>(y), row, out);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) power_sums(PowerForward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Place<T, V> place(a.shape.rows, n);
  const RowFactor<Acc> factor(a.row_scale, a.group_num, n, place.column);
  Acc* phi = static_cast<Acc*>(a.running_phi);
  const int64_t t = *a.iters + 1;
  const bool warm = !power_uses_batch(t, a.warmup_iters);
  if (place.column == 0 && place.first == 0) *workspace.flag = !warm;

  Acc scale[V] = {}, shift[V] = {}, sums[2][V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    scale[i] = static_cast<const Acc*>(a.weight)[place.column + i] * inverse_sqrt(phi[place.column + i] + Acc(a.eps));
    shift[i] = static_cast<const Acc*>(a.bias)[place.column + i];
  }
  unsigned valid = 0;
  place.walk({static_cast<const T*>(a.x)}, [&](int64_t row, const Pack<T, V>(&in)[1]) {
    const Acc s = factor(row), counts = a.pad_mask && a.pad_mask[row] ? Acc(0) : Acc(1);
    valid += counts != 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Acc xs = widen(in[0].v[i]) * s;
      sums[0][i] += xs * xs;
      if (counts != 0) sums[1][i] += xs * xs;
    }
    if (warm) write_pack(place, a.y, row, in[0], s, scale, shift);
  });
  TileCounters* tile = workspace.tiles + blockIdx.x;
  if (a.pad_mask && threadIdx.x == 0) atomicAdd(&tile->valid_rows, static_cast<unsigned long long>(valid));

  finish_columns(sums, n, static_cast<Acc*>(workspace.partial), workspace.tiles, [&](int64_t c, const Acc(&sum)[2]) {
    Acc* stats = static_cast<Acc*>(a.stats);
    const Acc q = mean_or(sum[1], a.pad_mask ? int64_t(tile->valid_rows) : a.shape.rows, phi[c]);
    const Acc inv_batch = inverse_sqrt(q + Acc(a.eps));
    stats[c] = warm ? inverse_sqrt(phi[c] + Acc(a.eps)) : inv_batch;
    stats[n + c] = inv_batch;
    stats[2 * n + c] = mean_or(sum[0], a.shape.rows, Acc(0));
    phi[c] = power_moved_phi(t, a.warmup_iters, q, phi[c], Acc(a.alpha_fwd));
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) power_apply(PowerForward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const Place<T, V> place(a.shape.rows, a.shape.channels);
  if (place.column == 0 && place.first == 0) *a.iters += 1;
  if (!*workspace.flag) return;
  const RowFactor<Acc> factor(a.row_scale, a.group_num, a.shape.channels, place.column);
  Acc scale[V] = {}, shift[V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    scale[i] = static_cast<const Acc*>(a.weight)[place.column + i] * static_cast<const Acc*>(a.stats)[place.column + i];
    shift[i] = static_cast<const Acc*>(a.bias)[place.column + i];
  }
  place.walk_back({static_cast<const T*>(a.x)}, [&](int64_t row, const Pack<T, V>(&in)[1]) {
    write_pack(place, a.y, row, in[0], factor(row), scale, shift);
  });
}

template <class T, int V>
int launch(const PowerForward& a, const Workspace& workspace, void* stream) {
  const ColumnGrid columns(a.shape, V);
  if (const int error = clear_counters(workspace, a.shape, stream)) return error;
  if (a.group_num > 0 && a.shape.rows > 0)
    NF_LAUNCH((power_row_scale<T, V>), segment_grid(a.shape.rows * a.group_num), columns.block(), stream, a);
  NF_LAUNCH((power_sums<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  NF_LAUNCH((power_apply<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int power_forward_cuda(const PowerForward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  const int64_t width = args.shape.channels / (args.group_num > 0 ? args.group_num : 1);
  return cuda::with_element_type(args.shape.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::can_pack<T>(width, {args.x, args.y}) ? cuda::launch<T, 16 / sizeof(T)>(args, w, stream)
                                                      : cuda::launch<T, 1>(args, w, stream);
  });
}

}  // namespace normfuse
