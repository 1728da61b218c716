// Batch normalisation and its kin, forward; cell_math.h has the algebra.
//   cell_moments  count, mean and squared deviations of every cell, merged from those of a few numbers at a time; the
//                 statistics, the running ones, scale and shift. Reads x.
//   cell_affine   y = scale (x - mean) + shift. Reads x backwards, from L2 first, and writes y.
// Tensors moved: 3, of which one comes from L2 as far as it reaches. Counters move in cell_affine, when nobody reads them
// any more.
#include "cells.cuh"

namespace normfuse {
namespace cuda {
namespace {

// What cell_moments leaves for cell_affine and for itself, [groups, sets, channels] each.
template <class Acc>
struct ForwardVectors {
  Acc *mean, *scale, *shift, *unbiased;

  __device__ ForwardVectors(const CellWorkspace& workspace, const Cells& cells) {
    const int64_t size = cells.groups() * cells.sets() * cells.channels;
    mean = static_cast<Acc*>(workspace.vectors);
    scale = mean + size;
    shift = scale + size;
    unbiased = shift + size;
  }
};

// The statistics of a cell and what follows from them: of batch normalisation, or where `a.x` is null of the moving average.
template <class Acc>
struct ForwardFinish {
  BatchNormForward a;
  MovingAverageForward moving;
  CellWorkspace workspace;

  __device__ void operator()(int64_t group, int64_t set, int64_t c, const Moments<Acc>& found) const {
    if (!a.x) return move_average(c, found);
    const int64_t sets = a.cells.sets(), n = a.cells.channels, size = a.cells.groups() * sets * n;
    const int64_t cell = group * sets + set, i = cell * n + c;
    const ForwardVectors<Acc> vectors(workspace, a.cells);
    const CellStats<Acc> own =
        a.estimated ? estimated_stats(a, found.mean, found.squares, found.count,
                                      moving_rate<Acc>(a.momentum, next_step(*a.num_batches_tracked)),
                                      static_cast<Acc*>(a.running_mean) + c, static_cast<Acc*>(a.running_var) + c)
                    : own_stats(a, found.mean, found.squares, found.count);
    Acc* stats = static_cast<Acc*>(a.stats);
    stats[i] = vectors.mean[i] = own.mean;
    stats[size + i] = own.var;
    stats[2 * size + i] = own.inv_std;
    vectors.unbiased[i] = unbiased_var(found.squares, found.count);
    if (c == 0) a.count[cell] = found.count;
    if (!a.weight.data) return;
    const Acc shortcut = a.shortcut ? *static_cast<const Acc*>(a.shortcut) : Acc(0);
    const auto by =
        affine_of_cell(own, number_of<Acc>(a.weight, group, set, c), number_of<Acc>(a.bias, group, set, c), shortcut);
    vectors.scale[i] = by.scale;
    vectors.shift[i] = by.shift;
  }

  __device__ void move_average(int64_t c, const Moments<Acc>& found) const {
    const int64_t n = moving.cells.channels;
    Acc *running_var = static_cast<Acc*>(moving.running_var) + c, *stats = static_cast<Acc*>(moving.stats) + c;
    const Acc q = found.count > 0 ? found.squares / Acc(found.count) + found.mean * found.mean : *running_var;
    const int64_t t = found.count > 0 ? next_step(*moving.iters) : 0;
    if (c == 0) *moving.step = t;
    const auto own = moving_average_forward_channel(t, moving.window, moving.warmup_iters, q,
                                                    static_cast<Acc*>(moving.buffer_x2) + c, n, Acc(moving.eps),
                                                    Acc(moving.momentum), running_var);
    stats[0] = own.inv_std;
    stats[n] = own.r;
    const ForwardVectors<Acc> vectors(workspace, moving.cells);
    vectors.mean[c] = 0;
    vectors.scale[c] = static_cast<const Acc*>(moving.weight)[c] * own.r * own.inv_std;
    vectors.shift[c] = static_cast<const Acc*>(moving.bias)[c];
  }

