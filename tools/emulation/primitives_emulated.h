// The definitions of primitives.h on a CPU: each function calls the part of the emulation that implements it.
#pragma once
#include <cmath>

#include "block.h"
#include "cuda/primitives.h"
#include "errors.h"
#include "float16.h"
#include "global_memory.h"
#include "warp_matrix.h"

namespace fused_attn::gpu {

// ---- Where a thread is

inline int thread_index() { return emulation::block().current->index; }
inline int block_index_x() { return emulation::block().index.x; }
inline int block_index_y() { return emulation::block().index.y; }
inline int block_index_z() { return emulation::block().index.z; }
inline int grid_size_x() { return emulation::block().grid_size.x; }
inline int grid_size_y() { return emulation::block().grid_size.y; }
inline int grid_size_z() { return emulation::block().grid_size.z; }

// ---- Arithmetic

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline uint32_t float_bits(float x) { return emulation::bits_of(x); }
inline float bits_float(uint32_t bits) { return emulation::float_of(bits); }

template <class T>
inline uint32_t pack(float lo, float hi) {
  return emulation::to_16_bits(lo, kIsBf16<T>) | uint32_t(emulation::to_16_bits(hi, kIsBf16<T>)) << 16;
}

template <class T>
inline Float2 unpack(uint32_t pair) {
  return {emulation::from_16_bits(uint16_t(pair), kIsBf16<T>),
          emulation::from_16_bits(uint16_t(pair >> 16), kIsBf16<T>)};
}

// ---- Threads among themselves

inline void sync_threads() {
  emulation::Block& b = emulation::block();
  b.barriers.arrive(0, int(b.threads.size()), /*is_sync=*/true, "sync_threads");
}

inline void sync_warp() { emulation::sync_warp(); }

template <int Id>
inline void barrier_sync(int threads) {
  static_assert(Id > 0 && Id < emulation::kNumBarriers);
  emulation::block().barriers.arrive(Id, threads, /*is_sync=*/true, "barrier_sync");
}

template <int Id>
inline void barrier_arrive(int threads) {
  static_assert(Id > 0 && Id < emulation::kNumBarriers);
  emulation::block().barriers.arrive(Id, threads, /*is_sync=*/false, "barrier_arrive");
}

// What a lane passes to a shuffle: its value, and the number of the lane whose value it wants. The last lane of the
// warp to arrive sets the results of all lanes.
template <class V>
struct ShuffleOperand {
  V v, result;
  int from;  // lane

  static V exchange(const char* name, V v, int from) {
    static_assert(sizeof(V) == 4, "V has four bytes");
    ShuffleOperand own = {v, v, from};
    emulation::Warps& warps = emulation::block().warps;
    if (void** lanes = warps.meet_in_warp(name, &own)) {
      for (int i = 0; i < emulation::kWarpSize; i++) {
        auto& lane = *static_cast<ShuffleOperand*>(lanes[i]);
        lane.result = static_cast<ShuffleOperand*>(lanes[lane.from % emulation::kWarpSize])->v;
      }
      warps.release_warp();
    }
    return own.result;
  }
};

template <class V>
inline V shuffle_xor(V v, int lane_mask) {
  return ShuffleOperand<V>::exchange("shuffle_xor", v, emulation::block().current->lane ^ lane_mask);
}

template <class V>
inline V shuffle(V v, int lane) {
  return ShuffleOperand<V>::exchange("shuffle", v, lane);
}

inline uint32_t warp_ballot(bool is_true) {
  emulation::Warps& warps = emulation::block().warps;
  uint32_t bits = is_true;  // at first the bit of this lane; the last lane to arrive replaces it by the bits of all
  if (void** lanes = warps.meet_in_warp("warp_ballot", &bits)) {
    uint32_t ballot = 0;
    for (int i = 0; i < emulation::kWarpSize; i++) ballot |= *static_cast<uint32_t*>(lanes[i]) << i;
    for (int i = 0; i < emulation::kWarpSize; i++) *static_cast<uint32_t*>(lanes[i]) = ballot;
    warps.release_warp();
  }
  return bits;
}

inline bool warp_any(bool is_true) {
  emulation::Warps& warps = emulation::block().warps;
  if (void** lanes = warps.meet_in_warp("warp_any", &is_true)) {
    bool is_any = false;
    for (int i = 0; i < emulation::kWarpSize; i++) is_any |= *static_cast<bool*>(lanes[i]);
    for (int i = 0; i < emulation::kWarpSize; i++) *static_cast<bool*>(lanes[i]) = is_any;
    warps.release_warp();
  }
  return is_true;
}

// ---- Memory

inline char* shared_memory() { return reinterpret_cast<char*>(emulation::kSharedHandle); }

inline uint32_t shared_address(const void* shared) {
  return uint32_t(reinterpret_cast<uintptr_t>(shared) - emulation::kSharedHandle) + emulation::kSharedBase;
}

template <class V>
inline V load_shared(uint32_t address) {
  V v;
  emulation::load_shared(address, &v, sizeof(V));
  return v;
}

template <class V>
inline void store_shared(uint32_t address, V v) {
  emulation::store_shared(address, &v, sizeof(V));
}

template <class V>
inline V load_global(const V* p) {
  V v;
  memcpy(&v, emulation::global_read(p, sizeof(V), sizeof(V), "load_global"), sizeof(V));
  return v;
}

template <class V>
inline void store_global(V* p, V v) {
  const emulation::Epoch access = emulation::block().current->epoch();
  memcpy(emulation::global_write(p, sizeof(V), sizeof(V), "store_global", access), &v, sizeof(V));
}

inline void atomic_add(float* p, float v) { emulation::atomic_add(p, v); }
inline int atomic_fetch_add(int* p, int v) { return emulation::atomic_fetch_add(p, v); }
inline void add_release(int* counter, int v) { emulation::add_release(counter, v); }
inline void wait_until_equal(const int* counter, int value) { emulation::wait_until_equal(counter, value); }

// ---- cp.async

inline void copy_async_16(uint32_t address, const void* p, bool is_inside) {
  emulation::copy_async_16(address, p, is_inside);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int N>
inline void copy_async_wait() {
  emulation::copy_async_wait(N);
}

// ---- Matrix fragments of a warp

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  emulation::load_matrix(r, address, 4, /*is_transposed=*/false);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  emulation::load_matrix(r, address, 4, /*is_transposed=*/true);
}
inline void load_matrix_x2(uint32_t (&r)[2], uint32_t address) {
  emulation::load_matrix(r, address, 2, /*is_transposed=*/false);
}
inline void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t address) {
  emulation::load_matrix(r, address, 2, /*is_transposed=*/true);
}
inline void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  emulation::store_matrix(address, r, 4, /*is_transposed=*/false);
}
inline void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  emulation::store_matrix(address, r, 4, /*is_transposed=*/true);
}

