// Scratch memory and the parallel loop.
#pragma once
#include <stdlib.h>

#include <new>

#include "vec.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fused_attn::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

// Hands out aligned pieces of one allocation. With a null base it only adds up sizes, so that one layout function serves
// both to measure and to carve.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Buffer {
 public:
  explicit Buffer(int64_t bytes) { allocate(bytes); }
  // Memory for what `layout`, which is called twice, takes of an arena.
  template <class Layout, class = decltype(std::declval<const Layout&>()(std::declval<Arena&>()))>
  explicit Buffer(const Layout& layout) {
    Arena measure(nullptr);
    layout(measure);
    allocate(measure.used());
    Arena arena(data_);
    layout(arena);
  }
  ~Buffer() { free(raw_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }

 private:
  void allocate(int64_t bytes) {
    if (bytes <= 0) return;
    raw_ = malloc(static_cast<size_t>(bytes + kCacheLine));
    if (raw_ == nullptr) throw std::bad_alloc();
    const uintptr_t address = reinterpret_cast<uintptr_t>(raw_);
    data_ = static_cast<char*>(raw_) + (kCacheLine - address % kCacheLine) % kCacheLine;
  }

  void* raw_ = nullptr;
  char* data_ = nullptr;
};

// Below this a parallel region costs more than it gives (break-even measured between 16 and 130 kflop).
constexpr double kSerialFlops = 130e3;

FA_INLINE int choose_threads(int requested, int64_t items, double flops) {
#if defined(_OPENMP)
  if (flops < kSerialFlops || requested < 1) return 1;
  return items < requested ? (items < 1 ? 1 : static_cast<int>(items)) : requested;
#else
  (void)requested, (void)items, (void)flops;
  return 1;
#endif
}

// body(item, thread) for every item, in any order, on at most `threads` threads. The body must not throw.
template <class Body>
void parallel_for(int threads, int64_t items, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) body(item, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (int64_t item = 0; item < items; ++item) body(item, 0);
}

}  // namespace
}  // namespace fused_attn::cpu
