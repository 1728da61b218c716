// Batch normalisation and its kin, backward; cell_math.h has the algebra.
//   cell_gradient_sums  sums of dy and dy (x - mean) over every cell; gradients of gain and shift, slope, pull and offset.
//                       Reads dy and x.
//   cell_gradient       dx = slope dy + pull (x - mean) + offset. Reads dy and x backwards, from L2 first, and writes dx.
// Tensors moved: 5, of which two come from L2 as far as it reaches.
#include "cells.cuh"

namespace normfuse {
namespace cuda {
namespace {

// What cell_gradient_sums reads, and leaves for cell_gradient, [groups, sets, channels] each.
template <class Acc>
struct BackwardVectors {
  Acc *mean, *slope, *pull, *offset;

  __device__ BackwardVectors(const CellWorkspace& workspace, const Cells& cells) {
    const int64_t size = cells.groups() * cells.sets() * cells.channels;
    mean = static_cast<Acc*>(workspace.vectors);
    slope = mean + size;
    pull = slope + size;
    offset = pull + size;
  }
};

// Of batch normalisation, or where `a.x` is null of the moving average, whose mean is 0.
template <class Acc>
struct BackwardFinish {
  BatchNormBackward a;
  MovingAverageBackward moving;
  CellWorkspace workspace;

  __device__ Acc mean(int64_t cell) const { return a.x ? static_cast<const Acc*>(a.stats)[cell] : Acc(0); }

  __device__ void operator()(int64_t group, int64_t set, int64_t c, const GradientSums<Acc>& sums) const {
    if (!a.x) return move_average(c, sums);
    const int64_t sets = a.cells.sets(), n = a.cells.channels, size = a.cells.groups() * sets * n;
    const int64_t cell = group * sets + set, i = cell * n + c;
    const Acc* stats = static_cast<const Acc*>(a.stats);
    const CellStats<Acc> own{stats[i], stats[size + i], stats[2 * size + i]};
    const auto of = [i](const void* vectors) { return vectors ? static_cast<const Acc*>(vectors)[i] : Acc(0); };
    const auto k = gradient_of_cell<Acc>(own, number_of<Acc>(a.weight, group, set, c),
                                         a.shortcut ? *static_cast<const Acc*>(a.shortcut) : Acc(0), sums.dy, sums.dyd,
                                         of(a.grad_mean), of(a.grad_var), a.estimated ? 0 : a.count[cell], a.correction,
                                         Acc(a.floor));
    static_cast<Acc*>(a.grad_weight)[i] = sums.dyd * own.inv_std;
    static_cast<Acc*>(a.grad_bias)[i] = sums.dy;
    const BackwardVectors<Acc> vectors(workspace, a.cells);
    vectors.mean[i] = own.mean;
    vectors.slope[i] = k.slope;
    vectors.pull[i] = k.pull;
    vectors.offset[i] = k.offset;
  }

