// Small kernels, most with one deliberate bug, for test_detectors.py: each bug has to be reported.
#include <cstring>

#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "cuda/tensor_map.h"

namespace fused_attn::gpu {
namespace {

struct Memory {
  float* floats;              // 4096 of them
  const float* read_only;     // 1024
  int* counters;              // 16, zero
  alignas(64) TensorMap map;  // of `floats` as 64 x 64, in boxes of 8 rows of 32 (128 bytes), swizzled
};

struct Kernel {
  const char* name;
  void (*kernel)(Memory);
  int blocks, threads, shared_bytes;
};

Kernel kernels[128];
int num_kernels = 0;

// KERNEL(name, blocks, threads, shared bytes) { body }: `shared` is the address of the first byte.
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

// More readers than the detector keeps with a word itself.
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

// barrier_arrive orders what came before it, and nothing after.
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

// Two warpgroups take turns; the order is checked by the caller.
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

// What another mbarrier has told says nothing about this one.
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

// Each warp knows from its wait that the product is complete as far as it is concerned, not for its neighbours.
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
    Memory memory = {floats, read_only, counters, {}};
    result = encode_tensor_map({floats, Element::kF32, 4, {64, 64, 1, 1}, {4, 256, 16384, 16384}, {32, 8, 1, 1}, 128},
                               &memory.map);
    if (!result.empty()) return result.c_str();
    result = launch(kernel.kernel, {kernel.blocks, 1, 1, kernel.threads, kernel.shared_bytes}, nullptr, memory);
    return result.c_str();
  }
  return "no such kernel";
}
