// The parallel loop.
#pragma once
#include <atomic>

#include "memory.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fused_attn::cpu {
namespace {

// Below this number, a parallel region costs more than it saves. The break-even was measured between 16 and 130 kflop.
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

// The items that one thread begins with; others help when they have done theirs.
struct alignas(kCacheLine) ItemRange {
  std::atomic<int64_t> next;
  int64_t end;
};

// How items are handed out. kInOrder means one after the other: for items of which the first ones are the largest.
enum class Items { kShared, kInOrder };

// Calls body(item, thread) for every item, on at most `threads` threads. The body must not throw.
//
// Items::kShared: each thread begins with its own share of neighbouring items, which is the same in every call. So what
// a thread reads and writes lies in the caches of its core: from the call before, or from an operator of torch that
// divides its work likewise. Handing out items one by one took 1.2 (forward) and 1.5 times (backward) as long at 512
// heads of 8 x 8 scores.
template <class Body>
void parallel_for(int threads, int64_t items, const Body& body, Items order = Items::kShared) {
#if defined(_OPENMP)
  if (threads > 1) {
    const Buffer memory(threads * static_cast<int64_t>(sizeof(ItemRange)));
    ItemRange* ranges = reinterpret_cast<ItemRange*>(memory.data());
    const int shares = order == Items::kShared ? threads : 1;
    for (int s = 0; s < shares; ++s) new (&ranges[s]) ItemRange{{items * s / shares}, items * (s + 1) / shares};
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      for (int i = 0; i < shares; ++i) {
        ItemRange& range = ranges[(thread + i) % shares];
        // Relaxed: items share nothing, and the region's end orders all that they did.
        while (range.next.load(std::memory_order_relaxed) < range.end) {
          const int64_t item = range.next.fetch_add(1, std::memory_order_relaxed);
          if (item < range.end) body(item, thread);
        }
      }
    }
    return;
  }
#endif
  (void)threads;
  for (int64_t item = 0; item < items; ++item) body(item, 0);
}

}  // namespace
}  // namespace fused_attn::cpu