  // The groups move the running statistics one after another, when all are there.
  __device__ bool follows_groups() const { return a.running_mean && !a.estimated; }
  __device__ void after_groups(int64_t c) const {
    const int64_t n = a.cells.channels;
    const ForwardVectors<Acc> vectors(workspace, a.cells);
    Acc *mean = static_cast<Acc*>(a.running_mean) + c, *var = static_cast<Acc*>(a.running_var) + c;
    int64_t step = *a.num_batches_tracked;
    for (int64_t g = 0; g < a.cells.groups(); ++g) {
      const Acc unbiased = __ldcg(vectors.unbiased + g * n + c);
      if (!is_update(unbiased)) continue;
      step = next_step(step);
      move_running(__ldcg(vectors.mean + g * n + c), unbiased, moving_rate<Acc>(a.momentum, step), mean, var);
    }
  }
};

// Of one set, for this thread's channels, which all count the same numbers.
template <class Acc, int kCells>
struct ThreadMoments {
  int64_t count = 0;
  Acc mean[kCells] = {}, squares[kCells] = {};

  // Merges what the batch holds of the set, as Moments::add does.
  template <class T, int V, bool kPlanes, Mask kMask>
  __device__ __forceinline__ void add(const Batch<T, V, 1, kMask>& in, unsigned set) {
    const auto belongs = [&](int k, int i) {
      return in.at[k] >= 0 && (kMask == Mask::kNone || (in.parts[k] >> i & 1) == set);
    };
    int more = 0;
    Acc m[kCells] = {}, q[kCells] = {};
#pragma unroll
    for (int k = 0; k < in.kPacks; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (belongs(k, i)) {
          m[kPlanes ? 0 : i] += widen(in.packs[k][0].v[i]);
          if (kPlanes || i == 0) ++more;
        }
    if (more == 0) return;
#pragma unroll
    for (int c = 0; c < kCells; ++c) m[c] /= Acc(more);
#pragma unroll
    for (int k = 0; k < in.kPacks; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (belongs(k, i)) {
          const Acc d = widen(in.packs[k][0].v[i]) - m[kPlanes ? 0 : i];
          q[kPlanes ? 0 : i] += d * d;
        }
    const Acc share = Acc(more) / Acc(count + more), weight = Acc(count) * share;
    count += more;
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
      const Acc gap = m[c] - mean[c];
      mean[c] += gap * share;
      squares[c] += q[c] + gap * gap * weight;
    }
  }
};

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_moments(Cells cells, const T* x, ForwardFinish<AccOf<T>> finish, int team, int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = cells.groups();
  CellPlace<T, V, kPlanes> place(cells, team, width);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    ThreadMoments<Acc, place.kCells> found[kSets];
    place.template walk<kMask, false>({x}, [&](const Batch<T, V, 1, kMask>& in) {
#pragma unroll
      for (int s = 0; s < kSets; ++s) found[s].template add<T, V, kPlanes, kMask>(in, s);
    });
    Moments<Acc> moments[kSets][place.kCells];
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kCells; ++i) moments[s][i] = {found[s].count, found[s].mean[i], found[s].squares[i]};
    const bool finished =
        finish_cells<kPlanes>(place, moments, finish.workspace, [&](int64_t c, const Moments<Acc>(&found)[kSets]) {
#pragma unroll
          for (int s = 0; s < kSets; ++s) finish(g, s, c, found[s]);
        });
    if (finished && finish.follows_groups() &&
        is_last(finish.workspace.blocks_done + groups * gridDim.x + blockIdx.x, unsigned(groups)) &&
        place.finished < cells.channels)
      finish.after_groups(place.finished);
  }
}

// A counter moves once for each of `groups` numbers that is not 0.
struct Counter {
  int64_t* value;
  const int64_t* moves;
  int64_t groups;
};

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_affine(Cells cells, const T* x, T* y, CellWorkspace workspace, Counter counter, int team, int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = cells.groups();
  const ForwardVectors<Acc> vectors(workspace, cells);
  CellPlace<T, V, kPlanes> place(cells, team, width);
  if (counter.value && place.thread == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0)
    for (int64_t g = 0; g < counter.groups; ++g)
      if (counter.moves[g] != 0) *counter.value = next_step(*counter.value);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    Acc mean[kSets][place.kCells] = {}, scale[kSets][place.kCells] = {}, shift[kSets][place.kCells] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kCells; ++i)
        if (place.channel + i < cells.channels) {
          const int64_t cell = place.cell(s, place.channel + i);
          mean[s][i] = vectors.mean[cell];
          scale[s][i] = vectors.scale[cell];
          shift[s][i] = vectors.shift[cell];
        }
    place.template walk<kMask, true>({x}, [&](const Batch<T, V, 1, kMask>& in) {
#pragma unroll
      for (int k = 0; k < in.kPacks; ++k) {
        if (in.at[k] < 0) continue;
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int c = kPlanes ? 0 : i;
          const bool second = kSets == 2 && (in.parts[k] >> i & 1);
          const Acc m = second ? mean[kSets - 1][c] : mean[0][c], a = second ? scale[kSets - 1][c] : scale[0][c],
                    b = second ? shift[kSets - 1][c] : shift[0][c];
          narrow((widen(in.packs[k][0].v[i]) - m) * a + b, &out.v[i]);
        }
        store_pack(y + in.at[k], out);
      }
    });
  }
}

