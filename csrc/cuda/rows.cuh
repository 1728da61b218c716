// What the group scaling of Power Norm needs: sums over segments, the channels of one group in one row, and
// their factors on the way through the columns. A warp (a row of threads of the block) takes one segment at a time.
#pragma once
#include "columns.cuh"

namespace normfuse::cuda {

constexpr int kSegmentBlocksPerMultiprocessor = 4;

inline dim3 segment_grid(int64_t segments) {
  const int64_t useful = (segments + kThreadRows - 1) / kThreadRows;
  const int64_t resident = int64_t(kSegmentBlocksPerMultiprocessor) * multiprocessors();
  return dim3(unsigned(useful < resident ? useful : resident));
}

template <class Body>
__device__ __forceinline__ void for_each_segment(int64_t segments, const Body& body) {
  for (int64_t segment = int64_t(blockIdx.x) * kThreadRows + threadIdx.y; segment < segments;
       segment += int64_t(gridDim.x) * kThreadRows)
    body(segment);
}

// use(channel, packs) on this lane's packs of the segment.
template <class T, int V, int kMatrices, class Use>
__device__ __forceinline__ void walk_segment(const T* const (&segments)[kMatrices], int64_t width, const Use& use) {
  for (int64_t c = int64_t(threadIdx.x) * V; c < width; c += kLanes * V) {
    Pack<T, V> packs[kMatrices];
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) packs[m] = *reinterpret_cast<const Pack<T, V>*>(segments[m] + c);
    use(c, packs);
  }
}

template <class Acc>
__device__ __forceinline__ Acc add_lanes(Acc value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The value of a row for the group of one channel, out of [rows, group_num]; without groups the same for all.
template <class Acc>
struct RowFactor {
  const Acc* values;
  int64_t groups;
  Acc otherwise;

  __device__ RowFactor(const void* rows, int64_t groups, int64_t channels, int64_t column, Acc otherwise = Acc(1))
      : values(static_cast<const Acc*>(rows) + (groups > 0 ? column / (channels / groups) : 0)),
        groups(groups),
        otherwise(otherwise) {}
  __device__ __forceinline__ Acc operator()(int64_t row) const { return groups > 0 ? values[row * groups] : otherwise; }
};

}  // namespace normfuse::cuda
