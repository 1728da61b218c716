// Runs the blocks of a launch: which fiber goes next, what it waits for, and what is wrong when nobody can go on.
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "fiber.h"
#include "sanitizers.h"
#include "simt.h"

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr unsigned kWarp = 32;

enum class State { kReady, kAtBarrier, kAtWarp, kExited };

struct Thread {
  Fiber* fiber = nullptr;
  dim3 index;
  State state = State::kExited;
  Site site{"", 0};            // where it waits
  unsigned mask = 0;           // of the warp operation it waits for
  uint64_t given = 0;          // its value in a shuffle
  bool fenced = false;         // since the last barrier
  bool fenced_before = false;  // by anyone in the block, before the last barrier
  std::exception_ptr error;
};

struct SharedArray {
  Site site;
  std::unique_ptr<char[]> data;
};

struct Atomic {
  void* address;
};

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// The fibers of each worker, kept from launch to launch. None dies while another worker runs: ThreadSanitizer
// gives a dead fiber's number to the next one and takes the two for one thread.
std::vector<std::vector<std::unique_ptr<Fiber>>>& fibers() {
  static std::vector<std::vector<std::unique_ptr<Fiber>>> fibers;
  return fibers;
}

Fiber& fiber(unsigned worker, size_t index) {
  auto& own = fibers()[worker];
  if (own.size() <= index) own.resize(index + 1);
  if (!own[index] || !own[index]->idle()) own[index] = std::make_unique<Fiber>();
  return *own[index];
}

