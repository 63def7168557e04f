// Small kernels for test_detectors.py. Most of them have one deliberate bug, which the kernel's name tells, and which
// the emulation has to report. The others are correct, and often differ from a kernel with a bug in one line.
#include <cstring>

#include "cuda/hardware.h"
#include "cuda/tensor_map.h"

namespace fused_attn::gpu {
namespace {

// The global memory that every kernel gets.
struct Memory {
  float* floats;                     // 4096 of them
  const float* read_only;            // 1024
  int* counters;                     // 16, zero
  alignas(64) TensorMap map;         // of `floats` as 64 x 64, in boxes of 8 rows of 32 (128 bytes), swizzled
  alignas(64) TensorMap narrow_map;  // the same in boxes of 8 rows of 16 (64 bytes)
};

struct Kernel {
  const char* name;
  void (*kernel)(Memory);
  int blocks, threads, shared_bytes;
};

Kernel kernels[160];
int num_kernels = 0;

// KERNEL(name, blocks, threads, shared bytes) { body } defines a kernel, and adds it to `kernels`. In the body,
// `thread` is the index of the thread, and `shared` is the address of the first byte of shared memory.
#define KERNEL(name, blocks, threads, shared_bytes)                                                                  \
  void name(Memory memory, int thread, uint32_t shared);                                                             \
  const int name##_index =                                                                                           \
      (kernels[num_kernels] = {#name,                                                                                \
                               [](Memory memory) { name(memory, thread_index(), shared_address(shared_memory())); }, \
                               blocks, threads, shared_bytes},                                                       \
       num_kernels++);                                                                                               \
  void name([[maybe_unused]] Memory memory, [[maybe_unused]] int thread, [[maybe_unused]] uint32_t shared)

// ---- Threads that meet in shared memory

void store_own_word(int thread, uint32_t shared) { store_shared(shared + 4 * thread, thread); }
int load_word_of(int thread, uint32_t shared) { return load_shared<int>(shared + 4 * thread); }

KERNEL(ordered_exchange, 1, 64, 1024) {
  for (int i = 0; i < 3; i++) {
    store_own_word(thread, shared);
    sync_threads();
    load_word_of((thread + 32) % 64, shared);
    sync_threads();
  }
}

KERNEL(load_without_sync, 1, 64, 1024) {
  store_own_word(thread, shared);
  load_word_of((thread + 32) % 64, shared);
}

KERNEL(store_without_sync, 1, 64, 1024) {
  store_own_word(thread, shared);
  sync_threads();
  load_word_of((thread + 32) % 64, shared);
  store_own_word(thread, shared);
}

KERNEL(lanes_without_sync_warp, 1, 32, 1024) {
  store_own_word(thread, shared);
  load_word_of(thread ^ 1, shared);
}

KERNEL(lanes_with_sync_warp, 1, 32, 1024) {
  store_own_word(thread, shared);
  sync_warp();
  load_word_of(thread ^ 1, shared);
}

KERNEL(shuffle_orders_no_memory, 1, 32, 1024) {
  store_own_word(thread, shared);
  shuffle_xor(thread, 1);
  load_word_of(thread ^ 1, shared);
}

// The word has more readers than a cell of the race detector stores in itself (kInlineReads).
KERNEL(store_after_many_readers, 1, 128, 1024) {
  if (thread == 0) store_shared(shared, 1);
  sync_threads();
  load_word_of(0, shared);
  sync_warp();
  if (thread == 127) store_shared(shared, 2);
}

KERNEL(store_after_many_ordered_readers, 1, 128, 1024) {
  if (thread == 0) store_shared(shared, 1);
  sync_threads();
  load_word_of(0, shared);
  sync_threads();
  if (thread == 127) store_shared(shared, 2);
}

// barrier_arrive orders accesses before the arrival, but none after it. The first kernel is correct, the second one is
// not.
KERNEL(ordered_by_arrival, 1, 64, 1024) {
  if (thread < 32) {
    store_own_word(thread, shared);
    barrier_arrive<1>(64);
  } else {
    barrier_sync<1>(64);
    load_word_of(thread - 32, shared);
  }
}

KERNEL(store_after_arrival, 1, 64, 1024) {
  if (thread < 32) {
    barrier_arrive<1>(64);
    store_own_word(thread, shared);
  } else {
    barrier_sync<1>(64);
    load_word_of(thread - 32, shared);
  }
}

// Two warpgroups take turns, by two named barriers. The test checks that their stores alternate.
KERNEL(ping_pong, 1, 256, 1024) {
  const bool is_first = thread < 128;
  const auto my_turn = [&] { is_first ? barrier_sync<1>(256) : barrier_sync<2>(256); };
  const auto your_turn = [&] { is_first ? barrier_arrive<2>(256) : barrier_arrive<1>(256); };
  if (!is_first) your_turn();
  for (int i = 0; i < 4; i++) {
    my_turn();
    store_own_word(thread % 128, shared);
    if (thread % 128 == 0) store_global(memory.floats + atomic_fetch_add(memory.counters, 1), is_first ? 1.f : 2.f);
    your_turn();
  }
  if (is_first) my_turn();
}

// ---- Addresses

KERNEL(shared_out_of_range, 1, 32, 1024) { store_shared(shared + 1024, 1); }
KERNEL(shared_misaligned, 1, 32, 1024) { load_shared<Vec4>(shared + 8); }
KERNEL(too_much_shared_memory, 1, 32, 227 * 1024 + 16) {}
KERNEL(all_shared_memory, 1, 32, 227 * 1024) {}
KERNEL(global_out_of_range, 1, 32, 0) { store_global(memory.floats + 4096 - 31 + thread, 1.f); }
KERNEL(global_misaligned, 1, 32, 0) { load_global(reinterpret_cast<const Vec4*>(memory.floats + 1)); }
KERNEL(copy_of_nothing_misaligned, 1, 32, 1024) {
  copy_async_16(shared + 16 * thread, memory.read_only + 2, false);
  copy_async_commit();
  copy_async_wait<0>();
}
KERNEL(global_read_only, 1, 32, 0) { store_global(const_cast<float*>(memory.read_only), 1.f); }
KERNEL(raw_access_to_global, 1, 32, 0) { memory.floats[thread] = 1; }
KERNEL(raw_access_to_shared, 1, 32, 1024) { shared_memory()[thread] = 1; }

int recurse(volatile int* deeper) {
  volatile int here[1024];
  here[0] = *deeper;
  return here[0] < 0 ? 0 : recurse(here) + here[0];
}

KERNEL(stack_overflow, 1, 32, 0) {
  volatile int start = thread;
  recurse(&start);
}

// ---- Blocks among themselves

KERNEL(spinning_on_another_block, 2, 32, 0) {
  while (load_global(memory.counters) != 1) {
  }
}

KERNEL(blocks_write_the_same, 2, 32, 0) { store_global(memory.floats + thread, 1.f); }
KERNEL(blocks_add_to_the_same, 2, 32, 0) { atomic_add(memory.floats + thread, 1.f); }
KERNEL(block_reads_what_another_wrote, 2, 32, 0) {
  if (block_index_x() == 0) store_global(memory.floats + thread, 1.f);
  if (block_index_x() == 1) load_global(memory.floats + thread);
}

KERNEL(blocks_in_order, 3, 64, 0) {
  if (thread == 0) wait_until_equal(memory.counters, block_index_x());
  sync_threads();
  store_global(memory.floats + thread, load_global(memory.floats + thread) + 1);
  sync_threads();
  if (thread == 0) add_release(memory.counters, 1);
}

KERNEL(threads_write_the_same, 1, 64, 0) { store_global(memory.floats + thread % 32, 1.f); }
KERNEL(thread_reads_what_another_wrote, 1, 64, 0) {
  store_global(memory.floats + thread, 1.f);
  load_global(memory.floats + (thread + 32) % 64);
}
KERNEL(thread_writes_what_another_has_read, 1, 64, 0) {
  load_global(memory.floats + (thread + 32) % 64);
  store_global(memory.floats + thread, 1.f);
}
// One thread writes what its warp has read.
KERNEL(warp_reads_before_it_writes, 1, 32, 0) {
  load_global(memory.floats);
  sync_warp();
  if (thread == 0) store_global(memory.floats, 1.f);
}
// Two threads write the two halves of a word, or the same half.
KERNEL(threads_write_halves_of_a_word, 1, 64, 0) {
  store_global(reinterpret_cast<uint16_t*>(memory.floats) + thread, uint16_t{1});
}
KERNEL(threads_write_the_same_half, 1, 64, 0) {
  store_global(reinterpret_cast<uint16_t*>(memory.floats) + thread % 32, uint16_t{1});
}
KERNEL(threads_exchange_in_global, 1, 64, 0) {
  store_global(memory.floats + thread, 1.f);
  sync_threads();
  load_global(memory.floats + (thread + 32) % 64);
}

// Block 0 writes and raises a counter. Block 1 waits for the counter and reads what another thread of block 0 wrote.
// The flags leave out a synchronisation, or write after the counter was raised.
void pass_on(const Memory& memory, int thread, bool syncs_before, bool syncs_after, bool writes_later = false) {
  if (block_index_x() == 0) {
    if (!writes_later) store_global(memory.floats + thread, 1.f);
    if (syncs_before) sync_threads();
    if (thread == 0) add_release(memory.counters, 1);
    if (writes_later) store_global(memory.floats + thread, 1.f);
  } else {
    if (thread == 0) wait_until_equal(memory.counters, 1);
    if (syncs_after) sync_threads();
    load_global(memory.floats + (thread + 32) % 64);
  }
}
KERNEL(block_passes_on, 2, 64, 0) { pass_on(memory, thread, true, true); }
KERNEL(counted_before_all_have_written, 2, 64, 0) { pass_on(memory, thread, false, true); }
KERNEL(read_by_one_that_has_not_waited, 2, 64, 0) { pass_on(memory, thread, true, false); }
KERNEL(written_after_it_was_counted, 2, 64, 0) { pass_on(memory, thread, true, true, true); }

KERNEL(waiting_for_a_neighbour, 2, 32, 0) {
  if (thread == 0) wait_until_equal(memory.counters, 1 - block_index_x());
  if (thread == 0) add_release(memory.counters, 1);
}

KERNEL(waiting_for_a_later_block, 3, 32, 0) {
  if (thread == 0) wait_until_equal(memory.counters, 2 - block_index_x());
  if (thread == 0) add_release(memory.counters, 1);
}

KERNEL(work_by_a_counter, 3, 32, 0) {
  if (thread != 0) return;
  for (int item; (item = atomic_fetch_add(memory.counters, 1)) < 12;)
    store_global(memory.floats + item, block_index_x() + 1.f);
}

// ---- Divergence and deadlocks

KERNEL(sync_in_half_a_warp, 1, 32, 0) {
  if (thread < 16) sync_threads();
}
KERNEL(sync_in_a_part_of_the_block, 1, 96, 0) {
  if (thread < 64) sync_threads();
}
KERNEL(barriers_of_different_number, 1, 64, 0) {
  if (thread < 32)
    barrier_sync<1>(64);
  else
    barrier_sync<2>(64);
}
KERNEL(barrier_with_different_counts, 1, 96, 0) {
  if (thread < 32)
    barrier_sync<1>(64);
  else
    barrier_sync<1>(96);
}
KERNEL(arrival_that_nobody_waits_for, 1, 64, 0) {
  if (thread < 32) barrier_arrive<1>(64);
}
KERNEL(shuffle_in_half_a_warp, 1, 32, 0) {
  if (thread < 16) shuffle_xor(1, 1);
}
KERNEL(lanes_in_different_operations, 1, 32, 0) {
  if (thread < 16)
    shuffle_xor(1, 1);
  else
    sync_warp();
}

// ---- mbarriers

KERNEL(mbarrier_hands_over, 1, 64, 1024) {
  if (thread == 0) mbarrier_init(shared, 32);
  sync_threads();
  if (thread < 32) {
    store_shared(shared + 64 + 4 * thread, thread);
    mbarrier_arrive(shared);
  } else {
    mbarrier_wait(shared, 0);
    load_shared<int>(shared + 64 + 4 * (thread - 32));
  }
}

KERNEL(mbarrier_not_waited_for, 1, 64, 1024) {
  if (thread == 0) mbarrier_init(shared, 32);
  sync_threads();
  if (thread < 32) {
    store_shared(shared + 64 + 4 * thread, thread);
    mbarrier_arrive(shared);
  } else {
    if (thread == 32) mbarrier_wait(shared, 0);
    load_shared<int>(shared + 64 + 4 * (thread - 32));
  }
}

KERNEL(mbarrier_without_init, 1, 32, 1024) { mbarrier_arrive(shared); }
KERNEL(mbarrier_initialised_twice, 1, 32, 1024) { mbarrier_init(shared, 1); }
KERNEL(mbarrier_init_without_sync, 1, 64, 1024) {
  if (thread == 0) mbarrier_init(shared, 64);
  mbarrier_arrive(shared);
}
KERNEL(mbarrier_wrong_parity, 1, 64, 1024) {
  if (thread == 0) mbarrier_init(shared, 1);
  sync_threads();
  if (thread == 32) mbarrier_arrive(shared);
  mbarrier_wait(shared, 0);
  mbarrier_wait(shared, 1);
}
KERNEL(mbarrier_too_many_arrivals, 1, 32, 1024) {
  if (thread == 0) mbarrier_init(shared, 2);
  sync_threads();
  if (thread == 0) mbarrier_arrive_expect(shared, 16);
  if (thread < 2) mbarrier_arrive(shared);
}
KERNEL(store_over_an_mbarrier, 1, 32, 1024) {
  if (thread == 0) mbarrier_init(shared, 1);
  sync_threads();
  if (thread == 0) store_shared(shared + 4, 1);
}
KERNEL(bytes_that_never_come, 1, 32, 1024) {
  if (thread != 0) return;
  mbarrier_init(shared, 1);
  mbarrier_arrive_expect(shared, 16);
}

// ---- cp.async

KERNEL(copies_in_order, 1, 64, 1024) {
  copy_async_16(shared + 16 * thread, memory.read_only + 4 * thread, true);
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  load_shared<Vec4>(shared + 16 * (63 - thread));
}
KERNEL(copy_read_before_its_wait, 1, 32, 1024) {
  copy_async_16(shared + 16 * thread, memory.read_only + 4 * thread, true);
  copy_async_commit();
  load_shared<Vec4>(shared + 16 * thread);
  copy_async_wait<0>();
}
KERNEL(copy_wait_too_weak, 1, 32, 2048) {
  for (int i = 0; i < 2; i++) {
    copy_async_16(shared + 1024 * i + 16 * thread, memory.read_only + 4 * thread, true);
    copy_async_commit();
  }
  copy_async_wait<1>();
  load_shared<Vec4>(shared + 1024 + 16 * thread);
  copy_async_wait<0>();
}
KERNEL(copy_of_another_thread_without_sync, 1, 64, 1024) {
  copy_async_16(shared + 16 * thread, memory.read_only + 4 * thread, true);
  copy_async_commit();
  copy_async_wait<0>();
  load_shared<Vec4>(shared + 16 * (63 - thread));
}
KERNEL(copy_without_a_wait, 1, 32, 1024) { copy_async_16(shared + 16 * thread, memory.read_only, true); }

// ---- TMA: 1024 bytes of `floats` at `shared`, mbarrier behind them

constexpr int kBoxBytes = 1024;

void init_mbarrier(int thread, uint32_t mbarrier) {
  if (thread == 0) {
    mbarrier_init(mbarrier, 1);
    fence_mbarrier_init();
  }
  sync_threads();
}

void load_box(const Memory& memory, uint32_t destination, uint32_t mbarrier) {
  mbarrier_arrive_expect(mbarrier, kBoxBytes);
  tma_load_4d(destination, &memory.map, mbarrier, 0, 0, 0, 0);
}

KERNEL(tma_round_trip, 1, 64, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) load_box(memory, shared, mbarrier);
  mbarrier_wait(mbarrier, 0);
  const float value = load_shared<float>(shared + 4 * thread);
  sync_threads();
  store_shared(shared + 4 * thread, value + 1);
  fence_async_proxy();
  sync_threads();
  if (thread == 0) {
    tma_store_4d(&memory.map, shared, 0, 8, 0, 0);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
  sync_threads();
  store_shared(shared + 4 * thread, 0.f);
}

KERNEL(tma_load_not_waited_for, 1, 64, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) load_box(memory, shared, mbarrier);
  if (thread < 32) mbarrier_wait(mbarrier, 0);
  load_shared<float>(shared + 4 * thread);
}

// The box may still be on its way when the block has ended, and its shared memory belongs to another block.
KERNEL(tma_load_that_nobody_waits_for, 1, 32, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) load_box(memory, shared, mbarrier);
}

