// Runs the sum with one planted bug on two workers. Under a sanitizer CTest looks for its report.
#include <cstring>

#include "check.h"
#include "sum_kernel.h"

int main(int argc, char** argv) {
  CHECK(argc == 2);
  simt::options().workers = 2;
  const auto is = [&](const char* name) { return std::strcmp(argv[1], name) == 0; };
  if (is("none"))
    CHECK(run_sum(Bug::kNone, 8) == right_sum(8));
  else if (is("missing_fence"))
    run_sum(Bug::kMissingFence, 8);
  else if (is("missing_barrier"))
    run_sum(Bug::kMissingBarrier, 8);
  else if (is("shared_overflow"))
    run_sum(Bug::kSharedOverflow, 8);
  else
    CHECK(false);
}
