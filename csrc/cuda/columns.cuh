// What the kernels over a [rows, channels] matrix share: the tiling, the walk over rows, and sums over columns.
//
// A block has 32 lanes x 8 rows of threads. A lane holds V neighbouring channels in registers: 16 bytes of x,
// or one channel where rows are not aligned for that. blockIdx.x is the tile of 32 V channels, blockIdx.y
// strides over the rows together with the other blocks of its tile, so that all blocks move through memory
// side by side.
//
// A column sum is added in float registers over the block's rows, over the block's 8 threads, written to
// partial[block][channels], and added by the last block of the tile to finish. Every order is fixed: two runs
// on the same device give the same bits.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "../kernels.h"
#include "portable.cuh"

namespace normfuse::cuda {

constexpr int kLanes = 32;
constexpr int kThreadRows = 8;
constexpr int kThreads = kLanes * kThreadRows;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kUnroll = 4;          // rows a thread has in flight
constexpr int kMostColumnSums = 4;  // that finish_columns completes at a time

template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// As one word, because the compiler splits a struct.
template <class T, int V>
__device__ __forceinline__ uint4 word_of(const Pack<T, V>& pack) {
  static_assert(sizeof(pack) == sizeof(uint4));
  uint4 word;
  memcpy(&word, &pack, sizeof(word));
  return word;
}

// Evicted first, to keep in L2 what is read again.
template <class T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (V == 1)
    *to = pack.v[0];
  else
    __stcs(reinterpret_cast<uint4*>(to), word_of(pack));
}

// For a result that is read again.
template <class T, int V>
__device__ __forceinline__ void keep_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (V == 1)
    *to = pack.v[0];
  else
    *reinterpret_cast<uint4*>(to) = word_of(pack);
}

// a + b, rounded to the element type.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> add_packs(const Pack<T, V>& a, const Pack<T, V>& b) {
  Pack<T, V> sum;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(widen(a.v[i]) + widen(b.v[i]), &sum.v[i]);
  return sum;
}

// Per tile of channels, zero at the launch.
struct TileCounters {
  unsigned long long valid_rows;
  unsigned blocks_done;
  unsigned unused;
};

// Every part of a launch sequence's memory begins at a multiple of this.
constexpr size_t kAlign = 256;

inline size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
inline size_t acc_bytes(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

// Where one launch sequence keeps its intermediate values.
struct Workspace {
  TileCounters* tiles;
  int* flag;      // [1]
  void* partial;  // acc [kMostColumnSums, row blocks, channels] of a ColumnGrid, [2, ...] of teams
  void* vectors;  // acc [2, channels]
  void* rows;     // acc [rows, group_num]
};

struct ColumnGrid {
  int64_t tiles;
  int64_t row_blocks;

  ColumnGrid(const Matrix& shape, int pack)
      : tiles((shape.channels + kLanes * pack - 1) / (kLanes * pack)),
        row_blocks(kBlocksPerMultiprocessor * multiprocessors() / tiles) {
    const int64_t useful = (shape.rows + kThreadRows - 1) / kThreadRows;
    if (row_blocks > useful) row_blocks = useful;
    if (row_blocks < 1) row_blocks = 1;
  }
  dim3 grid() const { return dim3(unsigned(tiles), unsigned(row_blocks)); }
  static dim3 block() { return dim3(kLanes, kThreadRows); }
};

Workspace lay_out_workspace(void* memory, const Matrix& shape);

// Sets the counters to zero on the stream.
int clear_counters(const Workspace& workspace, const Matrix& shape, void* stream);

// Numbers in a pack: 16 bytes. float64 is there to check the other types and goes one by one, in half as many kernels.
template <class T>
constexpr int kWidePack = std::is_same_v<T, double> ? 1 : 16 / int(sizeof(T));

// Whether every row of every matrix starts at a pack and no pack crosses a group.
template <class T>
bool can_pack(int64_t group_width, std::initializer_list<const void*> matrices) {
  constexpr int kBytes = kWidePack<T> * int(sizeof(T));
  bool aligned = group_width % kWidePack<T> == 0;
  for (const void* matrix : matrices) aligned = aligned && reinterpret_cast<uintptr_t>(matrix) % kBytes == 0;
  return aligned;
}

// The arguments for the kernels after the one that wrote s = x + residual.
template <class Forward>
Forward with_sum(Forward args) {
  if (args.residual) args.x = args.s;
  args.residual = nullptr;
  return args;
}

// Calls run(T{}) with the element type that dtype names.
template <class Run>
int with_element_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(bfloat16{});
    case DType::kFloat16:
      return run(float16{});
    case DType::kFloat64:
      return run(double{});
  }
  return 1;  // cudaErrorInvalidValue
}