// A wait for one mbarrier says nothing about another mbarrier.
KERNEL(tma_load_wrong_mbarrier_waited_for, 1, 32, 4096) {
  const uint32_t mbarriers = shared + 2 * kBoxBytes;
  if (thread == 0) {
    mbarrier_init(mbarriers, 1);
    mbarrier_init(mbarriers + 8, 1);
    fence_mbarrier_init();
  }
  sync_threads();
  if (thread == 0) {
    load_box(memory, shared, mbarriers);
    load_box(memory, shared + kBoxBytes, mbarriers + 8);
  }
  mbarrier_wait(mbarriers + 8, 0);
  load_shared<float>(shared + 4 * thread);
}

KERNEL(tma_without_fence_mbarrier_init, 1, 32, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  if (thread == 0) mbarrier_init(mbarrier, 1);
  sync_threads();
  if (thread == 0) load_box(memory, shared, mbarrier);
  mbarrier_wait(mbarrier, 0);
}

KERNEL(tma_over_what_is_still_read, 1, 64, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  for (int i = 0; i < 2; i++) {
    if (thread == 0) load_box(memory, shared, mbarrier);
    mbarrier_wait(mbarrier, i);
    load_shared<float>(shared + 4 * thread);
  }
}

KERNEL(tma_store_without_proxy_fence, 1, 64, 2048) {
  store_shared(shared + 4 * thread, 1.f);
  sync_threads();
  if (thread == 0) {
    tma_store_4d(&memory.map, shared, 0, 8, 0, 0);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

KERNEL(tma_store_source_overwritten, 1, 64, 2048) {
  store_shared(shared + 4 * thread, 1.f);
  fence_async_proxy();
  sync_threads();
  if (thread == 0) {
    tma_store_4d(&memory.map, shared, 0, 8, 0, 0);
    tma_store_commit();
  }
  sync_threads();
  store_shared(shared + 4 * thread, 2.f);
  if (thread == 0) tma_store_wait<0>();
}

KERNEL(tma_store_without_a_wait, 1, 32, 2048) {
  if (thread == 0) {
    tma_store_4d(&memory.map, shared, 0, 8, 0, 0);
    tma_store_commit();
  }
}

KERNEL(tma_misaligned, 1, 32, 4096) {
  const uint32_t mbarrier = shared;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) load_box(memory, shared + 128, mbarrier);
}

KERNEL(tma_misaligned_for_rows_of_64_bytes, 1, 32, 4096) {
  const uint32_t mbarrier = shared;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) tma_load_4d(shared + 256, &memory.narrow_map, mbarrier, 0, 0, 0, 0);
}

