// The grids and the device memory of the kernels over cells.
#include "cells.cuh"

namespace normfuse {
namespace cuda {
namespace {

constexpr size_t kAlign = 256;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
size_t acc_bytes(const Cells& cells) { return cells.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }
size_t vectors_of(const Cells& cells) { return size_t(cells.groups()) * cells.sets() * cells.channels; }

// Bounds for packs of any size.
size_t most(const Cells& cells, int64_t CellGrid::* number) {
  size_t result = 1;
  for (const int pack : {1, 2, 4, 8}) {
    const size_t found = size_t(CellGrid(cells, pack).*number);
    if (found > result) result = found;
  }
  return result;
}
size_t counter_bytes(const Cells& cells) {
  return aligned((cells.groups() + 1) * most(cells, &CellGrid::tiles) * sizeof(unsigned));
}
size_t partial_bytes(const Cells& cells) {
  return aligned(vectors_of(cells) * most(cells, &CellGrid::splits) * (sizeof(int64_t) + 2 * acc_bytes(cells)));
}

}  // namespace

CellGrid::CellGrid(const Cells& cells, int pack) : groups(cells.groups()) {
  const bool planes = cells.positions > 1;
  const int64_t packs = cells.positions / pack, most_samples = cells.samples - (groups - 1) * cells.group_size;
  team = packs >= kThreads ? kThreads : kLanes;
  width = planes ? kThreads / team : kLanes * pack;
  tiles = (cells.channels + width - 1) / width;
  const int64_t piece = int64_t(team) * kUnroll * kPieceRounds;
  const int64_t useful =
      planes ? most_samples * ((packs + piece - 1) / piece) : (most_samples + kThreadRows - 1) / kThreadRows;
  splits = kBlocksPerMultiprocessor * multiprocessors() / (tiles * groups);
  if (splits > useful) splits = useful;
  if (splits < 1) splits = 1;
}

CellWorkspace lay_out_workspace(void* memory, const Cells& cells) {
  char* at = static_cast<char*>(memory);
  CellWorkspace w;
  w.blocks_done = reinterpret_cast<unsigned*>(at);
  w.partial = at += counter_bytes(cells);
  w.vectors = at + partial_bytes(cells);
  return w;
}

int clear_counters(const CellWorkspace& workspace, const Cells& cells, void* stream) {
  return cudaMemsetAsync(workspace.blocks_done, 0, counter_bytes(cells), static_cast<cudaStream_t>(stream));
}

}  // namespace cuda

size_t cuda_workspace_bytes(const Cells& cells) {
  using namespace cuda;
  return counter_bytes(cells) + partial_bytes(cells) + aligned(4 * vectors_of(cells) * acc_bytes(cells));
}

}  // namespace normfuse
