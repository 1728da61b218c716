// Writes the rows of a result, and adds to them what is to be added: a 16-bit row has then been rounded, as PyTorch
// rounds one gradient before it adds another. A result too large to be found in the cache again is streamed past it: an
// ordinary store first reads the line it replaces, which costs a memory-bound kernel a third of its time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "residual.h"
#include "rows.h"

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
    if (stream && lines) buffer_.resize(kTile * width);
  }

  // Where to write row r, and rows r + stride, ... behind it at that pitch; finish() brings them to their places.
  T* row(int64_t r) { return buffer_.empty() ? data_ + r * width_ : buffer_.data(); }
  int64_t pitch(int64_t stride) const { return buffer_.empty() ? stride * width_ : width_; }

  void finish(int64_t first, int64_t stride = 1, int count = 1) {
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i * stride;
      T* from = row(first) + i * pitch(stride);
      if (addend_) add_numbers(from, addend_ + r * width_, from, width_);
      if (!buffer_.empty()) stream_lines(data_ + r * width_, from, width_ * sizeof(T) / kLine);
    }
  }

  ~RowOutput() {
    if (!buffer_.empty()) finish_streaming();
  }

 private:
  T* data_;
  int64_t width_;
  const T* addend_;
  std::vector<T> buffer_;
};

}  // namespace normfuse::cpu
