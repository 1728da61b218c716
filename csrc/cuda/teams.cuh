// Rows kept on chip. A team of threads, one warp of eight in a block or a whole block of 4 or 16 warps, holds a
// row in registers: member i has the packs i, i + size, ... of V channels, 16 bytes each or one channel where rows
// are not aligned for that. A row is then read once, whatever its statistics need. With groups a team holds the
// part of the row that one group of channels makes up; blockIdx.x is the group.
//
// The teams of all blocks stride over the rows. Column sums are added in the members' registers over the team's
// rows, over the block's teams, and written to partial[row block][channels]; a second kernel adds those. Every
// order is fixed: two runs on the same device give the same bits.
#pragma once
#include "columns.cuh"
#include "rows.cuh"

namespace normfuse::cuda {

constexpr int kWarpsWithSums = 16;  // resident on a multiprocessor, where column sums take many registers
constexpr int kWarpsWithoutSums = 32;

template <class T, int V, int kWarps>
struct Team {
  static constexpr int kSize = kLanes * kWarps;
  static constexpr int kPerBlock = kWarps == 1 ? kThreadRows : 1;
  static constexpr int kBlockThreads = kSize * kPerBlock;
  // That a member holds: 16 floats or 8 doubles; half of that one by one, as their addresses take registers too.
  static constexpr int kPacks = (V == 1 ? 32 : 64) / int(sizeof(AccOf<T>)) / V;
  static constexpr int64_t kCapacity = int64_t(kPacks) * kSize * V;
  using Packs = Pack<T, V>[kPacks];

  // Blocks on a multiprocessor that has so many warps.
  static constexpr int resident(int warps) { return warps * kLanes / kBlockThreads; }

  int64_t rows, channels;
  int64_t begin, width;  // the channels of the group
  int member;
  int64_t first, stride;  // the team's rows

  __device__ Team(int64_t rows, int64_t channels, int64_t width)
      : rows(rows),
        channels(channels),
        begin(int64_t(blockIdx.x) * width),
        width(width),
        member(kWarps == 1 ? threadIdx.x : threadIdx.y * kLanes + threadIdx.x),
        first(int64_t(blockIdx.y) * kPerBlock + (kWarps == 1 ? threadIdx.y : 0)),
        stride(int64_t(gridDim.y) * kPerBlock) {}

  // use(p, c) for each of this member's packs, c its first channel.
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t within = (int64_t(p) * kSize + member) * V;
      if (within < width) use(p, begin + within);
    }
  }
  __device__ __forceinline__ void load(const void* matrix, int64_t row, Packs& packs) const {
    const T* from = static_cast<const T*>(matrix) + row * channels;
    each([&](int p, int64_t c) { packs[p] = load_pack<T, V>(from + c); });
  }
  __device__ __forceinline__ void store(void* matrix, int64_t row, int64_t c, const Pack<T, V>& pack) const {
    store_pack(static_cast<T*>(matrix) + row * channels + c, pack);
  }

  // Adds values[] over the team, for every member.
  template <int kValues, class Acc>
  __device__ __forceinline__ void add(Acc (&values)[kValues]) const {
#pragma unroll
    for (int k = 0; k < kValues; ++k) values[k] = add_lanes(values[k]);
    if constexpr (kWarps > 1) {
      NF_SHARED(Acc, shared, kValues * kWarps);
      __syncthreads();  // earlier readers are done
      if (threadIdx.x == 0)
#pragma unroll
        for (int k = 0; k < kValues; ++k) shared[k * kWarps + threadIdx.y] = values[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        values[k] = 0;
        for (int w = 0; w < kWarps; ++w) values[k] += shared[k * kWarps + w];
      }
    }
  }

  // partial[s][blockIdx.y][channels] gets the sums of the block's teams.
  template <int kSums, class Acc>
  __device__ __forceinline__ void write_partial(const Acc (&sums)[kSums][kPacks][V], Acc* partial) const {
    const int64_t size = int64_t(gridDim.y) * channels, at = int64_t(blockIdx.y) * channels + begin;
    if constexpr (kWarps > 1) {
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        each([&](int p, int64_t c) {
#pragma unroll
          for (int i = 0; i < V; ++i) partial[s * size + at - begin + c + i] = sums[s][p][i];
        });
    } else {
      NF_SHARED(Acc, shared, kThreads * V);
      const int thread = threadIdx.y * kLanes + threadIdx.x;
#pragma unroll
      for (int s = 0; s < kSums; ++s)
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (int64_t(p) * kLanes * V >= width) break;
          const Acc sum = add_thread_rows(sums[s][p], shared);
          const int64_t within = int64_t(p) * kLanes * V + thread;
          if (thread < kLanes * V && within < width) partial[s * size + at + within] = sum;
        }
    }
  }
};

