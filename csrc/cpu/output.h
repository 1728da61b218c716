// Writes the rows of a result, and adds to them what is to be added: a 16-bit row has then been rounded, as PyTorch
// rounds one gradient before it adds another. A result too large to be found in the cache again is streamed past it: an
// ordinary store first reads the line it replaces, which costs a memory-bound kernel a third of its time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "residual.h"

namespace normfuse::cpu {

constexpr size_t kLine = 64;  // bytes of a cache line

// Whether to stream a result of this size: where input and result do not fit 32 MiB, a common size of the last-level
// cache, together, and the processor has such stores.
bool worth_streaming(size_t bytes);
// Copies whole lines past the cache. `to` begins at a line.
void stream_lines(void* to, const void* from, size_t lines);
// For the thread that streamed, before another one may read the result.
void finish_streaming();

template <class T>
class RowOutput {
 public:
  RowOutput(T* data, int64_t width, bool stream, const T* addend = nullptr)
      : data_(data), width_(width), addend_(addend) {
    const bool lines = reinterpret_cast<uintptr_t>(data) % kLine == 0 && width * sizeof(T) % kLine == 0;
    if (stream && lines) row_.resize(width);
  }

  // Where to write the row; finish() brings it to its place.
  T* row(int64_t r) { return row_.empty() ? data_ + r * width_ : row_.data(); }

  void finish(int64_t r) {
    if (addend_) add_numbers(row(r), addend_ + r * width_, row(r), width_);
    if (!row_.empty()) stream_lines(data_ + r * width_, row_.data(), width_ * sizeof(T) / kLine);
  }

  ~RowOutput() {
    if (!row_.empty()) finish_streaming();
  }

 private:
  T* data_;
  int64_t width_;
  const T* addend_;
  std::vector<T> row_;
};

}  // namespace normfuse::cpu
