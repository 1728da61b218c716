// Batch normalisation and its kin, backward; stat_group_math.h has the algebra.
//   stat_group_gradient_sums  sums of dy and dy (x - mean) over every statistics group; gradients of gain and bias,
//                             slope, pull and offset. Reads dy and x.
//   stat_group_gradient       dx = slope dy + pull (x - mean) + offset. Reads dy and x backwards, from L2 first, and
//                             writes dx.
// Tensors moved: 5, of which two come from L2 as far as it reaches.
#include "stat_groups.cuh"

namespace normfuse {
namespace cuda {
namespace {

// What stat_group_gradient_sums reads, and leaves for stat_group_gradient.
template <class Acc>
struct BackwardVectors {
  Acc *mean, *slope, *pull, *offset;
};

// Of batch normalisation, or where `a.x` is null of the moving average, whose mean is 0.
template <class Acc>
struct BackwardFinish {
  BatchNormBackward a;
  MovingAverageBackward moving;
  StatGroupWorkspace workspace;

  __device__ Acc mean(int64_t stat_group) const { return a.x ? static_cast<const Acc*>(a.stats)[stat_group] : Acc(0); }

  __device__ void operator()(int64_t group, int64_t set, int64_t c, const GradientSums<Acc>& sums) const {
    if (!a.x) return move_average(c, sums);
    const int64_t sets = a.stat_groups.sets(), n = a.stat_groups.channels, size = a.stat_groups.groups() * sets * n;
    const int64_t stat_group = group * sets + set, i = stat_group * n + c;
    const Acc* stats = static_cast<const Acc*>(a.stats);
    const StatGroupStats<Acc> own{stats[i], stats[size + i], stats[2 * size + i]};
    const auto of = [i](const void* vectors) { return vectors ? static_cast<const Acc*>(vectors)[i] : Acc(0); };
    const auto k = gradient_of_stat_group<Acc>(own, number_of<Acc>(a.weight, group, set, c),
                                               a.shortcut ? *static_cast<const Acc*>(a.shortcut) : Acc(0), sums.dy,
                                               sums.dyd, of(a.grad_mean), of(a.grad_var),
                                               a.estimated ? 0 : a.count[stat_group], a.correction, Acc(a.floor));
    static_cast<Acc*>(a.grad_weight)[i] = sums.dyd * own.inv_std;
    static_cast<Acc*>(a.grad_bias)[i] = sums.dy;
    const auto vectors = vectors_in<BackwardVectors, Acc>(workspace, a.stat_groups);
    vectors.mean[i] = own.mean;
    vectors.slope[i] = k.slope;
    vectors.pull[i] = k.pull;
    vectors.offset[i] = k.offset;
  }

