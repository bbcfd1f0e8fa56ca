// What test_native_threads.py checks of threads.h. The first argument names the check; 0 is returned where it holds.

#include <sys/stat.h>

#include <cerrno>
#include <cstdio>
#include <fstream>

#include <pthread.h>

static int threads_left = 1 << 20;  // how many threads the "system" will still start
static int create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
  return threads_left-- > 0 ? pthread_create(thread, attributes, run, argument) : EAGAIN;
}
#define pthread_create create
#include "threads.h"
#undef pthread_create

// The sum of what each thread of a crew adds, after they have all met.
static long together(Crew& crew) {
  std::atomic<long> sum{0};
  Barrier barrier;
  barrier.reset(crew.size());
  crew.run(crew.size(), [&](long id) {
    sum += id + 1;
    barrier.wait();
  });
  return sum;
}

static bool runs_with_the_threads_there_are() {
  for (long allowed : {0, 1, 2, 0, 9}) {
    threads_left = allowed;
    Crew crew(4), other(3);  // `other` may find none left at all
    for (int i = 0; i < 100; ++i)
      for (Crew* each : {&crew, &other})
        if (together(*each) != each->size() * (each->size() + 1) / 2) return false;
  }
  threads_left = 9;
  return Crew(4).size() == 4;
}

static void write(const std::string& path, const char* text) {
  std::string folder = path;
  for (size_t i = 1; (i = path.find('/', i)) != std::string::npos; ++i) mkdir(path.substr(0, i).c_str(), 0700);
  std::ofstream(path) << text;
}

static bool reads_quotas(const std::string& folder) {
  const std::string groups = folder + "/cgroup", root = folder + "/fs";
  const auto now = [&] { return quota(groups, root); };
  if (!__builtin_isinf(now())) return false;  // no file at all
  write(groups, "12:cpuacct:/\n3:memory,cpuset:/x\n0::/a/b\n");
  if (!__builtin_isinf(now())) return false;
  write(root + "/a/cpu.max", "150000 100000\n");
  write(root + "/a/b/cpu.max", "max 100000\n");
  if (now() != 1.5) return false;
  write(root + "/cpu.max", "50000 100000\n");  // as a container sees its own, under a path that is not there
  write(groups, "0::/docker/1234\n");
  if (now() != 0.5) return false;
  write(groups, "4:cpu,cpuacct:/job\n1:name=systemd:/\n");
  write(root + "/cpu/cpu.cfs_quota_us", "-1\n");
  write(root + "/cpu/cpu.cfs_period_us", "100000\n");
  if (!__builtin_isinf(now())) return false;
  write(root + "/cpu/job/cpu.cfs_quota_us", "250000\n");
  write(root + "/cpu/job/cpu.cfs_period_us", "100000\n");
  return now() == 2.5;
}

static size_t bytes_kept() {
  size_t sum = 0;
  for (const auto& block : kept().blocks) sum += block.second;
  return sum;
}

static bool keeps_little_memory() {
  for (size_t floats : {size_t(1) << 10, size_t(1) << 20, size_t(1) << 24, size_t(1) << 26, size_t(1) << 24}) {
    Scratch large(floats), small(1 << 10);
    large.take(floats)[floats - 1] = 1;
  }
  if (bytes_kept() > MOST_BYTES || kept().blocks.size() > MOST_BLOCKS) return false;
  float *first, *second;
  { first = Scratch(1 << 20).take(1); }
  { second = Scratch(1 << 20).take(1); }
  return first == second;  // what is kept is used again
}

int main(int, char** arguments) {
  const std::string check = arguments[1];
  if (check == "threads") return !runs_with_the_threads_there_are();
  if (check == "quotas") return !reads_quotas(arguments[2]);
  if (check == "memory") return !keeps_little_memory();
  return 2;
}
