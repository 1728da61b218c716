// What the kernels over [samples, channels, positions], parted into statistics groups (StatGroups in kernels.h), share.
// Two layouts:
//
//   rows    one position: a sample is a row, a thread of 32 lanes x 8 rows keeps V neighbouring channels and walks down
//           the samples, as in columns.cuh;
//   planes  a statistics group has planes of `positions` numbers, one in each of its samples: a team of 32 or 256
//           threads walks along the planes of one channel, V neighbouring positions at a time.
//
// blockIdx.x is the tile of channels, blockIdx.z the group of samples; blockIdx.y strides over the samples (of planes,
// over pieces of them) together with the other blocks of the statistics group. What is added over a statistics group is
// added in registers, over the block, written to partial[group][block][set][channel], and added by the last block of the
// tile to finish. Every order is fixed: two runs on the same device give the same bits.
#pragma once
#include "columns.cuh"

namespace normfuse::cuda {

constexpr int kPieceRounds = 4;  // that a team needs for a piece of a plane, kUnroll packs a thread in each

// Blocks on a multiprocessor: doubles may take the registers of two.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 1 : kBlocksPerMultiprocessor;

struct StatGroupGrid {
  int team;   // threads of one statistics group, in planes
  int width;  // channels of a tile
  int64_t tiles;
  int64_t splits;  // blocks of a statistics group
  int64_t groups;

  StatGroupGrid(const StatGroups& stat_groups, int pack);
  dim3 grid() const {
    constexpr int64_t kMostGroups = 65535;
    return dim3(unsigned(tiles), unsigned(splits), unsigned(groups < kMostGroups ? groups : kMostGroups));
  }
};

// Where one launch sequence keeps its intermediate values.
struct StatGroupWorkspace {
  unsigned* blocks_done;  // [groups, tiles], then groups done [tiles]; zero at the launch
  void* partial;          // [groups, splits, sets, channels]
  void* vectors;          // acc [4, groups, sets, channels]
};

StatGroupWorkspace lay_out_workspace(void* memory, const StatGroups& stat_groups);
int clear_counters(const StatGroupWorkspace& workspace, const StatGroups& stat_groups, void* stream);

// The four vectors under the names that a pass gives them.
template <template <class> class Vectors, class Acc>
__device__ __forceinline__ Vectors<Acc> vectors_in(const StatGroupWorkspace& workspace, const StatGroups& stat_groups) {
  const int64_t size = stat_groups.groups() * stat_groups.sets() * stat_groups.channels;
  Acc* const first = static_cast<Acc*>(workspace.vectors);
  return {first, first + size, first + 2 * size, first + 3 * size};
}

template <class Acc>
__device__ __forceinline__ Acc number_of(const PerStatGroup& vectors, int64_t group, int64_t set, int64_t channel) {
  return static_cast<const Acc*>(vectors.data)[group * vectors.group_stride + set * vectors.set_stride + channel];
}

// Calls run(V, planes) for the packs and the layout of these matrices.
template <class T, class Run>
int with_layout(const StatGroups& stat_groups, std::initializer_list<const void*> matrices, const Run& run) {
  const bool planes = stat_groups.positions > 1;
  const bool pack = can_pack<T>(planes ? stat_groups.positions : stat_groups.channels, matrices);
  constexpr int kPack = kWidePack<T>;
  if (planes)
    return pack ? run(std::integral_constant<int, kPack>{}, std::true_type{})
                : run(std::integral_constant<int, 1>{}, std::true_type{});
  return pack ? run(std::integral_constant<int, kPack>{}, std::false_type{})
              : run(std::integral_constant<int, 1>{}, std::false_type{});
}

// What the mask is to a kernel.
enum class Mask { kNone, kPadding, kRegions };

template <Mask kMask>
using MaskIs = std::integral_constant<Mask, kMask>;

constexpr __host__ __device__ int sets_of(Mask mask) { return mask == Mask::kRegions ? 2 : 1; }

// Calls run(mask) for a kernel that needs to know regions only.
template <class Run>
void with_sets(const StatGroups& stat_groups, const Run& run) {
  if (stat_groups.sets() == 2)
    run(MaskIs<Mask::kRegions>());
  else
    run(MaskIs<Mask::kNone>());
}

// Calls run(mask) for a kernel that padding matters to as well.
template <class Run>
void with_mask(const StatGroups& stat_groups, const Run& run) {
  if (stat_groups.mask && !stat_groups.regions)
    run(MaskIs<Mask::kPadding>());
  else
    with_sets(stat_groups, run);
}

// Numbers that a thread has loaded together: `at` of the first matrix element, negative where there is none, and bit i of
// `parts` the mask of pack element i. What is kept for the channels of wide packs, for doubles, for the mask and for a
// second set leaves registers for fewer.
template <class T, int V, int kMatrices, Mask kMask>
struct Batch {
  static constexpr int kWide = V == 8 || sizeof(T) == 8 ? kMatrices : 1;
  static constexpr int kFewer = kWide * sets_of(kMask) * (kMask == Mask::kNone ? 1 : V == 8 ? 2 : kMatrices);
  static constexpr int kPacks = kFewer < kUnroll ? kUnroll / kFewer : 1;
  Pack<T, V> packs[kPacks][kMatrices];
  int64_t at[kPacks];
  unsigned parts[kPacks];
};

// The part of a group that one thread works on.
template <class T, int V, bool kPlanes>
struct StatGroupPlace {
  static constexpr int kStatGroups = kPlanes ? 1 : V;  // channels of a thread