// The same with the channels per thread, as run(T{}, V).
template <class Run>
int with_packs(DType dtype, int64_t group_width, std::initializer_list<const void*> matrices, const Run& run) {
  return with_element_type(dtype, [&](auto t) {
    using T = decltype(t);
    return can_pack<T>(group_width, matrices) ? run(t, std::integral_constant<int, kWidePack<T>>())
                                              : run(t, std::integral_constant<int, 1>());
  });
}

// The number behind a pointer, or 0 where it is null.
template <class Acc>
__device__ __forceinline__ Acc number(const void* given) {
  return given ? *static_cast<const Acc*>(given) : Acc(0);
}

// The part of the matrix that one thread works on.
template <class T, int V>
struct Place {
  int64_t rows, channels;
  int64_t column;  // the first of this thread's V channels
  int64_t first;   // its first row
  int64_t stride;  // from one of its rows to the next
  bool inside;

  __device__ Place(int64_t rows, int64_t channels)
      : rows(rows),
        channels(channels),
        column((int64_t(blockIdx.x) * kLanes + threadIdx.x) * V),
        first(int64_t(blockIdx.y) * kThreadRows + threadIdx.y),
        stride(int64_t(gridDim.y) * kThreadRows),
        inside(column < channels) {}

  __device__ __forceinline__ Pack<T, V> load(const T* matrix, int64_t row) const {
    return load_pack<T, V>(matrix + row * channels + column);
  }
  __device__ __forceinline__ void store(T* matrix, int64_t row, const Pack<T, V>& pack) const {
    store_pack(matrix + row * channels + column, pack);
  }

  __device__ __forceinline__ void keep(T* matrix, int64_t row, const Pack<T, V>& pack) const {
    keep_pack(matrix + row * channels + column, pack);
  }

  // use(row, s) on every row of this thread, with s = x + residual, which is written, or without a residual x.
  template <class Use>
  __device__ __forceinline__ void walk_sum(const void* x, const void* residual, void* s, const Use& use) const {
    if (residual) {
      const T* const operands[] = {static_cast<const T*>(x), static_cast<const T*>(residual)};
      walk<kUnroll / 2>(operands, [&](int64_t row, const Pack<T, V>(&in)[2]) {
        const Pack<T, V> sum = add_packs(in[0], in[1]);
        keep(static_cast<T*>(s), row, sum);
        use(row, sum);
      });
    } else {
      walk({static_cast<const T*>(x)}, [&](int64_t row, const Pack<T, V>(&in)[1]) { use(row, in[0]); });
    }
  }

  // use(row, packs) on every row of this thread; the loads of kRows rows, as registers allow, are issued together.
  template <int kRows = kUnroll, int kMatrices, class Use>
  __device__ __forceinline__ void walk(const T* const (&matrices)[kMatrices], const Use& use) const {
    if (!inside) return;
    for (int64_t begin = first; begin < rows; begin += kRows * stride) visit<kRows>(begin, matrices, use);
  }
  // The same rows from the last to the first: what was read last is still in the L2 cache.
  template <int kRows = kUnroll, int kMatrices, class Use>
  __device__ __forceinline__ void walk_back(const T* const (&matrices)[kMatrices], const Use& use) const {
    if (!inside || first >= rows) return;
    const int64_t jump = kRows * stride;
    for (int64_t begin = first + (rows - 1 - first) / jump * jump; begin >= 0; begin -= jump)
      visit<kRows>(begin, matrices, use);
  }