KERNEL(tma_store_before_the_tensor, 1, 32, 2048) {
  if (thread == 0) tma_store_4d(&memory.map, shared, 0, -5, 0, 0);
}

KERNEL(tma_reduce_before_the_tensor, 1, 32, 2048) {
  if (thread == 0) tma_reduce_add_4d(&memory.map, shared, 0, 0, 0, -1);
}

KERNEL(tma_begins_within_a_chunk, 1, 32, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) tma_load_4d(shared, &memory.map, mbarrier, 2, 0, 0, 0);
}

KERNEL(tma_expects_half_the_bytes, 1, 32, 2048) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  if (thread == 0) {
    mbarrier_arrive_expect(mbarrier, kBoxBytes / 2);
    tma_load_4d(shared, &memory.map, mbarrier, 0, 0, 0, 0);
  }
  mbarrier_wait(mbarrier, 0);
}

// ---- Bulk stores, which other blocks are to see

constexpr int kSumBytes = 128;

// The step of the protocol between blocks that a kernel below leaves out or gets wrong. primitives.h describes the
// protocol at add_release.
enum class Fault {
  kNone,
  kNoTurn,
  kSameTurn,
  kTurnTooLate,
  kNotCounted,
  kNoFenceBefore,
  kNoWait,
  kSourceWaitedFor,
  kNoFenceAfter,
};