  __device__ void move_average(int64_t c, const GradientSums<Acc>& sums) const {
    const int64_t n = moving.stat_groups.channels, count = moving.stat_groups.samples * moving.stat_groups.positions;
    const Acc* stats = static_cast<const Acc*>(moving.stats);
    const UnifiedStats<Acc> own{stats[c], stats[n + c]};
    const Acc weight = static_cast<const Acc*>(moving.weight)[c], weight_gradient = own.r * own.inv_std * sums.dyd;
    const Acc m = mean_or(weight * weight_gradient, count, Acc(0));
    const auto k = moving_average_backward_channel(*moving.step, moving.window, moving.warmup_iters, m, weight, own,
                                                   static_cast<Acc*>(moving.buffer_gz) + c, n);
    static_cast<Acc*>(moving.grad_weight)[c] = weight_gradient;
    static_cast<Acc*>(moving.grad_bias)[c] = sums.dy;
    const auto vectors = vectors_in<BackwardVectors, Acc>(workspace, moving.stat_groups);
    vectors.mean[c] = vectors.offset[c] = 0;
    vectors.slope[c] = k.slope;
    vectors.pull[c] = -k.pull;
  }
};

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stat_group_gradient_sums(StatGroups stat_groups, const T* dy, const T* x, BackwardFinish<AccOf<T>> finish, int team,
                             int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = stat_groups.groups();
  StatGroupPlace<T, V, kPlanes> place(stat_groups, team, width);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    Acc mean[kSets][place.kStatGroups] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kStatGroups; ++i)
        if (place.channel + i < stat_groups.channels) mean[s][i] = finish.mean(place.stat_group(s, place.channel + i));
    GradientSums<Acc> sums[kSets][place.kStatGroups] = {};
    place.template walk<kMask, false>({dy, x}, [&](const Batch<T, V, 2, kMask>& in) {
#pragma unroll
      for (int k = 0; k < in.kPacks; ++k) {
        if (in.at[k] < 0) continue;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Acc d = widen(in.packs[k][0].v[i]), v = widen(in.packs[k][1].v[i]);
#pragma unroll
          for (int s = 0; s < kSets; ++s) {
            // Selected, not branched over: a branch becomes an index, and what is indexed lives in memory.
            const bool belongs = kSets == 1 || (in.parts[k] >> i & 1) == unsigned(s);
            GradientSums<Acc>& sum = sums[s][kPlanes ? 0 : i];
            sum.dy += belongs ? d : Acc(0);
            sum.dyd += belongs ? d * (v - mean[s][kPlanes ? 0 : i]) : Acc(0);
          }
        }
      }
    });
    finish_stat_groups<kPlanes>(place, sums, finish.workspace,
                                [&](int64_t c, int set, const GradientSums<Acc>& found) { finish(g, set, c, found); });
  }
}

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stat_group_gradient(StatGroups stat_groups, const T* dy, const T* x, T* dx, StatGroupWorkspace workspace, int team,
                        int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = stat_groups.groups();
  const auto vectors = vectors_in<BackwardVectors, Acc>(workspace, stat_groups);
  StatGroupPlace<T, V, kPlanes> place(stat_groups, team, width);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    Acc mean[kSets][place.kStatGroups] = {}, slope[kSets][place.kStatGroups] = {}, pull[kSets][place.kStatGroups] = {},
        offset[kSets][place.kStatGroups] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kStatGroups; ++i)
        if (place.channel + i < stat_groups.channels) {
          const int64_t stat_group = place.stat_group(s, place.channel + i);
          mean[s][i] = vectors.mean[stat_group];
          slope[s][i] = vectors.slope[stat_group];
          pull[s][i] = vectors.pull[stat_group];
          offset[s][i] = vectors.offset[stat_group];
        }
    place.template walk<kMask, true>({dy, x}, [&](const Batch<T, V, 2, kMask>& in) {
#pragma unroll
      for (int k = 0; k < in.kPacks; ++k) {
        if (in.at[k] < 0) continue;
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int c = kPlanes ? 0 : i;
          const bool inside = kMask != Mask::kNone && (in.parts[k] >> i & 1), second = kSets == 2 && inside;
          const Acc m = second ? mean[kSets - 1][c] : mean[0][c], a = second ? slope[kSets - 1][c] : slope[0][c],
                    p = second ? pull[kSets - 1][c] : pull[0][c], q = second ? offset[kSets - 1][c] : offset[0][c];
          // Nothing comes to padding through the statistics.
          const Acc through = kMask == Mask::kPadding && inside ? Acc(0) : p * (widen(in.packs[k][1].v[i]) - m) + q;
          narrow(a * widen(in.packs[k][0].v[i]) + through, &out.v[i]);
        }
        store_pack(dx + in.at[k], out);
      }
    });
  }
}

template <class T>
int launch(const StatGroups& stat_groups, const void* grad_y, const void* given, void* grad_x,
           const BackwardFinish<AccOf<T>>& finish, void* stream) {
  return with_layout<T>(stat_groups, {grad_y, given, grad_x}, [&](auto pack, auto planes) {
    constexpr int V = decltype(pack)::value;
    constexpr bool kPlanes = decltype(planes)::value;
    const StatGroupGrid grid(stat_groups, V);
    const dim3 block = ColumnGrid::block();
    const T *dy = static_cast<const T*>(grad_y), *x = static_cast<const T*>(given);
    T* dx = static_cast<T*>(grad_x);
    if (const int error = clear_counters(finish.workspace, stat_groups, stream)) return error;
    with_sets(stat_groups, [&](auto mask) {
      NF_LAUNCH((stat_group_gradient_sums<T, V, kPlanes, mask.value>), grid.grid(), block, stream, stat_groups, dy, x,
                finish, grid.team, grid.width);
    });
    with_mask(stat_groups, [&](auto mask) {
      NF_LAUNCH((stat_group_gradient<T, V, kPlanes, mask.value>), grid.grid(), block, stream, stat_groups, dy, x, dx,
                finish.workspace, grid.team, grid.width);
    });
    return int(cudaGetLastError());
  });
}

}  // namespace
}  // namespace cuda

int run_cuda(const BatchNormBackward& args, void* workspace, void* stream) {
  const cuda::StatGroupWorkspace w = cuda::lay_out_workspace(workspace, args.stat_groups);
  return cuda::with_element_type(args.stat_groups.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.stat_groups, args.grad_y, args.x, args.grad_x, {args, {}, w}, stream);
  });
}

int run_cuda(const MovingAverageBackward& args, void* workspace, void* stream) {
  const cuda::StatGroupWorkspace w = cuda::lay_out_workspace(workspace, args.stat_groups);
  return cuda::with_element_type(args.stat_groups.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.stat_groups, args.grad_y, args.x, args.grad_x, {{}, args, w}, stream);
  });
}

}  // namespace normfuse