  // use(row, dy, x, ds) on every row of this thread; ds is null where s has no gradient of its own.
  template <bool kBack, class Use>
  __device__ __forceinline__ void walk_gradients(const void* dy, const void* x, const void* ds, const Use& use) const {
    const T* const operands[] = {static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(ds)};
    const T* const without[] = {operands[0], operands[1]};
    const auto use_three = [&](int64_t row, const Pack<T, V>(&in)[3]) { use(row, in[0], in[1], &in[2]); };
    const auto use_two = [&](int64_t row, const Pack<T, V>(&in)[2]) { use(row, in[0], in[1], nullptr); };
    if (kBack && ds)
      walk_back<kUnroll / 2>(operands, use_three);
    else if (ds)
      walk<kUnroll / 2>(operands, use_three);
    else if (kBack)
      walk_back(without, use_two);
    else
      walk(without, use_two);
  }

 private:
  template <int kRows, int kMatrices, class Use>
  __device__ __forceinline__ void visit(int64_t begin, const T* const (&matrices)[kMatrices], const Use& use) const {
    Pack<T, V> packs[kRows][kMatrices];
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (begin + k * stride < rows)
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) packs[k][m] = load(matrices[m], begin + k * stride);
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (begin + k * stride < rows) use(begin + k * stride, packs[k]);
  }
};

// Adds `values` over the block's rows of threads. Thread i of the block gets the sum of the tile's i-th channel.
template <class Acc, int V>
__device__ __forceinline__ Acc add_thread_rows(const Acc (&values)[V], Acc* shared) {
  __syncthreads();  // earlier readers of shared are done
#pragma unroll
  for (int i = 0; i < V; ++i) shared[(threadIdx.y * V + i) * kLanes + threadIdx.x] = values[i];
  __syncthreads();
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  Acc sum = 0;
  if (thread < kLanes * V)
    for (int y = 0; y < kThreadRows; ++y) sum += shared[(y * V + thread % V) * kLanes + thread / V];
  return sum;
}

// The channel that thread i of the block finishes, or `channels` if it has none.
template <int V>
__device__ __forceinline__ int64_t finished_channel(int64_t channels) {
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int64_t channel = int64_t(blockIdx.x) * kLanes * V + thread;
  return thread < kLanes * V && channel < channels ? channel : channels;
}

// True in one block of those that call, for all its threads: in the last. Sees what the others wrote before.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned callers) {
  NF_SHARED(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) *last = atomicAdd(counter, 1u) == callers - 1;
  __syncthreads();
  const bool result = *last;
  if (result) __threadfence();
  __syncthreads();
  return result;
}

// Completes column sums over all blocks of the tile. In the last of its blocks finish(channel, sums) is
// called once per channel; the others return.
template <int kSums, int V, class Acc, class Finish>
__device__ __forceinline__ void finish_columns(const Acc (&values)[kSums][V], int64_t channels, Acc* partial,
                                               TileCounters* tiles, const Finish& finish) {
  static_assert(kSums <= kMostColumnSums, "the workspace has no room for their partial sums");
  NF_SHARED(Acc, shared, kThreads * V);
  const int64_t channel = finished_channel<V>(channels);
  const int64_t size = int64_t(gridDim.y) * channels;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const Acc sum = add_thread_rows(values[s], shared);
    if (channel < channels) partial[s * size + int64_t(blockIdx.y) * channels + channel] = sum;
  }
  if (!is_last(&tiles[blockIdx.x].blocks_done, gridDim.y)) return;

  const int64_t column = (int64_t(blockIdx.x) * kLanes + threadIdx.x) * V;
  Acc sums[kSums];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    Acc added[V] = {};
    for (int64_t b = threadIdx.y; b < gridDim.y; b += kThreadRows)
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (column + i < channels) added[i] += __ldcg(partial + s * size + b * channels + column + i);
    sums[s] = add_thread_rows(added, shared);
  }
  if (channel < channels) finish(channel, sums);
}

}  // namespace normfuse::cuda
