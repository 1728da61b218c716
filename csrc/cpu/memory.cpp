#include "../kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace normfuse {

// The first write to fresh memory costs a page fault per 4 KiB, which for a large result takes several times
// longer than computing it. Linux in its "madvise" mode gives huge pages to whoever asks; a refusal changes
// nothing but the speed.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace normfuse