template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulation::mma_m16n8k16(c, a, b, kIsBf16<T>);
}

// ---- mbarriers

inline void mbarrier_init(uint32_t address, int arrivals) { emulation::block().mbarriers.init(address, arrivals); }
inline void fence_mbarrier_init() { emulation::block().mbarriers.fence_init(); }
inline void mbarrier_arrive(uint32_t address) { emulation::block().mbarriers.arrive(address, 0); }
inline void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) {
  emulation::block().mbarriers.arrive(address, bytes);
}
inline void mbarrier_wait(uint32_t address, uint32_t parity) { emulation::block().mbarriers.wait(address, parity); }

inline void fence_async_proxy() {
  emulation::block().current->clock.fence();
  emulation::tick();
}
inline void fence_async_proxy_global() { emulation::block().current->clock.global.fence(); }

// ---- TMA

inline void tma_prefetch(const TensorMap* map) { emulation::tma_prefetch(*map); }

inline void tma_load_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0, int c1, int c2, int c3) {
  const int coordinates[4] = {c0, c1, c2, c3};
  emulation::tma_load(destination, *map, mbarrier, coordinates, 4);
}

inline void tma_store_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3) {
  const int coordinates[4] = {c0, c1, c2, c3};
  emulation::tma_write(*map, source, coordinates, 4, emulation::BulkWrite::kStore);
}

inline void tma_reduce_add_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3) {
  const int coordinates[4] = {c0, c1, c2, c3};
  emulation::tma_write(*map, source, coordinates, 4, emulation::BulkWrite::kAdd);
}

inline void bulk_load(uint32_t destination, const void* p, uint32_t bytes, uint32_t mbarrier) {
  emulation::bulk_load(destination, p, bytes, mbarrier);
}
inline void bulk_store(float* p, uint32_t source, uint32_t bytes) { emulation::bulk_store(p, source, bytes); }

inline void bulk_reduce_add_f32(float* p, uint32_t source, uint32_t bytes) {
  emulation::bulk_reduce_add_f32(p, source, bytes);
}

inline void tma_store_commit() { emulation::bulk_commit(); }
template <int N>
inline void tma_store_wait_read() {
  emulation::bulk_wait_read(N);
}
template <int N>
inline void tma_store_wait() {
  emulation::bulk_wait(N);
}

// ---- wgmma

inline void wgmma_fence() { emulation::block().wgmma.fence(); }
inline void wgmma_commit() { emulation::block().wgmma.commit(); }
template <int N>
inline void wgmma_wait() {
  emulation::block().wgmma.wait(N);
}

template <class T, int N, int TransA, int TransB>
inline void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulation::block().wgmma.issue(d, N, kIsBf16<T>, /*a=*/nullptr, a, b, TransA, TransB, accumulate);
}

template <class T, int N, int TransB>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulation::block().wgmma.issue(d, N, kIsBf16<T>, a, /*a_descriptor=*/0, b, /*is_a_transposed=*/false, TransB,
                                 accumulate);
}

// keep_registers and keep_computed only concern the compiler for GPUs, so they do nothing here.
template <int N>
inline void keep_registers(float (&)[N]) {}

// Fills the registers with NaN, so that a test notices a kernel that still uses their values.
template <int N>
inline void forget_registers(float (&r)[N]) {
  emulation::block().wgmma.forget(r, N);
}

inline uint32_t keep_computed(uint32_t x) { return x; }
inline int32_t keep_computed(int32_t x) { return x; }
template <class V>
inline const V* keep_computed(const V* p) {
  return p;
}

template <int R>
inline void increase_registers() {
  emulation::block().registers.change(R, /*is_increase=*/true);
}
template <int R>
inline void decrease_registers() {
  emulation::block().registers.change(R, /*is_increase=*/false);
}

}  // namespace fused_attn::gpu
