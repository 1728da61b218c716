// Batch normalisation and its kin, forward; stat_group_math.h has the algebra.
//   stat_group_moments  count, mean and squared deviations of every statistics group, merged from those of a few numbers
//                       at a time; the statistics, the running ones, scale and shift. Reads x.
//   stat_group_affine   y = scale (x - mean) + shift. Reads x backwards, from L2 first, and writes y.
// Tensors moved: 3, of which one comes from L2 as far as it reaches. Counters move in stat_group_affine, when nobody
// reads them any more.
#include "stat_groups.cuh"

namespace normfuse {
namespace cuda {
namespace {

// What stat_group_moments leaves for stat_group_affine and for itself.
template <class Acc>
struct ForwardVectors {
  Acc *mean, *scale, *shift, *unbiased;
};

// The statistics of a group and what follows from them: of batch normalisation, or where `a.x` is null of the moving
// average.
template <class Acc>
struct ForwardFinish {
  BatchNormForward a;
  MovingAverageForward moving;
  StatGroupWorkspace workspace;

  __device__ void operator()(int64_t group, int64_t set, int64_t c, const Moments<Acc>& found) const {
    if (!a.x) return move_average(c, found);
    const int64_t sets = a.stat_groups.sets(), n = a.stat_groups.channels, size = a.stat_groups.groups() * sets * n;
    const int64_t stat_group = group * sets + set, i = stat_group * n + c;
    const auto vectors = vectors_in<ForwardVectors, Acc>(workspace, a.stat_groups);
    const StatGroupStats<Acc> own =
        a.estimated ? estimated_stats(a, found.mean, found.squares, found.count,
                                      moving_rate<Acc>(a.momentum, next_step(*a.num_batches_tracked)),
                                      static_cast<Acc*>(a.running_mean) + c, static_cast<Acc*>(a.running_var) + c)
                    : own_stats(a, found.mean, found.squares, found.count);
    Acc* stats = static_cast<Acc*>(a.stats);
    stats[i] = vectors.mean[i] = own.mean;
    stats[size + i] = own.var;
    stats[2 * size + i] = own.inv_std;
    vectors.unbiased[i] = unbiased_var(found.squares, found.count);
    if (c == 0) a.count[stat_group] = found.count;
    if (!a.weight.data) return;
    const Acc shortcut = a.shortcut ? *static_cast<const Acc*>(a.shortcut) : Acc(0);
    const auto by = affine_of_stat_group(own, number_of<Acc>(a.weight, group, set, c),
                                         number_of<Acc>(a.bias, group, set, c), shortcut);
    vectors.scale[i] = by.scale;
    vectors.shift[i] = by.shift;
  }

  __device__ void move_average(int64_t c, const Moments<Acc>& found) const {
    const int64_t n = moving.stat_groups.channels;
    Acc *running_var = static_cast<Acc*>(moving.running_var) + c, *stats = static_cast<Acc*>(moving.stats) + c;
    const Acc q = found.count > 0 ? found.squares / Acc(found.count) + found.mean * found.mean : *running_var;
    const int64_t t = found.count > 0 ? next_step(*moving.iters) : 0;
    if (c == 0) *moving.step = t;
    const auto own = moving_average_forward_channel(t, moving.window, moving.warmup_iters, q,
                                                    static_cast<Acc*>(moving.buffer_x2) + c, n, Acc(moving.eps),
                                                    Acc(moving.momentum), running_var);
    stats[0] = own.inv_std;
    stats[n] = own.r;
    const auto vectors = vectors_in<ForwardVectors, Acc>(workspace, moving.stat_groups);
    vectors.mean[c] = 0;
    vectors.scale[c] = static_cast<const Acc*>(moving.weight)[c] * own.r * own.inv_std;
    vectors.shift[c] = static_cast<const Acc*>(moving.bias)[c];
  }

  // The groups move the running statistics one after another, when all are there.
  __device__ bool follows_groups() const { return a.running_mean && !a.estimated; }
  __device__ void after_groups(int64_t c) const {
    const int64_t n = a.stat_groups.channels;
    const auto vectors = vectors_in<ForwardVectors, Acc>(workspace, a.stat_groups);
    Acc *mean = static_cast<Acc*>(a.running_mean) + c, *var = static_cast<Acc*>(a.running_var) + c;
    int64_t step = *a.num_batches_tracked;
    for (int64_t g = 0; g < a.stat_groups.groups(); ++g) {
      const Acc unbiased = __ldcg(vectors.unbiased + g * n + c);
      if (!is_update(unbiased)) continue;
      step = next_step(step);
      move_running(__ldcg(vectors.mean + g * n + c), unbiased, moving_rate<Acc>(a.momentum, step), mean, var);
    }
  }
};

// Of one set, for this thread's channels, which all count the same numbers.
template <class Acc, int kStatGroups>
struct ThreadMoments {
  int64_t count = 0;
  Acc mean[kStatGroups] = {}, squares[kStatGroups] = {};

