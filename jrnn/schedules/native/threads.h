// The threads of the loop and the memory of a call, both kept from one call to the next.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace {

// --- how many threads --------------------------------------------------------------------------------------------

// The numbers that a file begins with, two at most. None where there is no file, or it begins with a word ("max").
std::vector<double> numbers(const std::string& path) {
  double values[2];
  std::FILE* file = std::fopen(path.c_str(), "r");
  const int count = file ? std::fscanf(file, "%lf %lf", values, values + 1) : 0;
  if (file) std::fclose(file);
  return std::vector<double>(values, values + std::max(0, count));
}

// How many processors' worth of time control groups allow this process: the least that its own group or one above it
// sets, by cpu.max (version 2) or by cpu.cfs_quota_us (version 1). Infinite where none sets any.
double quota(const std::string& process = "/proc/self/cgroup", const std::string& root = "/sys/fs/cgroup") {
  double least = __builtin_inf();
  std::FILE* file = std::fopen(process.c_str(), "r");
  if (!file) return least;
  char line[4096];
  while (std::fgets(line, sizeof line, file)) {  // number:controllers:path
    char *controllers = std::strchr(line, ':'), *path = controllers ? std::strchr(controllers + 1, ':') : nullptr;
    if (!path) continue;
    *path++ = 0;
    path[std::strcspn(path, "\n")] = 0;
    const bool unified = !*++controllers;
    if (!unified && !std::strstr(("," + std::string(controllers) + ",").c_str(), ",cpu,")) continue;
    // A container may see its own group as the root, under a path that exists outside alone: files that are not there
    // are passed over.
    for (std::string group = path;; group.resize(group.rfind('/'))) {
      if (group == "/") group.clear();
      const std::string in = root + (unified ? "" : "/cpu") + group;
      std::vector<double> values = numbers(in + (unified ? "/cpu.max" : "/cpu.cfs_quota_us"));
      for (double period : numbers(in + "/cpu.cfs_period_us")) values.push_back(period);
      if (values.size() == 2 && values[0] > 0 && values[1] > 0) least = std::min(least, values[0] / values[1]);
      if (group.rfind('/') == std::string::npos) break;
    }
  }
  std::fclose(file);
  return least;
}

// Threads that can run at once. Of a quota of one and a half processors only one is counted: two threads would both be
// stopped for a quarter of the time, and each waits for the other at every step.
int processors() {
  static const int paid_for = static_cast<int>(std::min(1e6, std::max(1.0, quota())));
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : std::min(paid_for, std::max(1, CPU_COUNT(&set)));
}

// --- what threads wait for ---------------------------------------------------------------------------------------

inline std::pair<long, long> share(long count, long parts, long i) {
  return {count * i / parts, count * (i + 1) / parts};
}

class Barrier {
 public:
  void reset(int count) { count_ = count; }
  void wait() {
    if (count_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      if (spins > 4000) sched_yield();
  }

 private:
  int count_ = 1;
  std::atomic<int> arrived_{0}, turn_{0};
};

// Work that threads take piece by piece, each of its own share first and then of what the others have not begun: a core
// that is slower for a while (its twin is busy, it was interrupted) is not waited for. Who takes a piece changes no result.
class alignas(64) Pieces {
 public:
  explicit Pieces(long threads) : next_(threads) {}
  // The next piece of `count` for thread `me`, or an empty one at the end: half of what is left of a share, and no less
  // than `least`. There is a barrier between one phase and the next.
  std::pair<long, long> take(long phase, long count, long me, long least = 1) {
    const long threads = next_.size();
    if (threads == 1) {  // nobody to share with, and the whole is a piece
      if (alone_ == phase) return {0, 0};
      alone_ = phase;
      return {0, count};
    }
    for (long i = 0; i < threads; ++i) {
      const long owner = (me + i) % threads;
      const auto [begin, end] = share(count, threads, owner);
      auto& next = next_[owner].value;
      for (uint64_t seen = next.load(std::memory_order_relaxed);;) {
        const long from = static_cast<long>(seen >> 32) == phase ? static_cast<uint32_t>(seen) : begin;
        if (from >= end) break;
        const long to = std::min(end, from + std::max(least, (end - from) / 2));
        if (next.compare_exchange_weak(seen, uint64_t(phase) << 32 | uint64_t(to), std::memory_order_relaxed))
          return {from, to};
      }
    }
    return {0, 0};
  }

 private:
  struct alignas(64) Next {
    std::atomic<uint64_t> value{0};  // the phase, from 1 on, and where its next piece begins
  };
  std::vector<Next> next_;
  long alone_ = 0;  // the last phase of one thread
};

// --- threads -----------------------------------------------------------------------------------------------------

using Work = std::function<void(long)>;

struct Job {
  const Work* work;
  std::atomic<int> left;
};

// Threads that wait for work between calls: to begin one costs more than a short call. They never end, so a team is
// never freed.
class Team {
 public:
  // Starts threads until there are `count`, the caller among them. Returns how many there are: the system may refuse to
  // start more (a limit on processes, or on memory).
  long grow(long count) {
    while (size() < count && start()) continue;
    return std::min(count, size());
  }

