// The threads of the loop and the memory of a call, both kept from one call to the next.

#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
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

// The numbers at the beginning of a file, two at most. None if there is no file, or if it begins with a word ("max").
std::vector<double> numbers(const std::string& path) {
  double values[2];
  std::FILE* file = std::fopen(path.c_str(), "r");
  const int count = file ? std::fscanf(file, "%lf %lf", values, values + 1) : 0;
  if (file) std::fclose(file);
  return std::vector<double>(values, values + std::max(0, count));
}

// The processor time that control groups allow this process, in processors: the least quota of its own group and those
// above it, from cpu.max (version 2) or cpu.cfs_quota_us (version 1). Infinite if there is no quota.
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
    // A container may see its own group as the root, under a path that exists only outside of it. Files that do not
    // exist are skipped.
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

// The number of threads that can run at once. A quota of one and a half processors counts as one: two threads would
// both be stopped for a quarter of the time, and they wait for each other at every step.
int processors() {
  static const int paid_for = static_cast<int>(std::min(1e6, std::max(1.0, quota())));
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : std::min(paid_for, std::max(1, CPU_COUNT(&set)));
}

// --- barriers and shared work ------------------------------------------------------------------------------------

inline std::pair<long, long> share(long count, long parts, long i) {
  return {count * i / parts, count * (i + 1) / parts};
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A barrier. While each thread has a processor, all arrive within microseconds, so a thread spins at first. If one has
// lost its processor, to another process or to the threads of another library, the others sleep: spinning would occupy
// the processors that it could run on.
class Barrier {
 public:
  void reset(int count) { count_ = count; }

  // Signals the arrival of this thread. Returns whether it is the last.
  bool arrive() {
    const int count = count_;  // read before another thread can go on and reset the barrier
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < count) return false;
    arrived_.store(0, std::memory_order_relaxed);
    turn_.fetch_add(1);
    if (asleep_.load()) wake();
    return true;
  }

  void wait() {
    if (count_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrive()) return;
    for (int looks = 0; looks < LOOKS; ++looks) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      relax();
    }
    asleep_.fetch_add(1);
    while (turn_.load() == turn) sleep(turn);
    asleep_.fetch_sub(1);
  }

 private:
  static constexpr int LOOKS = 2000;  // some 20 to 50 microseconds
  static_assert(sizeof(std::atomic<int>) == sizeof(int), "the kernel looks at turn_ as it lies in memory");

  // Returns at once if turn_ is no longer `turn`.
  void sleep(int turn) { syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, turn, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

  int count_ = 1;
  std::atomic<int> arrived_{0}, turn_{0}, asleep_{0};
};

// Work that threads take piece by piece, first from their own share and then from the shares of others: none waits for
// a core that is slow for a while (its twin is busy, it was interrupted). Results do not depend on who takes a piece.
class alignas(64) Pieces {
 public:
  explicit Pieces(long threads) : next_(threads) {}
  // The next piece of `count` for thread `me`, or an empty one at the end. It is half of the rest of a share, but at
  // least `least`. There is a barrier between one phase and the next.
  std::pair<long, long> take(long phase, long count, long me, long least = 1) {
    const long threads = next_.size();
    if (threads == 1) {  // a single thread takes everything as one piece
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
    std::atomic<uint64_t> value{0};  // the phase, from 1 on, and the begin of its next piece
  };
  std::vector<Next> next_;
  long alone_ = 0;  // the last phase of a single thread
};

// The pieces of a step that the threads of a group share. Each thread has the same number of whole blocks of units, and
// a part of the rows of the blocks that are left over. Results do not depend on which rows are multiplied together.
struct Split {
  long blocks, threads, rows;
  long whole = blocks / threads, rest = blocks % threads;
  long pieces() const { return threads * (whole + rest); }  // those of one thread are consecutive

