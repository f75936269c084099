// What all kernels share: rows of bfloat16, scratch memory, how a team of threads shares work.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef uint16_t bf16;

// A block of a packed weight is 16 outputs by 32 inputs, what a tile of AMX holds in bfloat16.
constexpr long ROWS = 16;
constexpr long DEPTH = 32;
constexpr long BLOCK = ROWS * DEPTH;

// Memory that only grows, one piece per thread and purpose.
class Scratch {
 public:
  ~Scratch() { std::free(at_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(at_);
      size_ = (bytes + 4095) / 4096 * 4096;
      at_ = std::aligned_alloc(64, size_);
    }
    return at_;
  }

 private:
  void* at_ = nullptr;
  size_t size_ = 0;
};

// The share of `count` pieces that this thread of the team does.
static inline void share(long count, long& begin, long& end) {
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  begin = count * me / threads;
  end = count * (me + 1) / threads;
}

// Where the threads of a team wait for each other, several times a layer. Whoever waits spins for a while and then lets others
// run: OpenMP's own barriers go on spinning, and beside any other process each of them can cost a slice of the scheduler's time.
class Meeting {
 public:
  void wait() {
    const long round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (long i = 0; round_.load(std::memory_order_acquire) == round; ++i) {
      if (i < PATIENCE)
        _mm_pause();
      else
        sched_yield();
    }
  }

 private:
  // Some ten microseconds: about what the shares of a phase differ by.
  static constexpr long PATIENCE = 1000;
  alignas(64) std::atomic<long> arrived_{0};
  alignas(64) std::atomic<long> round_{0};
};
