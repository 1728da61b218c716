// Writes the rows of a result. A result too large to be found in the cache again is streamed past it: an
// ordinary store first reads the line it replaces, which costs a memory-bound kernel a third of its time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace normfuse::cpu {

// True where x, dy, y and dx of this size do not fit 32 MiB, a common size of the last-level cache, together.
inline bool exceeds_cache(size_t bytes) { return bytes > size_t(8) << 20; }

template <class T>
class RowOutput {
 public:
  RowOutput(T* data, int64_t width, bool stream) : data_(data), width_(width) {
#ifdef __SSE2__
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && width * sizeof(T) % 16 == 0;
    if (stream && aligned) row_.resize(width);
#else
    (void)stream;
#endif
  }

  // Where to write the row; finish() brings it to its place.
  T* row(int64_t r) { return row_.empty() ? data_ + r * width_ : row_.data(); }

  void finish([[maybe_unused]] int64_t r) {
#ifdef __SSE2__
    if (row_.empty()) return;
    auto* to = reinterpret_cast<__m128i*>(data_ + r * width_);
    const auto* from = reinterpret_cast<const __m128i*>(row_.data());
    const int64_t count = width_ * int64_t(sizeof(T)) / 16;
    for (int64_t i = 0; i < count; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
#endif
  }

  ~RowOutput() {
#ifdef __SSE2__
    if (!row_.empty()) _mm_sfence();
#endif
  }

 private:
  T* data_;
  int64_t width_;
  std::vector<T> row_;
};

}  // namespace normfuse::cpu
