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

namespace normfuse::cpu {

struct RowBlocks {
  static constexpr int64_t kElements = 8192;  // per block: its rows stay in a core's cache
  int64_t rows;
  int64_t size;
  int64_t count;

  explicit RowBlocks(const Matrix& shape)
      : rows(shape.rows),
        size(std::clamp<int64_t>(kElements / std::max<int64_t>(shape.channels, 1), 32, 128)),
        count((shape.rows + size - 1) / size) {}

  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, rows - first(block)); }
};

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

  std::vector<Acc> total(Parallel parallel) const {
    constexpr int64_t kWidth = 256;
    std::vector<Acc> result(channels_);
    parallel((channels_ + kWidth - 1) / kWidth, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kWidth, width = std::min(end * kWidth, channels_) - first;
      std::vector<double> sums(width, 0.0);
      for (int64_t block = 0; block < blocks_; ++block) {
        const Acc* partial = &partials_[block * channels_ + first];
        for (int64_t c = 0; c < width; ++c) sums[c] += partial[c];
      }
      for (int64_t c = 0; c < width; ++c) result[first + c] = Acc(sums[c]);
    });
    return result;
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
