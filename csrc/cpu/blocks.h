// Column sums over blocks of rows. The blocks depend on the shape alone and are added in a fixed order, so
// results are the same for any number of threads. Inside a block the sums are acc, short enough to keep
// float32 accurate; the blocks are added in double.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../host_types.h"
#include "../kernels.h"
#include "phases.h"
#include "rows.h"

namespace normfuse::cpu {

constexpr int64_t kThreadElements = 32768;  // what a thread should get at least: some ten microseconds of work

struct RowBlocks {
  int64_t rows;
  int64_t channels;
  int64_t size;
  int64_t count;

  // Few blocks, so that their sums take little memory, of at most so many rows that sums in float32 stay accurate: four
  // times an odd number, because a tile's rows are a quarter apart. At a distance of pages they would share a few lines of
  // the first cache with each other and their results.
  explicit RowBlocks(const Matrix& shape)
      : rows(shape.rows),
        channels(shape.channels),
        size(std::clamp<int64_t>(std::max((shape.rows + 127) / 128, 8192 / shape.channels), 32, 1020) / 8 * 8 + 4),
        count((shape.rows + size - 1) / size) {}

  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, rows - first(block)); }

  // Calls body(block) for every block.
  template <class Body>
  Phase each(const Body& body) const {
    return neighbours(count, grain(), body);
  }
  template <class Body>
  Phase each_backwards(const Body& body) const {
    return neighbours_backwards(count, grain(), body);
  }

  // As many blocks as are worth waking a thread for.
  int64_t grain() const { return std::max<int64_t>(1, kThreadElements / (size * channels)); }
};

// sums += the same channels of every block
template <class Acc>
NORMFUSE_CLONES static void add_blocks(const Acc* partials, int64_t blocks, int64_t stride, double* sums, int64_t n) {
  for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) sums[c] += partials[b * stride + c];
  }
}

template <class Acc>
class ColumnSums {
 public:
  ColumnSums(const RowBlocks& blocks, int64_t channels)
      : blocks_(blocks.count), channels_(channels), partials_(new Acc[blocks.count * channels]) {}

  // The sums of one block, set to zero.
  Acc* start(int64_t block) {
    Acc* sums = &partials_[block * channels_];
    std::fill_n(sums, channels_, Acc(0));
    return sums;
  }

  // Adds the blocks.
  Phase total(std::vector<Acc>& result) const {
    result.resize(channels_);
    const int64_t range = std::max<int64_t>(64, kThreadElements / std::max<int64_t>(blocks_, 1));
    return {(channels_ + range - 1) / range, [this, range, &result](int64_t task) {
              const int64_t begin = task * range, end = std::min(channels_, begin + range);
              std::vector<double> sums(end - begin, 0.0);
              add_blocks(&partials_[begin], blocks_, channels_, sums.data(), end - begin);
              std::copy(sums.begin(), sums.end(), result.begin() + begin);
            }};
  }

 private:
  int64_t blocks_;
  int64_t channels_;
  std::unique_ptr<Acc[]> partials_;
};

// Calls run(T{}) with the element type that dtype names.
template <class Run>
void with_element_type(DType dtype, const Run& run) {
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
}

}  // namespace normfuse::cpu