  // Runs work(b0, b1, r0, r1) on blocks and rows, for the pieces p0 to p1.
  template <class Function>
  void each(long p0, long p1, Function work) const {
    while (p0 < p1) {
      const long thread = p0 / (whole + rest), place = p0 % (whole + rest);
      if (place < whole) {
        const long b0 = thread * whole + place, count = std::min(p1 - p0, whole - place);
        work(b0, b0 + count, 0L, rows);
        p0 += count;
      } else {
        const auto [r0, r1] = ::share(rows, threads, thread);
        const long b0 = threads * whole + place - whole;
        if (r0 < r1) work(b0, b0 + 1, r0, r1);
        ++p0;
      }
    }
  }
};

// --- threads -----------------------------------------------------------------------------------------------------

using Work = std::function<void(long)>;

// Threads that wait for work between calls, since starting a thread costs more than a short call. They never end, so a
// team is never freed.
class Team {
 public:
  // Starts threads until there are `count`, including the caller. Returns their number: the system may refuse to start
  // more (a limit on processes, or on memory).
  long grow(long count) {
    while (size() < count && start()) continue;
    return std::min(count, size());
  }

  // Runs work(0) … work(count - 1) at once, each on its own thread, 0 on this one. There must be `count` threads. An
  // exception ends the process: unwinding one thread would free memory that the others still use.
  void run(long count, const Work& work) noexcept {
    // Keeps helpers off this processor: a thread is often woken on the waker's, and moved only after milliseconds.
    cpu_set_t others;
    CPU_ZERO(&others);
    const bool known = sched_getaffinity(0, sizeof others, &others) == 0 && CPU_COUNT(&others) > 1;
    if (known) CPU_CLR(sched_getcpu(), &others);
    done_.reset(count);
    for (long i = 0; i < count - 1; ++i) {
      Helper& helper = *helpers_[i];
      if (known && !CPU_EQUAL(&others, &helper.processors)) {
        helper.processors = others;
        pthread_setaffinity_np(helper.thread, sizeof others, &others);
      }
      std::lock_guard<std::mutex> lock(helper.mutex);
      helper.work.store(&work, std::memory_order_release);
      if (helper.sleeps) helper.wake.notify_one();
    }
    work(0);
    done_.wait();
  }

 private:
  struct Helper {
    long id = 0;
    Barrier* done = nullptr;  // the barrier of its team
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<const Work*> work{nullptr};
    bool sleeps = false;
    pthread_t thread{};
    cpu_set_t processors{};  // where it may run, once set
  };

  long size() const { return static_cast<long>(helpers_.size()) + 1; }

  bool start() {
    helpers_.reserve(helpers_.size() + 1);
    auto helper = std::make_unique<Helper>();
    helper->id = size();
    helper->done = &done_;
    if (pthread_create(&helper->thread, nullptr, serve, helper.get())) return false;
    pthread_detach(helper->thread);
    helpers_.push_back(helper.release());  // owned by its thread from now on
    return true;
  }

  static void* serve(void* helper) {
    Helper* self = static_cast<Helper*>(helper);
    for (;;) {
      // Spins first, since the next call often comes at once; then sleeps.
      for (int spins = 0; spins < 1000 && !self->work.load(std::memory_order_acquire); ++spins) relax();
      {
        std::unique_lock<std::mutex> lock(self->mutex);
        self->sleeps = true;
        self->wake.wait(lock, [&] { return self->work.load(std::memory_order_relaxed) != nullptr; });
        self->sleeps = false;
      }
      (*self->work.exchange(nullptr, std::memory_order_acq_rel))(self->id);
      self->done->arrive();  // after this the work may be gone, but not the team
    }
  }

  std::vector<Helper*> helpers_;
  Barrier done_;
};

// The memory and threads that are kept between calls. The child of a fork has no threads but its own, and starts anew.
struct Kept {
  std::mutex mutex;
  std::vector<std::pair<float*, size_t>> blocks;  // the oldest first
  std::vector<Team*> teams;                       // those that no call uses
};

Kept& kept() {
  static std::atomic<Kept*> instance{[] {
    pthread_atfork(nullptr, nullptr, [] { instance.store(new Kept); });
    return new Kept;
  }()};
  return *instance.load();
}

// The threads of a call. Concurrent calls have separate teams.
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
  // See Team::run; `count` is at most the size.
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

// Requests large pages for memory that is written for the first time: each new page costs more than writing to it.
void in_large_pages(void* data, size_t bytes) {
  constexpr uintptr_t large = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + large - 1) / large * large,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / large * large;
  if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// The limits of the scratch memory that is kept for the next call. A call that needs a larger block does more work too,
// so allocating the block again costs relatively little.
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