// Writes 32 ones to shared memory at `source`, as the source of bulk stores.
void store_ones(int thread, uint32_t source) {
  store_shared(source + 4 * thread, 1.f);
  fence_async_proxy();
  sync_threads();
}

// Waits until the bulk stores of this thread are complete, and raises the counter that tells other blocks.
void publish(int* counter, Fault fault) {
  tma_store_commit();
  if (fault == Fault::kSourceWaitedFor) tma_store_wait_read<0>();
  if (fault != Fault::kSourceWaitedFor && fault != Fault::kNoWait) tma_store_wait<0>();
  if (fault != Fault::kNoFenceAfter) fence_async_proxy_global();
  if (fault != Fault::kNotCounted || block_index_x() != 1) add_release(counter, 1);
  tma_store_wait<0>();
}

// Each block adds 32 ones to the same sums when the counter shows its turn. The first one stores instead.
void add_in_turn(const Memory& memory, int thread, uint32_t shared, int turn, Fault fault) {
  store_ones(thread, shared);
  if (thread != 0) return;
  const int counted = turn + (fault == Fault::kTurnTooLate) - (fault == Fault::kSameTurn && turn == 1);
  if (fault != Fault::kNoTurn) wait_until_equal(memory.counters, counted);
  if (fault != Fault::kNoFenceBefore) fence_async_proxy_global();
  if (turn == 0)
    bulk_store(memory.floats, shared, kSumBytes);
  else
    bulk_reduce_add_f32(memory.floats, shared, kSumBytes);
  publish(memory.counters, fault);
}

