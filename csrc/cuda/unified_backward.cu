// Unified Norm, backward.
//   unified_gradient_sums   sums of dy and dy x; per channel m = mean of w r dy z, the gradient window, ema_gz,
//                           dw = r sum(dy z), db = sum(dy). Reads dy and x.
//   unified_gradient_apply  dx = (w r dy - ema_gz z) / sqrt(var + eps) = slope dy - pull x.
//                           Reads dy and x backwards, from L2 first, and writes dx.
// With a residual the gradient of s = x + residual arrives as well, and is added to dx.
// Tensors moved: 5, with the gradient of s 6, of which two come from L2 as far as it reaches.
#include "columns.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    unified_gradient_sums(UnifiedBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const int64_t n = a.shape.channels;
  const Place<T, V> place(a.shape.rows, n);
  Acc sums[2][V] = {};
  place.walk({static_cast<const T*>(a.grad_y), static_cast<const T*>(a.x)}, [&](int64_t, const Pack<T, V>(&in)[2]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0][i] += widen(in[0].v[i]);
      sums[1][i] += widen(in[0].v[i]) * widen(in[1].v[i]);
    }
  });
  finish_columns(sums, n, static_cast<Acc*>(workspace.partial), workspace.tiles, [&](int64_t c, const Acc(&sum)[2]) {
    const UnifiedStep step{a.step[0], a.step[1] != 0, a.window, a.warmup_iters};
    const Acc* stats = static_cast<const Acc*>(a.stats);
    const UnifiedStats<Acc> channel{stats[c], stats[n + c]};
    const Acc weight = static_cast<const Acc*>(a.weight)[c];
    const Acc weight_gradient = channel.r * channel.inv_std * sum[1];
    const Acc m = mean_or(weight * weight_gradient, a.shape.rows, Acc(0));
    const auto k = unified_backward_channel(step, m, weight, channel, static_cast<Acc*>(a.buffer_gz) + c, n,
                                            Acc(a.momentum), static_cast<Acc*>(a.ema_gz) + c);
    static_cast<Acc*>(workspace.vectors)[c] = k.slope;
    static_cast<Acc*>(workspace.vectors)[n + c] = k.pull;
    static_cast<Acc*>(a.grad_weight)[c] = weight_gradient;
    static_cast<Acc*>(a.grad_bias)[c] = sum[0];
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    unified_gradient_apply(UnifiedBackward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const Place<T, V> place(a.shape.rows, a.shape.channels);
  const Acc* vectors = static_cast<const Acc*>(workspace.vectors);
  Acc slope[V] = {}, pull[V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    slope[i] = vectors[place.column + i];
    pull[i] = vectors[a.shape.channels + place.column + i];
  }
  place.template walk_gradients<true>(
      a.grad_y, a.x, a.grad_s, [&](int64_t row, const Pack<T, V>& dy, const Pack<T, V>& x, const Pack<T, V>* ds) {
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Acc dx = slope[i] * widen(dy.v[i]) - pull[i] * widen(x.v[i]);
          narrow(ds ? dx + widen(ds->v[i]) : dx, &out.v[i]);
        }
        place.store(static_cast<T*>(a.grad_x), row, out);
      });
}

template <class T, int V>
int launch(const UnifiedBackward& a, const Workspace& workspace, void* stream) {
  const ColumnGrid columns(a.shape, V);
  if (const int error = clear_counters(workspace, a.shape, stream)) return error;
  NF_LAUNCH((unified_gradient_sums<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  NF_LAUNCH((unified_gradient_apply<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const UnifiedBackward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  return cuda::with_packs(args.shape.dtype, args.shape.channels, {args.grad_y, args.x, args.grad_s, args.grad_x},
                          [&](auto t, auto pack) { return cuda::launch<decltype(t), pack>(args, w, stream); });
}

}  // namespace normfuse
