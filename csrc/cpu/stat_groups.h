// Passes over a [samples, channels, positions] tensor, parted into statistics groups (StatGroups in kernels.h). Two
// layouts: with one position a sample is a row, and loops run over channels; otherwise a channel of a sample is a plane,
// and loops run over its positions. Sums are taken in blocks, which depend on the shape alone, and added in a fixed
// order, in double: results are the same for any number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "rows.h"

namespace normfuse::cpu {

// Vectors [groups, sets, channels].
template <class Acc>
using StatGroupVector = std::vector<Acc>;

// y = scale (x - mean) + shift
template <class Acc>
struct AffineOfStatGroups {
  const Acc* mean;
  StatGroupVector<Acc> scale, shift;
};

// dx = slope dy + pull (x - mean) + offset. With a padding mask, rows of padding have no pull and no offset.
template <class Acc>
struct GradientOfStatGroups {
  const Acc* mean;
  StatGroupVector<Acc> slope, pull, offset;
};

template <class T>
class StatGroupPasses {
 public:
  using Acc = AccOf<T>;

  explicit StatGroupPasses(const StatGroups& stat_groups);

  const StatGroups stat_groups;
  const int64_t groups, sets, size;  // size: of a StatGroupVector

  int64_t at(int64_t group, int64_t set) const { return (group * sets + set) * stat_groups.channels; }

  // The passes as phases, which read `by` when they run.
  // Mean, sum of squared deviations and, [groups, sets], number of what the statistics groups count.
  std::vector<Phase> moments(const T* x, Acc* mean, Acc* squares, int64_t* count) const;
  Phase affine(const T* x, const AffineOfStatGroups<Acc>& by, T* y) const;
  // Sums of dy and of dy (x - mean) over all that the statistics groups normalise, padding included.
  std::vector<Phase> gradient_sums(const T* dy, const T* x, const Acc* mean, Acc* sums_dy, Acc* sums_dyd) const;
  Phase gradient(const T* dy, const T* x, const GradientOfStatGroups<Acc>& by, T* dx) const;

 private:
  struct Block {
    int64_t group, first, count;  // of samples, of which a plane layout has one
  };
  template <class Body>
  auto of_block(const Body& body) const;
  template <class Body>
  Phase each_stat_group_range(const Body& body) const;

  bool masked() const { return stat_groups.mask != nullptr; }
  int64_t parts() const { return masked() ? 2 : 1; }  // what the mask parts a block into
  const bool* mask(int64_t sample) const {
    return masked() ? stat_groups.mask + sample * stat_groups.positions : nullptr;
  }
  const Acc* vector(const Acc* vectors, const Block& block, int64_t part) const {
    return vectors + at(block.group, part < sets ? part : 0);
  }

  bool planes_;
  std::vector<Block> blocks_;
  std::vector<int64_t> first_block_;        // of each group, and one more
  int64_t range_, ranges_, tasks_, grain_;  // channels of a task, tasks of a block, tasks, worth a thread
};

}  // namespace normfuse::cpu
