#include "output.h"

#include "rows.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace normfuse::cpu {

#ifdef __x86_64__

bool worth_streaming(size_t bytes) { return bytes > size_t(16) << 20; }

#ifdef NORMFUSE_LOADER_PICKS
// A line in one store: its parts could leave the write buffer one by one.
__attribute__((target("avx512f"))) void stream_lines(void* to, const void* from, size_t lines) {
  for (size_t i = 0; i < lines; ++i)
    _mm512_stream_si512(static_cast<__m512i*>(to) + i, _mm512_loadu_si512(static_cast<const __m512i*>(from) + i));
}

__attribute__((target("default")))
#endif
void stream_lines(void* to, const void* from, size_t lines) {
  for (size_t i = 0; i < lines * kLine / sizeof(__m128i); ++i)
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
}

void finish_streaming() { _mm_sfence(); }

#else

bool worth_streaming(size_t) { return false; }
void stream_lines(void*, const void*, size_t) {}
void finish_streaming() {}

#endif

}  // namespace normfuse::cpu