#define ADD_IN_TURN(name, fault) \
  KERNEL(name, 3, 32, 1024) { add_in_turn(memory, thread, shared, block_index_x(), Fault::fault); }
ADD_IN_TURN(sums_in_turn, kNone)
ADD_IN_TURN(sums_without_a_turn, kNoTurn)
ADD_IN_TURN(sums_with_the_same_turn, kSameTurn)
ADD_IN_TURN(sums_with_a_turn_too_late, kTurnTooLate)
ADD_IN_TURN(sums_not_counted, kNotCounted)
ADD_IN_TURN(sums_without_fence_before, kNoFenceBefore)
ADD_IN_TURN(sums_without_a_wait, kNoWait)
ADD_IN_TURN(sums_whose_source_is_waited_for, kSourceWaitedFor)
ADD_IN_TURN(sums_without_fence_after, kNoFenceAfter)
KERNEL(sums_from_the_last_block_on, 3, 32, 1024) {
  add_in_turn(memory, thread, shared, 2 - block_index_x(), Fault::kNone);
}

// Block 0 stores a box. Block 1 reads the box: by ordinary loads, by a bulk load, or by a TMA load.
enum class Reader { kOrdinary, kBulk, kTma };

void hand_over(const Memory& memory, int thread, uint32_t shared, Reader reader, Fault fault) {
  const uint32_t mbarrier = shared + kBoxBytes;
  init_mbarrier(thread, mbarrier);
  if (block_index_x() == 0) {
    store_ones(thread, shared);
    if (thread != 0) return;
    tma_store_4d(&memory.map, shared, 0, 0, 0, 0);
    publish(memory.counters, fault);
  } else if (thread == 0) {
    wait_until_equal(memory.counters, 1);
    if (reader == Reader::kOrdinary) {
      load_global(memory.floats);
      return;
    }
    if (fault != Fault::kNoFenceBefore) fence_async_proxy_global();
    if (reader == Reader::kTma) {
      load_box(memory, shared, mbarrier);
    } else {
      mbarrier_arrive_expect(mbarrier, kSumBytes);
      bulk_load(shared, memory.floats, kSumBytes, mbarrier);
    }
    mbarrier_wait(mbarrier, 0);
  }
}