  StatGroups stat_groups;
  int thread, team, member;  // member: among the threads that work on the same channels
  int members;
  int64_t channel;              // the first
  int64_t finished;             // the channel whose sums this thread gets, or `channels` if it has none
  int64_t group, first, count;  // the samples of the group

  __device__ StatGroupPlace(const StatGroups& stat_groups, int team, int width) : stat_groups(stat_groups), team(team) {
    thread = threadIdx.y * kLanes + threadIdx.x;
    members = kPlanes ? team : kThreadRows;
    member = kPlanes ? thread % team : threadIdx.y;
    const int64_t tile = int64_t(blockIdx.x) * width;
    channel = tile + (kPlanes ? thread / team : threadIdx.x * V);
    finished = thread < width && tile + thread < stat_groups.channels ? tile + thread : stat_groups.channels;
  }

  __device__ void enter(int64_t g) {
    group = g;
    first = g * stat_groups.group_size;
    count = (g == stat_groups.groups() - 1 ? stat_groups.samples : first + stat_groups.group_size) - first;
  }
  __device__ int64_t stat_group(int64_t set, int64_t c) const {
    return (group * stat_groups.sets() + set) * stat_groups.channels + c;
  }

  // use(batch) on everything this thread has; kBack: from the last to the first, which L2 may still have.
  template <Mask kMask, bool kBack, int kMatrices, class Use>
  __device__ __forceinline__ void walk(const T* const (&matrices)[kMatrices], const Use& use) const {
    if (channel >= stat_groups.channels) return;
    constexpr int kPacks = Batch<T, V, kMatrices, kMask>::kPacks;
    if constexpr (kPlanes) {
      const int64_t packs = stat_groups.positions / V, piece = int64_t(team) * kUnroll * kPieceRounds;
      const int64_t pieces = (packs + piece - 1) / piece, units = count * pieces;
      const int64_t mine = blockIdx.y < units ? (units - 1 - blockIdx.y) / gridDim.y + 1 : 0;
#pragma unroll 1
      for (int64_t i = 0; i < mine; ++i) {
        const int64_t unit = blockIdx.y + (kBack ? mine - 1 - i : i) * gridDim.y;
        const int64_t sample = first + unit / pieces, begin = unit % pieces * piece;
        const int64_t end = begin + piece < packs ? begin + piece : packs;
#pragma unroll 1
        for (int64_t pack = begin + member; pack < end; pack += int64_t(team) * kPacks)
          visit<kMask>(matrices, use, pack, team, end, V,
                       (sample * stat_groups.channels + channel) * stat_groups.positions,
                       sample * stat_groups.positions);
      }
    } else {
      const int64_t start = int64_t(blockIdx.y) * kThreadRows + threadIdx.y, stride = int64_t(gridDim.y) * kThreadRows,
                    jump = kPacks * stride;
      const int64_t mine = start < count ? (count - 1 - start) / jump + 1 : 0;
#pragma unroll 1
      for (int64_t i = 0; i < mine; ++i)
        visit<kMask>(matrices, use, start + (kBack ? mine - 1 - i : i) * jump, stride, count, stat_groups.channels,
                     first * stat_groups.channels + channel, first);
    }
  }

 private:
  // Packs index, index + stride, ... < end, which lie at base + index * step; their mask at mask_base + index * step in
  // planes, one number for the whole pack in rows.
  template <Mask kMask, int kMatrices, class Use>
  __device__ __forceinline__ void visit(const T* const (&matrices)[kMatrices], const Use& use, int64_t index,
                                        int64_t stride, int64_t end, int64_t step, int64_t base,
                                        int64_t mask_base) const {
    Batch<T, V, kMatrices, kMask> batch;
#pragma unroll
    for (int k = 0; k < batch.kPacks; ++k) {
      const int64_t i = index + k * stride;
      batch.at[k] = i < end ? base + i * step : -1;
      batch.parts[k] = 0;
      if (i >= end) continue;
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) batch.packs[k][m] = load_pack<T, V>(matrices[m] + batch.at[k]);
      if constexpr (kMask != Mask::kNone) {
        if constexpr (kPlanes) {
#pragma unroll
          for (int v = 0; v < V; ++v) batch.parts[k] |= unsigned(stat_groups.mask[mask_base + i * V + v]) << v;
        } else if (stat_groups.mask[mask_base + i]) {
          batch.parts[k] = ~0u;
        }
      }
    }
    use(batch);
  }
};