  // Merges what the batch holds of the set, as Moments::add does.
  template <class T, int V, bool kPlanes, Mask kMask>
  __device__ __forceinline__ void add(const Batch<T, V, 1, kMask>& in, unsigned set) {
    const auto belongs = [&](int k, int i) {
      return in.at[k] >= 0 && (kMask == Mask::kNone || (in.parts[k] >> i & 1) == set);
    };
    int more = 0;
    Acc m[kStatGroups] = {}, q[kStatGroups] = {};
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
    for (int c = 0; c < kStatGroups; ++c) m[c] /= Acc(more);
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
    for (int c = 0; c < kStatGroups; ++c) {
      const Acc gap = m[c] - mean[c];
      mean[c] += gap * share;
      squares[c] += q[c] + gap * gap * weight;
    }
  }
};

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stat_group_moments(StatGroups stat_groups, const T* x, ForwardFinish<AccOf<T>> finish, int team, int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = stat_groups.groups();
  StatGroupPlace<T, V, kPlanes> place(stat_groups, team, width);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    ThreadMoments<Acc, place.kStatGroups> found[kSets];
    place.template walk<kMask, false>({x}, [&](const Batch<T, V, 1, kMask>& in) {
#pragma unroll
      for (int s = 0; s < kSets; ++s) found[s].template add<T, V, kPlanes, kMask>(in, s);
    });
    Moments<Acc> moments[kSets][place.kStatGroups];
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kStatGroups; ++i)
        moments[s][i] = {found[s].count, found[s].mean[i], found[s].squares[i]};
    const bool finished = finish_stat_groups<kPlanes>(
        place, moments, finish.workspace, [&](int64_t c, int set, const Moments<Acc>& sum) { finish(g, set, c, sum); });
    if (finished && finish.follows_groups() &&
        is_last(finish.workspace.blocks_done + groups * gridDim.x + blockIdx.x, unsigned(groups)) &&
        place.finished < stat_groups.channels)
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
    stat_group_affine(StatGroups stat_groups, const T* x, T* y, StatGroupWorkspace workspace, Counter counter, int team,
                      int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = stat_groups.groups();
  const auto vectors = vectors_in<ForwardVectors, Acc>(workspace, stat_groups);
  StatGroupPlace<T, V, kPlanes> place(stat_groups, team, width);
  if (counter.value && place.thread == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0)
    for (int64_t g = 0; g < counter.groups; ++g)
      if (counter.moves[g] != 0) *counter.value = next_step(*counter.value);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    Acc mean[kSets][place.kStatGroups] = {}, scale[kSets][place.kStatGroups] = {}, shift[kSets][place.kStatGroups] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kStatGroups; ++i)
        if (place.channel + i < stat_groups.channels) {
          const int64_t stat_group = place.stat_group(s, place.channel + i);
          mean[s][i] = vectors.mean[stat_group];
          scale[s][i] = vectors.scale[stat_group];
          shift[s][i] = vectors.shift[stat_group];
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
int launch(const StatGroups& stat_groups, const void* x, void* y, const ForwardFinish<AccOf<T>>& finish,
           const Counter& counter, void* stream) {
  return with_layout<T>(stat_groups, {x, y}, [&](auto pack, auto planes) {
    constexpr int V = decltype(pack)::value;
    constexpr bool kPlanes = decltype(planes)::value;
    const StatGroupGrid grid(stat_groups, V);
    const dim3 block = ColumnGrid::block();
    const T* from = static_cast<const T*>(x);
    if (const int error = clear_counters(finish.workspace, stat_groups, stream)) return error;
    with_mask(stat_groups, [&](auto mask) {
      NF_LAUNCH((stat_group_moments<T, V, kPlanes, mask.value>), grid.grid(), block, stream, stat_groups, from, finish,
                grid.team, grid.width);
    });
    if (!y) return int(cudaGetLastError());
    with_sets(stat_groups, [&](auto mask) {
      NF_LAUNCH((stat_group_affine<T, V, kPlanes, mask.value>), grid.grid(), block, stream, stat_groups, from,
                static_cast<T*>(y), finish.workspace, counter, grid.team, grid.width);
    });
    return int(cudaGetLastError());
  });
}

}  // namespace
}  // namespace cuda

int run_cuda(const BatchNormForward& args, void* workspace, void* stream) {
  const cuda::StatGroupWorkspace w = cuda::lay_out_workspace(workspace, args.stat_groups);
  const cuda::Counter counter{args.num_batches_tracked, args.count, args.stat_groups.groups()};
  return cuda::with_element_type(args.stat_groups.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.stat_groups, args.x, args.weight.data ? args.y : nullptr, {args, {}, w}, counter,
                           stream);
  });
}

int run_cuda(const MovingAverageForward& args, void* workspace, void* stream) {
  const cuda::StatGroupWorkspace w = cuda::lay_out_workspace(workspace, args.stat_groups);
  const cuda::Counter counter{args.iters, args.step, 1};
  return cuda::with_element_type(args.stat_groups.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.stat_groups, args.x, args.y, {{}, args, w}, counter, stream);
  });
}

}  // namespace normfuse