// y is null where it is not wanted.
template <class T>
int launch(const Cells& cells, const void* x, void* y, const ForwardFinish<AccOf<T>>& finish, const Counter& counter,
           void* stream) {
  return with_layout<T>(cells, {x, y}, [&](auto pack, auto planes) {
    constexpr int V = decltype(pack)::value;
    constexpr bool kPlanes = decltype(planes)::value;
    const CellGrid grid(cells, V);
    const dim3 block = ColumnGrid::block();
    const T* from = static_cast<const T*>(x);
    if (const int error = clear_counters(finish.workspace, cells, stream)) return error;
    const auto moments = [&](auto mask) {
      NF_LAUNCH((cell_moments<T, V, kPlanes, mask.value>), grid.grid(), block, stream, cells, from, finish, grid.team,
                grid.width);
    };
    if (!cells.mask)
      moments(MaskIs<Mask::kNone>());
    else if (cells.regions)
      moments(MaskIs<Mask::kRegions>());
    else
      moments(MaskIs<Mask::kPadding>());
    const auto affine = [&](auto mask) {
      NF_LAUNCH((cell_affine<T, V, kPlanes, mask.value>), grid.grid(), block, stream, cells, from, static_cast<T*>(y),
                finish.workspace, counter, grid.team, grid.width);
    };
    if (y && cells.sets() == 2)
      affine(MaskIs<Mask::kRegions>());
    else if (y)
      affine(MaskIs<Mask::kNone>());
    return int(cudaGetLastError());
  });
}

}  // namespace
}  // namespace cuda

int batch_norm_forward_cuda(const BatchNormForward& args, void* workspace, void* stream) {
  const cuda::CellWorkspace w = cuda::lay_out_workspace(workspace, args.cells);
  const cuda::Counter counter{args.num_batches_tracked, args.count, args.cells.groups()};
  return cuda::with_element_type(args.cells.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.cells, args.x, args.weight.data ? args.y : nullptr, {args, {}, w}, counter, stream);
  });
}

int moving_average_forward_cuda(const MovingAverageForward& args, void* workspace, void* stream) {
  const cuda::CellWorkspace w = cuda::lay_out_workspace(workspace, args.cells);
  const cuda::Counter counter{args.iters, args.step, 1};
  return cuda::with_element_type(args.cells.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.cells, args.x, args.y, {{}, args, w}, counter, stream);
  });
}

}  // namespace normfuse