#define HAND_OVER(name, reader, fault) \
  KERNEL(name, 2, 32, 2048) { hand_over(memory, thread, shared, Reader::reader, Fault::fault); }
HAND_OVER(box_read_by_loads, kOrdinary, kNone)
HAND_OVER(box_read_by_a_bulk_load, kBulk, kNone)
HAND_OVER(box_read_by_tma, kTma, kNone)
HAND_OVER(box_not_fenced_by_its_writer, kOrdinary, kNoFenceAfter)
HAND_OVER(box_not_complete, kOrdinary, kSourceWaitedFor)
HAND_OVER(box_not_fenced_before_a_bulk_load, kBulk, kNoFenceBefore)
HAND_OVER(box_not_fenced_before_tma, kTma, kNoFenceBefore)

// Block 0 writes with ordinary stores, and block 1 adds with a bulk operation. Then, too, block 1 needs a fence after
// its wait.
void add_to_stored(const Memory& memory, int thread, uint32_t shared, bool fences) {
  store_ones(thread, shared);
  if (thread != 0) return;
  if (block_index_x() == 0) {
    store_global(memory.floats, 1.f);
    add_release(memory.counters, 1);
  } else {
    wait_until_equal(memory.counters, 1);
    if (fences) fence_async_proxy_global();
    bulk_reduce_add_f32(memory.floats, shared, kSumBytes);
    tma_store_commit();
    tma_store_wait<0>();
  }
}
KERNEL(sum_onto_stored_values, 2, 32, 1024) { add_to_stored(memory, thread, shared, true); }
KERNEL(sum_onto_stored_values_without_fence, 2, 32, 1024) { add_to_stored(memory, thread, shared, false); }

// A proxy fence counts for accesses after it by the thread that executes it. Here another thread of the block makes the
// access.
KERNEL(fence_of_another_thread, 2, 64, 1024) {
  store_ones(thread, shared);
  if (block_index_x() == 0) {
    if (thread != 0) return;
    bulk_store(memory.floats, shared, kSumBytes);
    publish(memory.counters, Fault::kNone);
    return;
  }
  if (thread == 0) wait_until_equal(memory.counters, 1);
  sync_threads();
  if (thread == 0) fence_async_proxy_global();
  if (thread != 32) return;
  bulk_reduce_add_f32(memory.floats, shared, kSumBytes);
  tma_store_commit();
  tma_store_wait<0>();
}

// After wait_read, the source may be overwritten, and global memory still gets the old values. The test checks the
// values.
KERNEL(source_reused_after_wait_read, 1, 32, 1024) {
  store_ones(thread, shared);
  if (thread == 0) {
    bulk_store(memory.floats, shared, kSumBytes);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
  sync_threads();
  store_shared(shared + 4 * thread, 2.f);
  if (thread == 0) tma_store_wait<0>();
  sync_threads();
  store_global(memory.floats + 32 + thread, load_global(memory.floats + thread));
}

KERNEL(own_bulk_store_read_too_early, 1, 32, 1024) {
  store_ones(thread, shared);
  if (thread != 0) return;
  bulk_store(memory.floats, shared, kSumBytes);
  tma_store_commit();
  tma_store_wait_read<0>();
  load_global(memory.floats);
  tma_store_wait<0>();
}

KERNEL(own_sums_in_any_order, 1, 32, 1024) {
  store_ones(thread, shared);
  if (thread != 0) return;
  bulk_reduce_add_f32(memory.floats, shared, kSumBytes);
  bulk_reduce_add_f32(memory.floats, shared, kSumBytes);
  tma_store_commit();
  tma_store_wait<0>();
}

// The first warp fills the same slot of shared memory three times. A thread of the second warp stores the slot to
// global memory each time, and then frees the slot.
void store_by_way_of_a_slot(const Memory& memory, int thread, uint32_t shared, bool fences, bool frees_late) {
  const uint32_t full = shared + 512, empty = full + 8;
  if (thread == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 1);
  }
  sync_threads();
  for (uint32_t i = 0; i < 3; i++) {
    if (thread < 32) {
      mbarrier_wait(empty, i % 2 ^ 1);
      store_shared(shared + 4 * thread, float(i));
      mbarrier_arrive(full);
    } else if (thread == 32) {
      mbarrier_wait(full, i % 2);
      if (fences) fence_async_proxy();
      bulk_store(memory.floats + 32 * i, shared, kSumBytes);
      tma_store_commit();
      if (frees_late) tma_store_wait_read<0>();
      mbarrier_arrive(empty);
      tma_store_wait_read<0>();
    }
  }
}
KERNEL(slot_stored_and_freed, 1, 64, 1024) { store_by_way_of_a_slot(memory, thread, shared, true, true); }
KERNEL(slot_without_fence_of_its_reader, 1, 64, 1024) { store_by_way_of_a_slot(memory, thread, shared, false, true); }
KERNEL(slot_freed_too_early, 1, 64, 1024) { store_by_way_of_a_slot(memory, thread, shared, true, false); }