// One worker's block.
class Block {
 public:
  Block(dim3 grid, dim3 block, const std::function<void()>& kernel, unsigned worker)
      : kernel_(kernel),
        random_(options().seed + worker),
        threads_(size_t(block.x) * block.y * block.z),
        order_(threads_.size()) {
    gridDim = grid;
    blockDim = block;
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      threads_[i].fiber = &fiber(worker, i);
      threads_[i].fiber->prepare([this, i] { call_kernel(threads_[i]); });
    }
    arrays_.reserve(kListLimit);
    atomics_.reserve(kListLimit);
    std::iota(order_.begin(), order_.end(), size_t(0));
    if (options().order == Order::kReverse) std::reverse(order_.begin(), order_.end());
  }

  // After an error fibers stay where they were; what they did came before their shared memory goes.
  ~Block() { SIMT_TSAN(for (const Thread& t : threads_) __tsan_acquire(t.fiber);) }

  void run(dim3 index) {
    index_ = index;
    arrays_.clear();
    atomics_.clear();
    if (options().order == Order::kRandom) std::shuffle(order_.begin(), order_.end(), random_);
    for (Thread& t : threads_) t.state = State::kReady, t.fenced = t.fenced_before = false;
    SIMT_TSAN(__tsan_release(&start_tag_);)
    while (true) {
      bool moved = false;
      for (size_t i : order_)
        if (threads_[i].state == State::kReady) resume(threads_[i]), moved = true;
      if (count(State::kExited) == threads_.size()) break;
      if (release_barrier() || release_warps() || moved) continue;
      throw Error(diagnosis());
    }
    SIMT_TSAN(__tsan_acquire(&end_tag_);)
  }

  Thread& current() { return *current_; }
  unsigned lane() const { return unsigned(current_ - threads_.data()) % kWarp; }

  void wait_at_barrier(Site site) {
    Thread& t = current();
    SIMT_TSAN(char* tag = &barrier_tags_[barriers_ % 2]; __tsan_release(tag);)
    t.site = site;
    t.state = State::kAtBarrier;
    t.fiber->suspend();
    SIMT_TSAN(__tsan_acquire(tag);)
  }

  uint64_t exchange(unsigned mask, uint64_t value, unsigned source, Site site) {
    Thread& t = current();
    if (!(mask >> lane() & 1)) throw Error(at(site) + ": a warp operation whose mask lacks the calling lane");
    if (!(mask >> source & 1)) throw Error(at(site) + ": a shuffle from a lane outside the mask");
    const size_t from = &t - threads_.data() - lane() + source;
    t.site = site;
    t.mask = mask;
    t.given = value;
    t.state = State::kAtWarp;
    t.fiber->suspend();
    return received_[from];
  }

  void* shared(size_t bytes, Site site) {
    SIMT_TSAN(__tsan_acquire(&shared_tag_);)  // the allocation itself is no race
    for (SharedArray& a : arrays_)
      if (same(a.site, site)) return a.data.get();
    grow(arrays_, {site, std::unique_ptr<char[]>(new char[bytes])});
    std::memset(arrays_.back().data.get(), 0xff, bytes);
    SIMT_TSAN(__tsan_release(&shared_tag_);)
    return arrays_.back().data.get();
  }

  // A fence publishes what its thread has seen through the atomics that follow, its own or, after a barrier,
  // the others'. Conversely it makes visible what the atomics before it have found published.
  void fence() {
    current().fenced = true;
    SIMT_TSAN(for (Atomic a : atomics_) __tsan_acquire(a.address);)
  }
  void before_atomic(void* address) {
    if (std::none_of(atomics_.begin(), atomics_.end(), [&](Atomic a) { return a.address == address; }))
      grow(atomics_, {address});
    SIMT_TSAN(if (current().fenced || current().fenced_before) __tsan_release(address);)
  }

 private:
  void call_kernel(Thread& t) {
    SIMT_TSAN(__tsan_acquire(&start_tag_);)
    try {
      kernel_();
    } catch (...) {
      t.error = std::current_exception();
    }
    t.state = State::kExited;
    SIMT_TSAN(__tsan_release(&end_tag_);)
  }

  void resume(Thread& t) {
    current_ = &t;
    threadIdx = t.index;
    blockIdx = index_;
    t.fiber->resume();
    if (t.error) std::rethrow_exception(t.error);
  }

  size_t count(State state) const {
    return std::count_if(threads_.begin(), threads_.end(), [&](const Thread& t) { return t.state == state; });
  }

  bool release_barrier() {
    if (count(State::kAtBarrier) != threads_.size()) return false;
    for (const Thread& t : threads_)
      if (!same(t.site, threads_[0].site)) throw Error(diagnosis());
    const bool fenced = std::any_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.fenced; });
    for (Thread& t : threads_) t.state = State::kReady, t.fenced_before = fenced, t.fenced = false;
    ++barriers_;
    return true;
  }

  // Lets go every group of lanes whose whole mask has arrived.
  bool release_warps() {
    bool any = false;
    received_.resize(threads_.size());
    for (size_t first = 0; first < threads_.size(); first += kWarp)
      for (size_t i = first; i < std::min(first + kWarp, threads_.size()); ++i)
        if (threads_[i].state == State::kAtWarp && whole_mask_waits(first, threads_[i])) {
          for (unsigned l = 0; l < kWarp; ++l) {
            if (!(threads_[i].mask >> l & 1)) continue;
            received_[first + l] = threads_[first + l].given;
            threads_[first + l].state = State::kReady;
          }
          any = true;
        }
    return any;
  }

  bool whole_mask_waits(size_t first, const Thread& t) const {
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!(t.mask >> l & 1)) continue;
      if (first + l >= threads_.size() || threads_[first + l].state != State::kAtWarp) return false;
      if (threads_[first + l].mask != t.mask || !same(threads_[first + l].site, t.site)) throw Error(diagnosis());
    }
    return true;
  }

  // Lists that fibers add to must not move: ThreadSanitizer would see one fiber free what another wrote.
  static constexpr size_t kListLimit = 64;
  template <class Entry>
  static void grow(std::vector<Entry>& list, Entry entry) {
    if (list.size() == kListLimit) throw Error("the emulator allows 64 shared arrays and 64 atomics per block");
    list.push_back(std::move(entry));
  }

  static std::string at(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

  // "block (0, 1, 0) cannot go on: threads 0-31 exited; threads 32-63 wait at __syncthreads, file:line; ..."
  std::string diagnosis() const {
    const auto describe = [](const Thread& t) -> std::string {
      switch (t.state) {
        case State::kReady:
          return "are ready";
        case State::kExited:
          return "exited";
        case State::kAtBarrier:
          return "wait at __syncthreads, " + at(t.site);
        case State::kAtWarp:
          break;
      }
      std::ostringstream s;
      s << "wait in a warp operation with mask 0x" << std::hex << t.mask << ", " << at(t.site);
      return s.str();
    };
    std::ostringstream s;
    s << "block (" << index_.x << ", " << index_.y << ", " << index_.z << ") cannot go on:";
    for (size_t first = 0, shown = 0; first < threads_.size() && shown < 8; ++shown) {
      size_t last = first;
      while (last + 1 < threads_.size() && describe(threads_[last + 1]) == describe(threads_[first])) ++last;
      s << (shown ? "; threads " : " threads ") << first << "-" << last << " " << describe(threads_[first]);
      first = last + 1;
    }
    return s.str();
  }

  const std::function<void()>& kernel_;
  std::mt19937 random_;
  std::vector<Thread> threads_;
  std::vector<size_t> order_;
  std::vector<SharedArray> arrays_;
  std::vector<Atomic> atomics_;     // touched by this block so far
  std::vector<uint64_t> received_;  // values of the last shuffle
  Thread* current_ = nullptr;
  dim3 index_;
  unsigned barriers_ = 0;
  char start_tag_ = 0, end_tag_ = 0, shared_tag_ = 0, barrier_tags_[2] = {};  // where ThreadSanitizer keeps orders
};

thread_local Block* running = nullptr;

}  // namespace

Options& options() {
  static Options options;
  return options;
}

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (options().order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (options().order == Order::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937(options().seed));

  const unsigned workers = std::max(1u, options().workers);
  if (fibers().size() < workers) fibers().resize(workers);
  std::vector<std::exception_ptr> errors(workers);
  const auto work = [&](unsigned worker) {
    try {
      Block runner(grid, block, kernel, worker);
      running = &runner;
      for (uint64_t i = worker; i < order.size(); i += workers)
        runner.run(dim3(order[i] % grid.x, order[i] / grid.x % grid.y, order[i] / grid.x / grid.y));
    } catch (...) {
      errors[worker] = std::current_exception();
    }
    running = nullptr;
  };
  std::vector<std::thread> others;
  for (unsigned w = 1; w < workers; ++w) others.emplace_back(work, w);
  work(0);
  for (std::thread& t : others) t.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

void* shared_bytes(size_t bytes, Site site) { return running->shared(bytes, site); }
void block_barrier(Site site) { running->wait_at_barrier(site); }
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, Site site) {
  return running->exchange(mask, value, source, site);
}
unsigned lane() { return running->lane(); }
void fence() { running->fence(); }
void before_atomic(void* address) { running->before_atomic(address); }

}  // namespace simt
