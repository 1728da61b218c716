#include "stat_groups.h"

#include <memory>

#include "output.h"
#include "stat_group_loops.h"

namespace normfuse::cpu {
namespace {

// The mask of a plane as the loops want it; nothing without one.
template <class Acc>
std::vector<BitsOf<Acc>> as_bits(const bool* mask, int64_t positions) {
  std::vector<BitsOf<Acc>> bits(mask ? positions : 0);
  for (size_t p = 0; p < bits.size(); ++p) bits[p] = BitsOf<Acc>(0) - BitsOf<Acc>(mask[p]);
  return bits;
}

// sums[c] += from[c]
template <class Acc>
NORMFUSE_CLONES void add_sums(const Acc* from, double* sums, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) sums[c] += from[c];
}

// Moments<double>::add for n channels of the same count: share of the new numbers, weight = count before times share.
template <class Acc>
NORMFUSE_CLONES void add_moments(const Acc* from_mean, const Acc* from_squares, double share, double weight,
                                 double* mean, double* squares, int64_t n) {
#pragma GCC ivdep
  for (int64_t c = 0; c < n; ++c) {
    const double gap = from_mean[c] - mean[c];
    mean[c] += gap * share;
    squares[c] += from_squares[c] + gap * gap * weight;
  }
}

template <class Acc>
Pair<Acc> pair(const Acc* first, const Acc* second, int64_t c) {
  return {{first[c], second[c]}};
}

}  // namespace

template <class T>
StatGroupPasses<T>::StatGroupPasses(const StatGroups& stat_groups)
    : stat_groups(stat_groups),
      groups(stat_groups.groups()),
      sets(stat_groups.sets()),
      size(groups * sets * stat_groups.channels),
      planes_(stat_groups.positions > 1),
      first_block_{0} {
  const int64_t n = stat_groups.channels;
  int64_t most = 1;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * stat_groups.group_size,
                  count = g == groups - 1 ? stat_groups.samples - first : stat_groups.group_size;
    most = planes_ ? 1 : RowBlocks({count, n, stat_groups.dtype}).size;
    for (int64_t s = 0; s < count; s += most) blocks_.push_back({g, first + s, std::min(most, count - s)});
    first_block_.push_back(int64_t(blocks_.size()));
  }
  range_ = planes_ ? std::clamp<int64_t>(kThreadElements / stat_groups.positions, 1, n) : n;
  ranges_ = (n + range_ - 1) / range_;
  tasks_ = int64_t(blocks_.size()) * ranges_;
  grain_ = std::max<int64_t>(1, kThreadElements / (most * range_ * std::max<int64_t>(stat_groups.positions, 1)));
}

// As a function of the task: body(block number, block, first channel, end).
template <class T>
template <class Body>
auto StatGroupPasses<T>::of_block(const Body& body) const {
  return [this, body](int64_t task) {
    const int64_t b = task / ranges_, c = task % ranges_ * range_;
    body(b, blocks_[b], c, std::min(c + range_, stat_groups.channels));
  };
}

// body(group, first channel, end): what adds over the blocks of a group.
template <class T>
template <class Body>
Phase StatGroupPasses<T>::each_stat_group_range(const Body& body) const {
  constexpr int64_t kRange = 64;
  const int64_t n = stat_groups.channels, ranges = (n + kRange - 1) / kRange;
  const int64_t blocks = int64_t(blocks_.size()) / groups + 1;
  return neighbours(groups * ranges, std::max<int64_t>(1, kThreadElements / (kRange * blocks)),
                    [=](int64_t i) { body(i / ranges, i % ranges * kRange, std::min(n, (i % ranges + 1) * kRange)); });
}

