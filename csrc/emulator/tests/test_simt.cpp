// The emulator itself: right kernels give right results in every order, wrong ones are caught.
#include <cmath>
#include <string>

#include "check.h"
#include "sum_kernel.h"

namespace {

const simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom};

std::string error_of(Bug bug) {
  try {
    run_sum(bug, 2);
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void right_in_every_order() {
  for (const auto order : kOrders)
    for (const unsigned workers : {1u, 2u}) {
      simt::options().order = order;
      simt::options().workers = workers;
      CHECK(run_sum(Bug::kNone, 5) == right_sum(5));
    }
}

[[maybe_unused]] void missing_barrier_gives_a_wrong_result() {
  simt::options() = {};
  bool wrong = false;
  for (const auto order : kOrders) {
    simt::options().order = order;
    wrong = wrong || !(run_sum(Bug::kMissingBarrier, 2) == right_sum(2));  // NaN: shared memory starts poisoned
  }
  CHECK(wrong);
}

void impossible_waits_are_diagnosed() {
  for (const auto order : kOrders) {
    simt::options() = {};
    simt::options().order = order;
    const std::string skipped = error_of(Bug::kSkippedBarrier);
    CHECK(contains(skipped, "threads 63-63 exited") && contains(skipped, "wait at __syncthreads"));
    const std::string divergent = error_of(Bug::kDivergentShuffle);
    CHECK(contains(divergent, "wait in a warp operation") && contains(divergent, "sum_kernel.h"));
    CHECK(run_sum(Bug::kNone, 2) == right_sum(2));  // an error leaves nothing behind
  }
}

void errors_cross_workers() {
  simt::options() = {};
  simt::options().workers = 2;
  CHECK(contains(error_of(Bug::kSkippedBarrier), "cannot go on"));
}

void shared_memory_is_poisoned_in_every_block() {
  simt::options() = {};
  int stale = 0;
  simt::launch(dim3(4), dim3(32), [&] {
    float* values = simt::shared<float>(32);
    atomicAdd(&stale, int(!std::isnan(values[threadIdx.x])));
    values[threadIdx.x] = 1;
  });
  CHECK(stale == 0);
}

void indices_cover_the_grid() {
  simt::options() = {};
  int seen[2 * 3 * 4 * 5] = {};
  simt::launch(dim3(2, 3), dim3(4, 5), [&] {
    CHECK(gridDim.x == 2 && gridDim.y == 3 && blockDim.x == 4 && blockDim.y == 5);
    ++seen[((blockIdx.y * 2 + blockIdx.x) * 5 + threadIdx.y) * 4 + threadIdx.x];
  });
  for (const int count : seen) CHECK(count == 1);
}

void shuffles_check_their_mask() {
  simt::options() = {};
  const auto message = [](unsigned mask, unsigned lanes) -> std::string {
    try {
      simt::launch(dim3(1), dim3(32), [&] {
        if (threadIdx.x < 16) __shfl_xor_sync(mask, 1, lanes);
      });
    } catch (const simt::Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message(0xffff, 1) == "");
  CHECK(contains(message(0xffff, 16), "a lane outside the mask"));
  CHECK(contains(message(0xff00, 1), "lacks the calling lane"));
  CHECK(contains(message(0x1ffff, 1), "exited"));
}

}  // namespace

int main() {
  right_in_every_order();
#ifndef __SANITIZE_THREAD__  // which would report the planted race itself
  missing_barrier_gives_a_wrong_result();
#endif
  impossible_waits_are_diagnosed();
  errors_cross_workers();
  shared_memory_is_poisoned_in_every_block();
  indices_cover_the_grid();
  shuffles_check_their_mask();
}
