// Passes over a matrix and what is computed between them, in one parallel region: to open a region costs some 5 us, a
// fifth of the time of a small matrix.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../kernels.h"

namespace normfuse::cpu {

// run(task) for the tasks [0, tasks), each once, in any order and by any thread.
struct Phase {
  int64_t tasks;
  std::function<void(int64_t task)> run;
  bool backwards = false;  // a thread's last task first
};

// run(i) for 0 <= i < count, in tasks of `grain` neighbours.
template <class Run>
Phase neighbours(int64_t count, int64_t grain, const Run& run) {
  return {(count + grain - 1) / grain, [=](int64_t task) {
            for (int64_t i = task * grain; i < std::min(count, (task + 1) * grain); ++i) run(i);
          }};
}

// The same with the last one first: a thread finds in its cache what the phase before has just read.
template <class Run>
Phase neighbours_backwards(int64_t count, int64_t grain, const Run& run) {
  const auto last_first = [=](int64_t task) {
    for (int64_t i = std::min(count, (task + 1) * grain) - 1; i >= task * grain; --i) run(i);
  };
  return {(count + grain - 1) / grain, last_first, true};
}

// What is computed once, by one thread.
inline Phase once(std::function<void()> run) {
  return {1, [run = std::move(run)](int64_t) { run(); }};
}

// Tasks of a phase that nobody has begun, and the number of those that are not finished.
class OpenTasks {
 public:
  explicit OpenTasks(const Phase& phase) : phase_(phase), taken_(new Flag[phase.tasks]), left_(phase.tasks) {}

  // Runs the open ones of the tasks [begin, end).
  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && !finished(); ++i) {
      const int64_t task = phase_.backwards ? end - 1 - (i - begin) : i;
      if (taken_[task].value.exchange(true, std::memory_order_relaxed)) continue;
      phase_.run(task);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
  bool finished() const { return left_.load(std::memory_order_acquire) == 0; }
  int64_t count() const { return phase_.tasks; }

 private:
  struct alignas(64) Flag {  // a cache line each: threads take different tasks at the same time
    std::atomic<bool> value{false};
  };
  const Phase& phase_;
  std::unique_ptr<Flag[]> taken_;
  std::atomic<int64_t> left_;
};

// At first awake, for what some tasks take. Then asleep: the thread that is waited for may need this processor.
inline void wait(int64_t tries) {
  if (tries < 1000)
    std::this_thread::yield();
  else
    std::this_thread::sleep_for(std::chrono::microseconds(20));
}

// Runs the phases one after another: each begins when the one before has been finished. A thread takes its share of the
// tasks, the same of every phase, then what others have not begun. It waits for nothing but tasks that a thread is
// running: it does not matter how many threads there are, or whether they run one after another.
inline void run_phases(Parallel parallel, const std::vector<Phase>& phases) {
  std::vector<std::unique_ptr<OpenTasks>> open;
  for (const Phase& phase : phases) open.push_back(std::make_unique<OpenTasks>(phase));
  const int64_t shares = std::max<int64_t>(1, phases.front().tasks);
  std::atomic<bool> failed{false};
  parallel(shares, 1, [&](int64_t begin, int64_t end) {
    try {
      for (const auto& tasks : open) {
        tasks->run(begin * tasks->count() / shares, end * tasks->count() / shares);
        tasks->run(0, tasks->count());
        for (int64_t tries = 0; !tasks->finished(); ++tries) {
          if (failed.load(std::memory_order_acquire)) return;
          wait(tries);
        }
      }
    } catch (...) {
      failed.store(true, std::memory_order_release);
      throw;
    }
  });
}

}  // namespace normfuse::cpu