template <class T>
std::vector<Phase> StatGroupPasses<T>::moments(const T* x, Acc* mean, Acc* squares, int64_t* count) const {
  const int64_t n = stat_groups.channels, positions = stat_groups.positions, blocks = int64_t(blocks_.size());
  const std::shared_ptr<Acc[]> partial(new Acc[2 * blocks * sets * n]);  // of a block the means, then the deviations
  const std::shared_ptr<int64_t[]> counts(new int64_t[blocks * sets]);
  const auto moments_of_block = [=, this](int64_t b, const Block& block, int64_t begin, int64_t end) {
    Acc *block_mean = &partial[2 * b * sets * n], *block_squares = block_mean + sets * n;
    if (planes_) {
      const auto select = as_bits<Acc>(mask(block.first), positions);
      for (int64_t c = begin; c < end; ++c) {
        const T* plane = x + (block.first * n + c) * positions;
        Moments<double> found[2] = {};
        if (masked())
          plane_moments<true>(plane, select.data(), positions, found);
        else
          plane_moments<false, T>(plane, nullptr, positions, found);
        for (int64_t s = 0; s < sets; ++s) {
          block_mean[s * n + c] = Acc(found[s].mean);
          block_squares[s * n + c] = Acc(found[s].squares);
          if (c == 0) counts[b * sets + s] = found[s].count;
        }
      }
    } else {
      const RowLists lists(mask(block.first), block.count);
      std::vector<Acc> shift(n);
      for (int64_t s = 0; s < sets; ++s) {
        counts[b * sets + s] = lists.count[s];
        if (lists.count[s] > 0)
          row_moments(x + block.first * n, lists.rows[s], lists.count[s], n, shift.data(), block_mean + s * n,
                      block_squares + s * n);
      }
    }
  };
  const auto merge = [=, this](int64_t g, int64_t begin, int64_t end) {
    std::vector<double> total_mean(end - begin), total_squares(end - begin);
    for (int64_t s = 0; s < sets; ++s) {
      std::fill(total_mean.begin(), total_mean.end(), 0.0);
      std::fill(total_squares.begin(), total_squares.end(), 0.0);
      int64_t total = 0;
      for (int64_t b = first_block_[g]; b < first_block_[g + 1]; ++b) {
        const int64_t more = counts[b * sets + s];
        const Acc* from = &partial[(2 * b * sets + s) * n + begin];
        if (more == 0) continue;
        const double share = double(more) / double(total + more);
        add_moments(from, from + sets * n, share, double(total) * share, total_mean.data(), total_squares.data(),
                    end - begin);
        total += more;
      }
      if (begin == 0) count[g * sets + s] = total;
      std::copy(total_mean.begin(), total_mean.end(), mean + at(g, s) + begin);
      std::copy(total_squares.begin(), total_squares.end(), squares + at(g, s) + begin);
    }
  };
  return {neighbours(tasks_, grain_, of_block(moments_of_block)), each_stat_group_range(merge)};
}

template <class T>
NORMFUSE_CLONES static void affine_rows(const T* x, const bool* mask, int64_t rows, int64_t n,
                                        const AccOf<T>* const* mean, const AccOf<T>* const* scale,
                                        const AccOf<T>* const* shift, RowOutput<T> y) {
  for (int64_t r = 0; r < rows; ++r) {
    const int part = mask && mask[r];
    affine_row(x + r * n, mean[part], scale[part], shift[part], y.row(r), n);
    y.finish(r);
  }
}

template <class T>
Phase StatGroupPasses<T>::affine(const T* x, const AffineOfStatGroups<Acc>& by, T* y) const {
  const int64_t n = stat_groups.channels, positions = stat_groups.positions;
  const bool stream = worth_streaming(stat_groups.samples * n * positions * sizeof(T));
  const auto pass = [=, this, &by](int64_t, const Block& block, int64_t begin, int64_t end) {
    const Acc *mean[2], *scale[2], *shift[2];
    for (int64_t part = 0; part < 2; ++part) {
      mean[part] = vector(by.mean, block, part);
      scale[part] = vector(by.scale.data(), block, part);
      shift[part] = vector(by.shift.data(), block, part);
    }
    if (planes_) {
      const auto select = as_bits<Acc>(mask(block.first), positions);
      RowOutput<T> out(y + block.first * n * positions, positions, stream);
      for (int64_t c = begin; c < end; ++c) {
        const T* plane = x + (block.first * n + c) * positions;
        const auto m = pair(mean[0], mean[1], c), a = pair(scale[0], scale[1], c), b = pair(shift[0], shift[1], c);
        if (masked())
          affine_plane<true>(plane, select.data(), positions, m, a, b, out.row(c));
        else
          affine_plane<false, T>(plane, nullptr, positions, m, a, b, out.row(c));
        out.finish(c);
      }
    } else {
      affine_rows<T>(x + block.first * n, mask(block.first), block.count, n, mean, scale, shift,
                     {y + block.first * n, n, stream});
    }
  };
  return neighbours_backwards(tasks_, grain_, of_block(pass));
}

