// Scratch memory: one allocation, divided into aligned arrays. Advice for memory that is written for the first time.
#pragma once
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>

#include "vec.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

// The smallest multiple of `multiple` that is n or more.
FA_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Divides an allocation into arrays that begin at multiples of a cache line. If `base` is null, the arena returns null
// pointers and only adds up sizes. So the same layout function first measures the memory that it needs, and then
// divides the memory.
class Arena {
 public:
  // `base`: the allocation, or null to only add up sizes.
  explicit Arena(char* base) : base_(base) {}

  // The next array, of `count` elements. Its memory is not initialised.
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<T*>(piece);
  }

  // The bytes of all arrays so far.
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Advises Linux to back the memory with huge pages, if at least two fit. Memory that is written for the first time then
// costs a fault for each 2 MiB, not for each 4 KiB. The advice stays with the addresses after the memory is freed. On a
// Xeon, forward and backward with 4096 queries and keys and the gradient of a dense bias (128 MiB) take 0.83 of the
// time.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{1} << 21;
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  const int64_t begin = round_up(address, kHugePage);
  const int64_t end = (address + bytes) / kHugePage * kHugePage;
  // The result does not matter: without huge pages, only the time is longer.
  if (end - begin >= 2 * kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An allocation that begins at a cache line, and is freed with the object. It holds no memory if the size is 0.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) { allocate(bytes); }
  // Allocates as much as the function `layout` takes out of an arena. Calls `layout` twice: first with an arena that
  // only adds up sizes, then with one that divides the new memory.
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
  // Sets data_ to the first cache line of a new allocation.
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

}  // namespace
}  // namespace fused_attn::cpu