template <class Acc>
__device__ __forceinline__ Moments<Acc> from_lane(const Moments<Acc>& value, int distance) {
  return {__shfl_xor_sync(0xffffffffu, value.count, distance), __shfl_xor_sync(0xffffffffu, value.mean, distance),
          __shfl_xor_sync(0xffffffffu, value.squares, distance)};
}
template <class Acc>
__device__ __forceinline__ GradientSums<Acc> from_lane(const GradientSums<Acc>& value, int distance) {
  return {__shfl_xor_sync(0xffffffffu, value.dy, distance), __shfl_xor_sync(0xffffffffu, value.dyd, distance)};
}
template <class Acc>
__device__ __forceinline__ Moments<Acc> from_l2(const Moments<Acc>* value) {
  return {__ldcg(&value->count), __ldcg(&value->mean), __ldcg(&value->squares)};
}
template <class Acc>
__device__ __forceinline__ GradientSums<Acc> from_l2(const GradientSums<Acc>* value) {
  return {__ldcg(&value->dy), __ldcg(&value->dyd)};
}

// Adds over the threads that work on the same channels. Thread i of the block gets the sum of the tile's i-th channel.
// Loops that run once per block are not unrolled: code for them would only take time to compile.
template <class Place, class Value>
__device__ __forceinline__ Value add_members(const Place& place, const Value (&values)[Place::kStatGroups], bool planes,
                                             Value* shared) {
  __syncthreads();  // earlier readers of shared are done
  Value sum = values[0];
  if (planes) {
#pragma unroll 1
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum.add(from_lane(sum, distance));
    if (threadIdx.x == 0) shared[threadIdx.y] = sum;
    __syncthreads();
    const int warps = place.team / kLanes;
    if (place.thread * warps < kThreadRows) {
      sum = shared[place.thread * warps];
#pragma unroll 1
      for (int w = 1; w < warps; ++w) sum.add(shared[place.thread * warps + w]);
    }
  } else {
    constexpr int V = Place::kStatGroups;
#pragma unroll
    for (int i = 0; i < V; ++i) shared[(threadIdx.y * V + i) * kLanes + threadIdx.x] = values[i];
    __syncthreads();
    if (place.thread < kLanes * V) {
      const int from = place.thread % V * kLanes + place.thread / V;
      sum = shared[from];
#pragma unroll 1
      for (int y = 1; y < kThreadRows; ++y) sum.add(shared[y * V * kLanes + from]);
    }
  }
  return sum;
}

// Completes what is added over statistics groups. In the last block of the tile and group finish(channel, set, sum)
// is called once per channel and set; true there.
template <bool kPlanes, int kSets, class Place, class Value, class Finish>
__device__ __forceinline__ bool finish_stat_groups(const Place& place, const Value (&values)[kSets][Place::kStatGroups],
                                                   const StatGroupWorkspace& workspace, const Finish& finish) {
  NF_SHARED(Value, shared, kPlanes ? kThreadRows : kThreads * Place::kStatGroups);
  const int64_t channels = place.stat_groups.channels;
  Value* partial = static_cast<Value*>(workspace.partial) + place.group * gridDim.y * kSets * channels;
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
    const Value sum = add_members(place, values[s], kPlanes, shared);
    if (place.finished < channels) partial[(int64_t(blockIdx.y) * kSets + s) * channels + place.finished] = sum;
  }
  if (!is_last(workspace.blocks_done + place.group * gridDim.x + blockIdx.x, gridDim.y)) return false;

#pragma unroll 1
  for (int s = 0; s < kSets; ++s) {
    Value added[Place::kStatGroups] = {};
#pragma unroll 1
    for (int64_t b = place.member; b < gridDim.y; b += place.members)
#pragma unroll
      for (int i = 0; i < Place::kStatGroups; ++i)
        if (place.channel + i < channels)
          added[i].add(from_l2(partial + (b * kSets + s) * channels + place.channel + i));
    const Value sum = add_members(place, added, kPlanes, shared);
    if (place.finished < channels) finish(place.finished, s, sum);
  }
  return true;
}

}  // namespace normfuse::cuda
