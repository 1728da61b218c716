// The grids and the device memory of the kernels over statistics groups.
#include "stat_groups.cuh"

namespace normfuse {
namespace cuda {
namespace {

size_t vectors_of(const StatGroups& stat_groups) {
  return size_t(stat_groups.groups()) * stat_groups.sets() * stat_groups.channels;
}

// Bounds for packs of any size.
size_t most(const StatGroups& stat_groups, int64_t StatGroupGrid::* number) {
  size_t result = 1;
  for (const int pack : {1, 2, 4, 8}) {
    const size_t found = size_t(StatGroupGrid(stat_groups, pack).*number);
    if (found > result) result = found;
  }
  return result;
}
size_t counter_bytes(const StatGroups& stat_groups) {
  return aligned((stat_groups.groups() + 1) * most(stat_groups, &StatGroupGrid::tiles) * sizeof(unsigned));
}
size_t partial_bytes(const StatGroups& stat_groups) {
  return aligned(vectors_of(stat_groups) * most(stat_groups, &StatGroupGrid::splits) *
                 (sizeof(int64_t) + 2 * acc_bytes(stat_groups.dtype)));
}

}  // namespace

StatGroupGrid::StatGroupGrid(const StatGroups& stat_groups, int pack) : groups(stat_groups.groups()) {
  const bool planes = stat_groups.positions > 1;
  const int64_t packs = stat_groups.positions / pack,
                most_samples = stat_groups.samples - (groups - 1) * stat_groups.group_size;
  team = packs >= kThreads ? kThreads : kLanes;
  width = planes ? kThreads / team : kLanes * pack;
  tiles = (stat_groups.channels + width - 1) / width;
  const int64_t piece = int64_t(team) * kUnroll * kPieceRounds;
  const int64_t useful =
      planes ? most_samples * ((packs + piece - 1) / piece) : (most_samples + kThreadRows - 1) / kThreadRows;
  splits = kBlocksPerMultiprocessor * multiprocessors() / (tiles * groups);
  if (splits > useful) splits = useful;
  if (splits < 1) splits = 1;
}

StatGroupWorkspace lay_out_workspace(void* memory, const StatGroups& stat_groups) {
  char* at = static_cast<char*>(memory);
  StatGroupWorkspace w;
  w.blocks_done = reinterpret_cast<unsigned*>(at);
  w.partial = at += counter_bytes(stat_groups);
  w.vectors = at + partial_bytes(stat_groups);
  return w;
}

int clear_counters(const StatGroupWorkspace& workspace, const StatGroups& stat_groups, void* stream) {
  return cudaMemsetAsync(workspace.blocks_done, 0, counter_bytes(stat_groups), static_cast<cudaStream_t>(stream));
}

}  // namespace cuda

size_t cuda_workspace_bytes(const StatGroups& stat_groups) {
  using namespace cuda;
  return counter_bytes(stat_groups) + partial_bytes(stat_groups) +
         aligned(4 * vectors_of(stat_groups) * acc_bytes(stat_groups.dtype));
}

}  // namespace normfuse
