// Phases in one parallel region: every task once, phases in their order, whoever brings the threads.
#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../cpu/phases.h"
#include "check.h"

namespace {

using namespace normfuse;
using namespace normfuse::cpu;

void whole(int64_t tasks, int64_t, const TaskRange& body) { body(0, tasks); }

// Ranges one after another in the calling thread: none may wait for one that comes later.
void in_turns(int64_t tasks, int64_t, const TaskRange& body) {
  for (int64_t task = tasks - 1; task >= 0; --task) body(task, task + 1);
}

// Threads at the same time. The first exception is thrown again, as torch does.
void at_once(int64_t tasks, int64_t, const TaskRange& body) {
  constexpr int64_t kThreads = 4;
  std::exception_ptr thrown[kThreads];
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      try {
        if (tasks * i / kThreads < tasks * (i + 1) / kThreads) body(tasks * i / kThreads, tasks * (i + 1) / kThreads);
      } catch (...) {
        thrown[i] = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& exception : thrown)
    if (exception) std::rethrow_exception(exception);
}

// Each phase reads what the one before has written, without atomics: ThreadSanitizer sees a phase that begins too early.
void check_order(Parallel parallel, int64_t first, int64_t second) {
  std::vector<int64_t> runs(first), more(second);
  int64_t sum = 0;
  run_phases(parallel, {{first, [&](int64_t task) { runs[task] += 1; }},
                        once([&] {
                          for (const int64_t n : runs) sum += n;
                        }),
                        {second, [&](int64_t task) { more[task] += sum; }, true}});
  CHECK(sum == first);
  for (const int64_t n : runs) CHECK(n == 1);
  for (const int64_t n : more) CHECK(n == first);
}

void check_failure(Parallel parallel) {
  std::atomic<bool> went_on{false};
  bool caught = false;
  try {
    run_phases(parallel, {{40,
                           [](int64_t task) {
                             if (task == 17) throw std::runtime_error("no memory");
                           }},
                          once([&] { went_on = true; })});
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught && !went_on);
}

}  // namespace

int main() {
  for (const Parallel parallel : {whole, in_turns, at_once}) {
    for (const int64_t first : {0, 1, 3, 100})
      for (const int64_t second : {0, 1, 5, 64}) check_order(parallel, first, second);
    check_failure(parallel);
  }
  for (int i = 0; i < 200; ++i) check_order(at_once, 7, 7);
}