  // work(0) … work(count - 1) at once, each on a thread of its own; 0 on this one. `count` threads must be there. What
  // throws in one thread would leave the others with what is gone, so it ends the process.
  void run(long count, const Work& work) noexcept {
    // Not on this processor: a thread is often woken on that of the one that wakes it, and moved only after milliseconds.
    cpu_set_t others;
    CPU_ZERO(&others);
    const bool known = sched_getaffinity(0, sizeof others, &others) == 0 && CPU_COUNT(&others) > 1;
    if (known) CPU_CLR(sched_getcpu(), &others);
    Job job{&work, {static_cast<int>(count - 1)}};
    for (long i = 0; i < count - 1; ++i) {
      Helper& helper = *helpers_[i];
      if (known && !CPU_EQUAL(&others, &helper.processors)) {
        helper.processors = others;
        pthread_setaffinity_np(helper.thread, sizeof others, &others);
      }
      std::lock_guard<std::mutex> lock(helper.mutex);
      helper.job.store(&job, std::memory_order_release);
      if (helper.sleeps) helper.wake.notify_one();
    }
    work(0);
    for (int spins = 0; job.left.load(std::memory_order_acquire); ++spins)
      if (spins > 4000) sched_yield();
  }

 private:
  struct Helper {
    long id = 0;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<Job*> job{nullptr};
    bool sleeps = false;
    pthread_t thread{};
    cpu_set_t processors{};  // where it may run, once it was said
  };

  long size() const { return static_cast<long>(helpers_.size()) + 1; }

  bool start() {
    helpers_.reserve(helpers_.size() + 1);
    auto helper = std::make_unique<Helper>();
    helper->id = size();
    if (pthread_create(&helper->thread, nullptr, serve, helper.get())) return false;
    pthread_detach(helper->thread);
    helpers_.push_back(helper.release());  // its thread's for good
    return true;
  }

  static void* serve(void* helper) {
    Helper* self = static_cast<Helper*>(helper);
    for (;;) {
      // The next call often comes at once; then sleep, which costs nothing.
      for (int spins = 0; spins < 1000 && !self->job.load(std::memory_order_acquire); ++spins) relax();
      {
        std::unique_lock<std::mutex> lock(self->mutex);
        self->sleeps = true;
        self->wake.wait(lock, [&] { return self->job.load(std::memory_order_relaxed) != nullptr; });
        self->sleeps = false;
      }
      Job& job = *self->job.exchange(nullptr, std::memory_order_acq_rel);
      (*job.work)(self->id);
      job.left.fetch_sub(1, std::memory_order_acq_rel);  // after which there may be no job
    }
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::vector<Helper*> helpers_;
};

// What is kept between calls. The child of a fork, which has no threads but its own, begins anew.
struct Kept {
  std::mutex mutex;
  std::vector<std::pair<float*, size_t>> blocks;  // the oldest first
  std::vector<Team*> teams;                       // that no call uses
};

Kept& kept() {
  static std::atomic<Kept*> instance{[] {
    pthread_atfork(nullptr, nullptr, [] { instance.store(new Kept); });
    return new Kept;
  }()};
  return *instance.load();
}

// The threads of a call. Calls at the same time have teams of their own.
class Crew {
 public:
  explicit Crew(long wanted) : from_(kept()) {
    if (wanted <= 1) return;
    {
      std::lock_guard<std::mutex> lock(from_.mutex);
      if (!from_.teams.empty()) {
        team_ = from_.teams.back();
        from_.teams.pop_back();
      }
    }
    if (!team_) team_ = new Team;
    size_ = team_->grow(wanted);
  }
  ~Crew() {
    if (!team_) return;
    std::lock_guard<std::mutex> lock(from_.mutex);
    from_.teams.push_back(team_);
  }
  Crew(const Crew&) = delete;
  long size() const { return size_; }
  // See Team; for `count` up to the size.
  void run(long count, const Work& work) {
    if (count == 1)
      work(0);
    else
      team_->run(count, work);
  }

 private:
  Kept& from_;
  Team* team_ = nullptr;
  long size_ = 1;
};

// --- memory ------------------------------------------------------------------------------------------------------

// Fewer and larger pages for memory that is written for the first time: a page costs more than what is written to it.
void in_large_pages(void* data, size_t bytes) {
  constexpr uintptr_t large = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + large - 1) / large * large,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / large * large;
  if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Memory for the time of a call, kept for the next: in few blocks, and no more than this in all. What a call needs
// grows with what it does, so that a large block is soon paid for again.
constexpr size_t MOST_BLOCKS = 8, MOST_BYTES = size_t(128) << 20;

class Scratch {
 public:
  explicit Scratch(size_t floats) : bytes_((floats * 4 + 4095) / 4096 * 4096), from_(kept()) {
    std::lock_guard<std::mutex> lock(from_.mutex);
    auto& blocks = from_.blocks;
    for (auto& block : blocks)
      if (block.second >= bytes_ && block.second <= 4 * bytes_) {
        data_ = block.first, bytes_ = block.second;
        std::swap(block, blocks.back());
        blocks.pop_back();
        return;
      }
    const size_t alignment = bytes_ >= 1 << 21 ? 1 << 21 : 4096;
    bytes_ = (std::max<size_t>(bytes_, 1) + alignment - 1) / alignment * alignment;
    data_ = static_cast<float*>(std::aligned_alloc(alignment, bytes_));
    if (!data_) throw std::bad_alloc();
    in_large_pages(data_, bytes_);
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(from_.mutex);
    auto& blocks = from_.blocks;
    blocks.push_back({data_, bytes_});
    size_t sum = 0;
    for (const auto& block : blocks) sum += block.second;
    while (blocks.size() > MOST_BLOCKS || sum > MOST_BYTES) {
      sum -= blocks.front().second;
      std::free(blocks.front().first);
      blocks.erase(blocks.begin());
    }
  }
  Scratch(const Scratch&) = delete;
  float* take(size_t floats) {
    float* p = data_ + used_;
    used_ += rounded(floats);
    return p;
  }
  static size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }

 private:
  float* data_ = nullptr;
  size_t bytes_, used_ = 0;
  Kept& from_;
};

}  // namespace