// ---- wgmma: 64 x 16 times 16 x 64, both operands the same 8192 bytes at `shared`

constexpr int kTileBytes = 8192;

void store_tile(int thread, uint32_t shared) {
  for (int i = 16 * (thread % 128); i < kTileBytes; i += 16 * 128) store_shared(shared + i, Vec4{0, 0, 0, 0});
}

uint64_t tile_descriptor(uint32_t shared) { return matrix_descriptor(shared, 0, 1024); }

void issue(float (&d)[32], uint32_t shared) {
  wgmma_ss<bf16_t, 64, 0, 0>(d, tile_descriptor(shared), tile_descriptor(shared), false);
}

void store_and_sync(int thread, uint32_t shared) {
  store_tile(thread, shared);
  fence_async_proxy();
  sync_threads();
}

KERNEL(wgmma_in_order, 1, 128, kTileBytes) {
  float d[32], e[32];
  for (int i = 0; i < 2; i++) {
    store_and_sync(thread, shared);
    wgmma_fence();
    issue(d, shared);
    wgmma_commit();
    wgmma_fence();
    issue(e, shared);
    wgmma_commit();
    wgmma_wait<1>();
    for (float& x : d) x += 1;
    wgmma_wait<0>();
    sync_threads();
  }
}

KERNEL(wgmma_without_proxy_fence, 1, 128, kTileBytes) {
  float d[32];
  store_tile(thread, shared);
  sync_threads();
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  wgmma_wait<0>();
}

// One warpgroup writes to shared memory with ordinary stores, and arrives at an mbarrier. The other warpgroup waits,
// executes the proxy fence, and multiplies. This is correct, though the writing threads execute no fence.
void multiply_what_another_wrote(int thread, uint32_t shared, bool fences_before, bool fences_after) {
  const uint32_t mbarrier = shared + kTileBytes;
  if (thread == 0) mbarrier_init(mbarrier, 128);
  sync_threads();
  if (thread < 128) {
    store_tile(thread, shared);
    mbarrier_arrive(mbarrier);
    return;
  }
  float d[32];
  if (fences_before) fence_async_proxy();
  mbarrier_wait(mbarrier, 0);
  if (fences_after) fence_async_proxy();
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  wgmma_wait<0>();
}
KERNEL(wgmma_fenced_by_its_reader, 1, 256, kTileBytes + 16) {
  multiply_what_another_wrote(thread, shared, false, true);
}
KERNEL(wgmma_not_fenced_by_its_reader, 1, 256, kTileBytes + 16) {
  multiply_what_another_wrote(thread, shared, false, false);
}
KERNEL(wgmma_fenced_before_its_wait, 1, 256, kTileBytes + 16) {
  multiply_what_another_wrote(thread, shared, true, false);
}

// Two products on the same accumulators, which have been forgotten before. The first product must overwrite them.
void multiply_after_forgetting(int thread, uint32_t shared, bool accumulates) {
  float d[32];
  store_and_sync(thread, shared);
  forget_registers(d);
  wgmma_fence();
  for (int i = 0; i < 2; i++)
    wgmma_ss<bf16_t, 64, 0, 0>(d, tile_descriptor(shared), tile_descriptor(shared), accumulates || i > 0);
  wgmma_commit();
  wgmma_wait<0>();
}
KERNEL(wgmma_onto_forgotten_registers, 1, 128, kTileBytes) { multiply_after_forgetting(thread, shared, false); }
KERNEL(wgmma_accumulates_onto_forgotten_registers, 1, 128, kTileBytes) {
  multiply_after_forgetting(thread, shared, true);
}

KERNEL(registers_forgotten_in_flight, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  forget_registers(d);
  wgmma_wait<0>();
}

// The caller checks the result.
KERNEL(forgotten_registers, 1, 32, 0) {
  float x[1] = {1};
  forget_registers(x);
  store_global(memory.floats + thread, x[0] + 1);
}

