// The device memory of one launch sequence: counters, partial sums, per-channel vectors, per-row values.
#include "teams.cuh"

namespace normfuse {
namespace cuda {
namespace {

// Blocks per multiprocessor that leave column sums; the smallest blocks, of four warps, are the most.
constexpr int kMostBlocksWithSums = kWarpsWithSums / 4;
static_assert(2 * kMostBlocksWithSums >= kMostColumnSums * kBlocksPerMultiprocessor);

// Bounds for packs of any size: the scalar path has the most tiles, one tile has the most row blocks.
size_t counter_bytes(const Matrix& shape) {
  return aligned((shape.channels + kLanes - 1) / kLanes * sizeof(TileCounters));
}
size_t vector_bytes(const Matrix& shape) { return aligned(2 * shape.channels * acc_bytes(shape.dtype)); }
size_t partial_bytes(const Matrix& shape) {
  return aligned(2 * size_t(kMostBlocksWithSums * multiprocessors()) * shape.channels * acc_bytes(shape.dtype));
}
size_t row_bytes(const Matrix& shape, int64_t group_num) {
  return aligned(shape.rows * group_num * acc_bytes(shape.dtype));
}

}  // namespace

Workspace lay_out_workspace(void* memory, const Matrix& shape) {
  char* at = static_cast<char*>(memory);
  Workspace w;
  w.tiles = reinterpret_cast<TileCounters*>(at);
  w.flag = reinterpret_cast<int*>(at += counter_bytes(shape));
  w.vectors = at += kAlign;
  w.partial = at += vector_bytes(shape);
  w.rows = at + partial_bytes(shape);
  return w;
}

int clear_counters(const Workspace& workspace, const Matrix& shape, void* stream) {
  return cudaMemsetAsync(workspace.tiles, 0, counter_bytes(shape), static_cast<cudaStream_t>(stream));
}

}  // namespace cuda

size_t cuda_workspace_bytes(const Matrix& shape, int64_t group_num) {
  using namespace cuda;
  return counter_bytes(shape) + kAlign + vector_bytes(shape) + partial_bytes(shape) + row_bytes(shape, group_num);
}

}  // namespace normfuse