  __device__ void move_average(int64_t c, const GradientSums<Acc>& sums) const {
    const int64_t n = moving.cells.channels, count = moving.cells.samples * moving.cells.positions;
    const Acc* stats = static_cast<const Acc*>(moving.stats);
    const UnifiedStats<Acc> own{stats[c], stats[n + c]};
    const Acc weight = static_cast<const Acc*>(moving.weight)[c], weight_gradient = own.r * own.inv_std * sums.dyd;
    const Acc m = mean_or(weight * weight_gradient, count, Acc(0));
    const auto k = moving_average_backward_channel(*moving.step, moving.window, moving.warmup_iters, m, weight, own,
                                                   static_cast<Acc*>(moving.buffer_gz) + c, n);
    static_cast<Acc*>(moving.grad_weight)[c] = weight_gradient;
    static_cast<Acc*>(moving.grad_bias)[c] = sums.dy;
    const BackwardVectors<Acc> vectors(workspace, moving.cells);
    vectors.mean[c] = vectors.offset[c] = 0;
    vectors.slope[c] = k.slope;
    vectors.pull[c] = -k.pull;
  }
};

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_gradient_sums(Cells cells, const T* dy, const T* x, BackwardFinish<AccOf<T>> finish, int team, int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = cells.groups();
  CellPlace<T, V, kPlanes> place(cells, team, width);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    Acc mean[kSets][place.kCells] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kCells; ++i)
        if (place.channel + i < cells.channels) mean[s][i] = finish.mean(place.cell(s, place.channel + i));
    GradientSums<Acc> sums[kSets][place.kCells] = {};
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
    finish_cells<kPlanes>(place, sums, finish.workspace, [&](int64_t c, const GradientSums<Acc>(&found)[kSets]) {
#pragma unroll
      for (int s = 0; s < kSets; ++s) finish(g, s, c, found[s]);
    });
  }
}

template <class T, int V, bool kPlanes, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_gradient(Cells cells, const T* dy, const T* x, T* dx, CellWorkspace workspace, int team, int width) {
  using Acc = AccOf<T>;
  constexpr int kSets = sets_of(kMask);
  const int64_t groups = cells.groups();
  const BackwardVectors<Acc> vectors(workspace, cells);
  CellPlace<T, V, kPlanes> place(cells, team, width);
  for (int64_t g = blockIdx.z; g < groups; g += gridDim.z) {
    place.enter(g);
    Acc mean[kSets][place.kCells] = {}, slope[kSets][place.kCells] = {}, pull[kSets][place.kCells] = {},
        offset[kSets][place.kCells] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < place.kCells; ++i)
        if (place.channel + i < cells.channels) {
          const int64_t cell = place.cell(s, place.channel + i);
          mean[s][i] = vectors.mean[cell];
          slope[s][i] = vectors.slope[cell];
          pull[s][i] = vectors.pull[cell];
          offset[s][i] = vectors.offset[cell];
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
int launch(const Cells& cells, const void* grad_y, const void* given, void* grad_x,
           const BackwardFinish<AccOf<T>>& finish, void* stream) {
  return with_layout<T>(cells, {grad_y, given, grad_x}, [&](auto pack, auto planes) {
    constexpr int V = decltype(pack)::value;
    constexpr bool kPlanes = decltype(planes)::value;
    const CellGrid grid(cells, V);
    const dim3 block = ColumnGrid::block();
    const T *dy = static_cast<const T*>(grad_y), *x = static_cast<const T*>(given);
    T* dx = static_cast<T*>(grad_x);
    if (const int error = clear_counters(finish.workspace, cells, stream)) return error;
    const auto sums = [&](auto mask) {
      NF_LAUNCH((cell_gradient_sums<T, V, kPlanes, mask.value>), grid.grid(), block, stream, cells, dy, x, finish,
                grid.team, grid.width);
    };
    if (cells.sets() == 2)
      sums(MaskIs<Mask::kRegions>());
    else
      sums(MaskIs<Mask::kNone>());
    const auto gradient = [&](auto mask) {
      NF_LAUNCH((cell_gradient<T, V, kPlanes, mask.value>), grid.grid(), block, stream, cells, dy, x, dx,
                finish.workspace, grid.team, grid.width);
    };
    if (!cells.mask)
      gradient(MaskIs<Mask::kNone>());
    else if (cells.regions)
      gradient(MaskIs<Mask::kRegions>());
    else
      gradient(MaskIs<Mask::kPadding>());
    return int(cudaGetLastError());
  });
}

}  // namespace
}  // namespace cuda

int batch_norm_backward_cuda(const BatchNormBackward& args, void* workspace, void* stream) {
  const cuda::CellWorkspace w = cuda::lay_out_workspace(workspace, args.cells);
  return cuda::with_element_type(args.cells.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.cells, args.grad_y, args.x, args.grad_x, {args, {}, w}, stream);
  });
}

int moving_average_backward_cuda(const MovingAverageBackward& args, void* workspace, void* stream) {
  const cuda::CellWorkspace w = cuda::lay_out_workspace(workspace, args.cells);
  return cuda::with_element_type(args.cells.dtype, [&](auto t) {
    using T = decltype(t);
    return cuda::launch<T>(args.cells, args.grad_y, args.x, args.grad_x, {{}, args, w}, stream);
  });
}

}  // namespace normfuse