template <class T>
std::vector<Phase> StatGroupPasses<T>::gradient_sums(const T* dy, const T* x, const Acc* mean, Acc* sums_dy,
                                                     Acc* sums_dyd) const {
  const int64_t n = stat_groups.channels, positions = stat_groups.positions, parts = this->parts();
  const std::shared_ptr<Acc[]> partial(new Acc[2 * int64_t(blocks_.size()) * parts * n]);
  const auto sums_of_block = [=, this](int64_t b, const Block& block, int64_t begin, int64_t end) {
    Acc *plain = &partial[2 * b * parts * n], *along = plain + parts * n;
    if (planes_) {
      const auto select = as_bits<Acc>(mask(block.first), positions);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = (block.first * n + c) * positions;
        const auto m = pair(vector(mean, block, 0), vector(mean, block, 1), c);
        Pair<Acc> sum_dy, sum_dyd;
        if (masked())
          plane_gradient_sums<true>(dy + first, x + first, select.data(), positions, m, &sum_dy, &sum_dyd);
        else
          plane_gradient_sums<false, T>(dy + first, x + first, nullptr, positions, m, &sum_dy, &sum_dyd);
        for (int64_t part = 0; part < parts; ++part) {
          plain[part * n + c] = sum_dy.of[part];
          along[part * n + c] = sum_dyd.of[part];
        }
      }
    } else {
      const RowLists lists(mask(block.first), block.count);
      for (int64_t part = 0; part < parts; ++part) {
        std::fill_n(plain + part * n, n, Acc(0));
        std::fill_n(along + part * n, n, Acc(0));
        row_gradient_sums(dy + block.first * n, x + block.first * n, lists.rows[part], lists.count[part], n,
                          vector(mean, block, part), plain + part * n, along + part * n);
      }
    }
  };
  const auto add = [=, this](int64_t g, int64_t begin, int64_t end) {
    const std::pair<const Acc*, Acc*> wanted[] = {{partial.get(), sums_dy}, {partial.get() + parts * n, sums_dyd}};
    for (const auto& [from, to] : wanted)
      for (int64_t s = 0; s < sets; ++s) {
        std::vector<double> total(end - begin);
        for (int64_t b = first_block_[g]; b < first_block_[g + 1]; ++b)
          for (int64_t part = s; part < parts; part += sets)  // where padding has no set of its own, both parts
            add_sums(from + (2 * b * parts + part) * n + begin, total.data(), end - begin);
        std::copy(total.begin(), total.end(), to + at(g, s) + begin);
      }
  };
  return {neighbours(tasks_, grain_, of_block(sums_of_block)), each_stat_group_range(add)};
}

template <class T>
NORMFUSE_CLONES static void gradient_rows(const T* dy, const T* x, const bool* mask, int64_t rows, int64_t n,
                                          const AccOf<T>* const* mean, const AccOf<T>* const* slope,
                                          const AccOf<T>* const* pull, const AccOf<T>* const* offset, RowOutput<T> dx) {
  for (int64_t r = 0; r < rows; ++r) {
    const int part = mask && mask[r];
    gradient_row(dy + r * n, x + r * n, mean[part], slope[part], pull[part], offset[part], dx.row(r), n);
    dx.finish(r);
  }
}

template <class T>
Phase StatGroupPasses<T>::gradient(const T* dy, const T* x, const GradientOfStatGroups<Acc>& by, T* dx) const {
  const int64_t n = stat_groups.channels, positions = stat_groups.positions;
  const bool stream = worth_streaming(stat_groups.samples * n * positions * sizeof(T));
  const std::vector<Acc> nothing(masked() && sets == 1 ? n : 0);
  const auto pass = [=, this, &by](int64_t, const Block& block, int64_t begin, int64_t end) {
    const Acc *mean[2], *slope[2], *pull[2], *offset[2];
    for (int64_t part = 0; part < 2; ++part) {
      const bool padding = part == 1 && !nothing.empty();
      mean[part] = vector(by.mean, block, part);
      slope[part] = vector(by.slope.data(), block, part);
      pull[part] = padding ? nothing.data() : vector(by.pull.data(), block, part);
      offset[part] = padding ? nothing.data() : vector(by.offset.data(), block, part);
    }
    if (planes_) {
      const auto select = as_bits<Acc>(mask(block.first), positions);
      RowOutput<T> out(dx + block.first * n * positions, positions, stream);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = (block.first * n + c) * positions;
        const auto m = pair(mean[0], mean[1], c), a = pair(slope[0], slope[1], c), p = pair(pull[0], pull[1], c),
                   q = pair(offset[0], offset[1], c);
        if (masked())
          gradient_plane<true>(dy + first, x + first, select.data(), positions, m, a, p, q, out.row(c));
        else
          gradient_plane<false, T>(dy + first, x + first, nullptr, positions, m, a, p, q, out.row(c));
        out.finish(c);
      }
    } else {
      gradient_rows<T>(dy + block.first * n, x + block.first * n, mask(block.first), block.count, n, mean, slope, pull,
                       offset, {dx + block.first * n, n, stream});
    }
  };
  return neighbours_backwards(tasks_, grain_, of_block(pass));
}

template class StatGroupPasses<float>;
template class StatGroupPasses<double>;
template class StatGroupPasses<bfloat16>;
template class StatGroupPasses<float16>;

}  // namespace normfuse::cpu