// A grid of resident blocks only: they keep column sums, and the more blocks, the more is left to add.
template <class Team>
dim3 team_grid(int64_t rows, int64_t groups, int warps) {
  const int64_t useful = (rows + Team::kPerBlock - 1) / Team::kPerBlock;
  int64_t row_blocks = int64_t(Team::resident(warps)) * multiprocessors() / groups;
  if (row_blocks > useful) row_blocks = useful;
  return dim3(unsigned(groups), unsigned(row_blocks < 1 ? 1 : row_blocks));
}
template <class Team>
dim3 team_block() {
  return dim3(kLanes, Team::kBlockThreads / kLanes);
}

// Calls run(number of warps) for the smallest team that holds `width` channels; false where none does.
template <class T, int V, class Run>
bool with_team(int64_t width, const Run& run) {
  if (width <= Team<T, V, 1>::kCapacity)
    run(std::integral_constant<int, 1>{});
  else if (width <= Team<T, V, 4>::kCapacity)
    run(std::integral_constant<int, 4>{});
  else if (width <= Team<T, V, 16>::kCapacity)
    run(std::integral_constant<int, 16>{});
  else
    return false;
  return true;
}

// The same for groups of channels, which may also be too narrow to keep a warp busy.
template <class T, int V, class Run>
bool with_group_team(int64_t width, const Run& run) {
  return width >= kLanes / 2 * V && with_team<T, V>(width, run);
}

// The grid that adds what write_partial left: a block of kThreads for kLanes channels.
inline dim3 partial_grid(int64_t channels) { return dim3(unsigned((channels + kLanes - 1) / kLanes)); }

// finish(channel, sums) once per channel, with the sums over row_blocks blocks.
template <int kSums, class Acc, class Finish>
__device__ __forceinline__ void add_partial(const Acc* partial, int64_t row_blocks, int64_t channels,
                                            const Finish& finish) {
  NF_SHARED(Acc, shared, kThreads);
  const int64_t column = int64_t(blockIdx.x) * kLanes + threadIdx.x;
  Acc sums[kSums];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    Acc added[1] = {0};
    if (column < channels)
      for (int64_t b = threadIdx.y; b < row_blocks; b += kThreadRows)
        added[0] += partial[(s * row_blocks + b) * channels + column];
    sums[s] = add_thread_rows(added, shared);
  }
  const int64_t channel = finished_channel<1>(channels);
  if (channel < channels) finish(channel, sums);
}

// V neighbouring numbers of a vector in words of 16 bytes, or what stands for a vector that is not there.
template <int V, class Acc>
__device__ __forceinline__ Pack<Acc, V> load_vector(const void* vector, int64_t c, Acc otherwise) {
  Pack<Acc, V> result;
  if (vector) {
    constexpr int kWord = V * sizeof(Acc) < 16 ? V : 16 / sizeof(Acc);
#pragma unroll
    for (int i = 0; i < V; i += kWord) {
      const auto word = load_pack<Acc, kWord>(static_cast<const Acc*>(vector) + c + i);
#pragma unroll
      for (int j = 0; j < kWord; ++j) result.v[i + j] = word.v[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) result.v[i] = otherwise;
  }
  return result;
}

}  // namespace normfuse::cuda
