// Unified Norm, forward. With a residual, s = x + residual stands for x in what follows.
//   unified_sums    q = mean over valid rows of x^2, and without outlier filtration the step on each channel;
//                   reads x (and residual, and writes s)
//   unified_window  with outlier filtration: the test over all channels, then the step on each; one block
//   unified_apply   y = w x / sqrt(var + eps) + b; reads x backwards, from L2 first, and writes y
// Tensors moved: 3, with a residual 5, of which one comes from L2 as far as it reaches.
// unified_sums writes the step's number, 0 where no row is valid; the counter takes it in unified_apply, when nobody reads
// the counter any more.
#include "columns.cuh"

namespace normfuse {
namespace cuda {
namespace {

template <class Acc>
struct State {
  const Acc *weight, *bias;
  Acc *running_var, *buffer_x2, *inv_std, *r;

  __device__ explicit State(const UnifiedForward& a)
      : weight(static_cast<const Acc*>(a.weight)),
        bias(static_cast<const Acc*>(a.bias)),
        running_var(static_cast<Acc*>(a.running_var)),
        buffer_x2(static_cast<Acc*>(a.buffer_x2)),
        inv_std(static_cast<Acc*>(a.stats)),
        r(inv_std + a.shape.channels) {}
};

template <class Acc>
__device__ void finish_channel(const UnifiedForward& a, const UnifiedStep& step, Acc q, int64_t c) {
  const State<Acc> state(a);
  const int64_t n = a.shape.channels;
  const auto stats =
      unified_forward_channel(step, q, state.buffer_x2 + c, n, Acc(a.eps), Acc(a.momentum), state.running_var + c);
  state.inv_std[c] = stats.inv_std;
  state.r[c] = stats.r;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    unified_sums(UnifiedForward a, Workspace workspace) {
  using Acc = AccOf<T>;
  const State<Acc> state(a);
  const int64_t n = a.shape.channels;
  const Place<T, V> place(a.shape.rows, n);
  Acc squares[1][V] = {};
  unsigned valid = 0;
  const auto add = [&](int64_t row, const Pack<T, V>& x) {
    if (a.pad_mask && a.pad_mask[row]) return;
    ++valid;
#pragma unroll
    for (int i = 0; i < V; ++i) squares[0][i] += widen(x.v[i]) * widen(x.v[i]);
  };
  place.walk_sum(a.x, a.residual, a.s, add);
  TileCounters* tile = workspace.tiles + blockIdx.x;
  if (a.pad_mask && threadIdx.x == 0) atomicAdd(&tile->valid_rows, static_cast<unsigned long long>(valid));

  finish_columns(squares, n, static_cast<Acc*>(workspace.partial), workspace.tiles,
                 [&](int64_t c, const Acc(&sums)[1]) {
                   const int64_t count = a.pad_mask ? int64_t(tile->valid_rows) : a.shape.rows;
                   const Acc q = mean_or(sums[0], count, state.running_var[c]);
                   const UnifiedStep step{count > 0 ? next_step(*a.iters) : 0, a.window <= 1, a.window, a.warmup_iters};
                   if (c == 0) {
                     a.step[0] = step.t;
                     a.step[1] = step.skip;
                   }
                   if (a.outlier_filtration) {
                     static_cast<Acc*>(workspace.vectors)[c] = q;
                   } else {
                     if (step.t != 0) state.buffer_x2[slot_of(step.t, a.window) * n + c] = q;
                     finish_channel(a, step, q, c);
                   }
                 });
}

constexpr int kWindowThreads = 512;

// The sum over all threads of the block, in a fixed order, for every thread.
__device__ double add_threads(double value, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = value;
  for (unsigned half = kWindowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[0];
}

template <class Acc>
__global__ void __launch_bounds__(kWindowThreads, 1) unified_window(UnifiedForward a, Workspace workspace) {
  NF_SHARED(double, shared, kWindowThreads);
  const State<Acc> state(a);
  const int64_t n = a.shape.channels, entries = a.window * n;
  const Acc* q = static_cast<const Acc*>(workspace.vectors);
  UnifiedStep step{a.step[0], a.window <= 1, a.window, a.warmup_iters};
  Acc* slot = state.buffer_x2 + slot_of(step.t, a.window) * n;
  const bool moves = step.t != 0, filter = moves && step.t >= a.warmup_iters;

  double spread = 0;  // unbiased variance of the roots of all entries, before q enters
  if (filter) {
    double sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < entries; i += kWindowThreads) sum += std::sqrt(double(state.buffer_x2[i]));
    const double mean = add_threads(sum, shared) / double(entries);
    for (int64_t i = threadIdx.x; i < entries; i += kWindowThreads) {
      const double d = std::sqrt(double(state.buffer_x2[i])) - mean;
      squares += d * d;
    }
    spread = add_threads(squares, shared) / double(entries - 1);
  }
  int outliers = 0;
  for (int64_t c = threadIdx.x; c < n; c += kWindowThreads) {
    if (moves) slot[c] = q[c];
    outliers += filter && unified_is_outlier(state.buffer_x2 + c, a.window, n, Acc(spread));
  }
  const bool outlier = add_threads(outliers, shared) > 0;
  step.skip = step.skip || outlier;
  for (int64_t c = threadIdx.x; c < n; c += kWindowThreads) {
    if (outlier) slot[c] = state.running_var[c];
    finish_channel(a, step, q[c], c);
  }
  if (threadIdx.x == 0) {
    a.step[1] = step.skip;
    *a.skip_counter += outlier;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) unified_apply(UnifiedForward a) {
  using Acc = AccOf<T>;
  const State<Acc> state(a);
  const Place<T, V> place(a.shape.rows, a.shape.channels);
  if (place.column == 0 && place.first == 0 && a.step[0] != 0) *a.iters = a.step[0];
  Acc scale[V] = {}, shift[V] = {};
  for (int i = 0; i < V && place.inside; ++i) {
    scale[i] = state.weight[place.column + i] * state.inv_std[place.column + i];
    shift[i] = state.bias[place.column + i];
  }
  place.walk_back({static_cast<const T*>(a.x)}, [&](int64_t row, const Pack<T, V>(&in)[1]) {
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(widen(in[0].v[i]) * scale[i] + shift[i], &out.v[i]);
    place.store(static_cast<T*>(a.y), row, out);
  });
}

template <class T, int V>
int launch(const UnifiedForward& a, const Workspace& workspace, void* stream) {
  const ColumnGrid columns(a.shape, V);
  if (const int error = clear_counters(workspace, a.shape, stream)) return error;
  NF_LAUNCH((unified_sums<T, V>), columns.grid(), columns.block(), stream, a, workspace);
  if (a.outlier_filtration) NF_LAUNCH((unified_window<AccOf<T>>), dim3(1), dim3(kWindowThreads), stream, a, workspace);
  NF_LAUNCH((unified_apply<T, V>), columns.grid(), columns.block(), stream, with_sum(a));
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda

int run_cuda(const UnifiedForward& args, void* workspace, void* stream) {
  const cuda::Workspace w = cuda::lay_out_workspace(workspace, args.shape);
  return cuda::with_packs(args.shape.dtype, args.shape.channels, {args.x, args.residual, args.y, args.s},
                          [&](auto t, auto pack) { return cuda::launch<decltype(t), pack>(args, w, stream); });
}

}  // namespace normfuse