KERNEL(wgmma_without_fence, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  issue(d, shared);
  wgmma_commit();
  wgmma_wait<0>();
}

KERNEL(wgmma_second_group_without_fence, 1, 128, kTileBytes) {
  float d[32], e[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  issue(e, shared);
  wgmma_commit();
  wgmma_wait<0>();
}

KERNEL(wgmma_accumulators_touched, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  for (float& x : d) x = 1;
  wgmma_wait<0>();
}

KERNEL(wgmma_accumulators_touched_in_a_chain, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  for (float& x : d) x = 1;
  issue(d, shared);
  wgmma_commit();
  wgmma_wait<0>();
}

KERNEL(wgmma_operand_registers_touched, 1, 128, kTileBytes) {
  float d[32];
  uint32_t a[4] = {};
  store_and_sync(thread, shared);
  wgmma_fence();
  wgmma_rs<bf16_t, 64, 0>(d, a, tile_descriptor(shared), false);
  wgmma_commit();
  a[1] = 1;
  wgmma_wait<0>();
}

KERNEL(wgmma_source_overwritten, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  sync_threads();
  store_tile(thread, shared);
  wgmma_wait<0>();
}

// After wgmma_wait, a warp knows that its own part of the product is complete, but not that the parts of other warps
// are. So it must not overwrite the operands yet.
KERNEL(wgmma_wait_is_of_a_warp, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
  wgmma_wait<0>();
  if (thread == 0) store_shared(shared, 1);
}

KERNEL(wgmma_without_a_wait, 1, 128, kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared);
  wgmma_commit();
}

KERNEL(wgmma_with_different_descriptors, 1, 128, 2 * kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, thread == 77 ? shared + kTileBytes : shared);
}

KERNEL(wgmma_in_an_incomplete_warpgroup, 1, 160, kTileBytes) {
  if (thread >= 128) wgmma_fence();
}

KERNEL(wgmma_descriptor_within_the_swizzle, 1, 128, 2 * kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  issue(d, shared + 128);
}

KERNEL(wgmma_descriptor_within_the_swizzle_of_64_bytes, 1, 128, 2 * kTileBytes) {
  float d[32];
  store_and_sync(thread, shared);
  wgmma_fence();
  wgmma_ss<bf16_t, 64, 0, 0>(d, matrix_descriptor<64>(shared + 256, 0, 512), tile_descriptor(shared), false);
}

// ---- Registers

KERNEL(registers_within_budget, 1, 384, 0) {
  if (thread < 128)
    decrease_registers<24>();
  else
    increase_registers<240>();
}
KERNEL(registers_above_budget, 1, 384, 0) {
  if (thread < 128)
    decrease_registers<40>();
  else
    increase_registers<240>();
}
KERNEL(registers_of_one_warp, 1, 128, 0) {
  if (thread < 32) decrease_registers<24>();
}
KERNEL(registers_increased_by_a_decrease, 1, 384, 0) { decrease_registers<240>(); }

// ---- Bank conflicts

KERNEL(consecutive_words, 1, 32, 4096) { store_shared(shared + 4 * thread, 1); }
KERNEL(words_128_bytes_apart, 1, 32, 4096) { store_shared(shared + 128 * thread, 1); }
KERNEL(vectors_64_bytes_apart, 1, 32, 4096) { store_shared(shared + 64 * thread, Vec4{0, 0, 0, 0}); }
KERNEL(matrix_rows_128_bytes_apart, 1, 32, 4096) {
  uint32_t r[4] = {};
  store_matrix_x4(shared + 128 * thread, r);
}
KERNEL(matrix_rows_swizzled, 1, 32, 4096) {
  uint32_t r[4] = {};
  store_matrix_x4(shared + 128 * thread + 16 * (thread % 8), r);
}

std::string result;  // of the last launch

}  // namespace
}  // namespace fused_attn::gpu

using namespace fused_attn::gpu;

extern "C" const char* detect(const char* name, float* floats, const float* read_only, int* counters) {
  for (int i = 0; i < num_kernels; i++) {
    const Kernel& kernel = kernels[i];
    if (strcmp(kernel.name, name) != 0) continue;
    Memory memory = {floats, read_only, counters, {}, {}};
    for (int row_bytes : {128, 64}) {
      TensorMap& map = row_bytes == 128 ? memory.map : memory.narrow_map;
      const TensorMapSpec spec = {
          floats, Element::kF32, 4, {64, 64, 1, 1}, {4, 256, 16384, 16384}, {row_bytes / 4, 8, 1, 1}, row_bytes};
      result = encode_tensor_map(spec, &map);
      if (!result.empty()) return result.c_str();
    }
    result = launch(kernel.kernel, {kernel.blocks, 1, 1, kernel.threads, kernel.shared_bytes}, nullptr, memory);
    return result.c_str();
  }
  return "no such kernel";
}
