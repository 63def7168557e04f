// primitives.h on a GPU: each function is one or two instructions of PTX.
#pragma once
#include <cuda_fp16.h>

#include "primitives.h"

namespace fused_attn::gpu {

// ---- Where a thread is

GPU_DEVICE int thread_index() { return threadIdx.x; }
GPU_DEVICE int block_index_x() { return blockIdx.x; }
GPU_DEVICE int block_index_y() { return blockIdx.y; }
GPU_DEVICE int block_index_z() { return blockIdx.z; }
GPU_DEVICE int grid_size_x() {
  int size;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(size));  // volatile: otherwise a loop would hold the size in a register
  return size;
}
GPU_DEVICE int grid_size_y() { return gridDim.y; }
GPU_DEVICE int grid_size_z() { return gridDim.z; }

// ---- Arithmetic

GPU_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

GPU_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

GPU_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

GPU_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GPU_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GPU_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GPU_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
GPU_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

template <class T>
GPU_DEVICE uint32_t pack(float lo, float hi) {
  uint32_t pair;
  if constexpr (kIsBf16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  }
  return pair;
}

template <class T>
GPU_DEVICE Float2 unpack(uint32_t pair) {
  if constexpr (kIsBf16<T>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    __half2 halves;  // from two numbers of 16 bits, nvcc would put the word together again, by two instructions
    __builtin_memcpy(&halves, &pair, sizeof(halves));
    const float2 floats = __half22float2(halves);
    return {floats.x, floats.y};
  }
}

// ---- Threads among themselves

GPU_DEVICE void sync_threads() { __syncthreads(); }
GPU_DEVICE void sync_warp() { __syncwarp(); }

template <int Id>
GPU_DEVICE void barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

template <int Id>
GPU_DEVICE void barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

template <class V>
GPU_DEVICE V shuffle_xor(V v, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, v, lane_mask);
}

template <class V>
GPU_DEVICE V shuffle(V v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

GPU_DEVICE bool warp_any(bool is_true) { return __any_sync(0xffffffffu, is_true); }
GPU_DEVICE uint32_t warp_ballot(bool is_true) { return __ballot_sync(0xffffffffu, is_true); }

// ---- Memory

GPU_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

GPU_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

template <class V>
GPU_DEVICE V load_shared(uint32_t address) {
  union {
    V v;
    uint32_t words[4];
  } u;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(u.words[0]), "=r"(u.words[1]) : "r"(address) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(u.words[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(V) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(u.words[0]) : "r"(address) : "memory");
  } else {
    static_assert(sizeof(V) == 1, "V has 1, 2, 4, 8 or 16 bytes");
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(u.words[0]) : "r"(address) : "memory");
  }
  return u.v;
}

template <class V>
GPU_DEVICE void store_shared(uint32_t address, V v) {
  union {
    V v;
    uint32_t words[4];
  } u;
  u.v = v;
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(u.words[0]), "r"(u.words[1]),
                 "r"(u.words[2]), "r"(u.words[3])
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(u.words[0]), "r"(u.words[1]) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(u.words[0]) : "memory");
  } else if constexpr (sizeof(V) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "r"(u.words[0]) : "memory");
  } else {
    static_assert(sizeof(V) == 1, "V has 1, 2, 4, 8 or 16 bytes");
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(u.words[0]) : "memory");
  }
}

template <class V>
GPU_DEVICE V load_global(const V* p) {
  return *p;
}

template <class V>
GPU_DEVICE void store_global(V* p, V v) {
  *p = v;
}
// Of several assignments of a Vec4 or Float2, nvcc 13.0 splits the first one into stores of 4 bytes.
template <>
GPU_DEVICE void store_global(Vec4* p, Vec4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
template <>
GPU_DEVICE void store_global(Float2* p, Float2 v) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v.x), "f"(v.y) : "memory");
}

GPU_DEVICE void atomic_add(float* p, float v) { atomicAdd(p, v); }
GPU_DEVICE int atomic_fetch_add(int* p, int v) { return atomicAdd(p, v); }

GPU_DEVICE void add_release(int* counter, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(v) : "memory");
}

GPU_DEVICE void wait_until_equal(const int* counter, int value) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now != value);
}

// ---- cp.async

GPU_DEVICE void copy_async_16(uint32_t address, const void* p, bool is_inside) {
  const int bytes = is_inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(p), "r"(bytes) : "memory");
}

GPU_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
GPU_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Matrix fragments of a warp

GPU_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

GPU_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

GPU_DEVICE void load_matrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

GPU_DEVICE void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

GPU_DEVICE void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

GPU_DEVICE void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

template <class T>
GPU_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kIsBf16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- mbarriers

GPU_DEVICE void mbarrier_init(uint32_t address, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}

GPU_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

GPU_DEVICE void mbarrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

GPU_DEVICE void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

GPU_DEVICE void mbarrier_wait(uint32_t address, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(address),
      "r"(parity)
      : "memory");
}

GPU_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
GPU_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA

GPU_DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

GPU_DEVICE void tma_load_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0, int c1, int c2,
                            int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

GPU_DEVICE void tma_store_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

GPU_DEVICE void tma_reduce_add_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

GPU_DEVICE void bulk_load(uint32_t destination, const void* p, uint32_t bytes, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(p), "r"(bytes), "r"(mbarrier)
      : "memory");
}

GPU_DEVICE void bulk_store(float* p, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(p), "r"(source), "r"(bytes)
               : "memory");
}

GPU_DEVICE void bulk_reduce_add_f32(float* p, uint32_t source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(p), "r"(source),
               "r"(bytes)
               : "memory");
}

GPU_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int N>
GPU_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

template <int N>
GPU_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ---- wgmma

GPU_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GPU_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
GPU_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N>
GPU_DEVICE void keep_registers(float (&r)[N]) {
  GPU_UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}

template <int N>
GPU_DEVICE void forget_registers(float (&r)[N]) {
  GPU_UNROLL for (int i = 0; i < N; i++) asm volatile("" : "=f"(r[i]));
}

GPU_DEVICE uint32_t keep_computed(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
GPU_DEVICE int32_t keep_computed(int32_t x) { return static_cast<int32_t>(keep_computed(static_cast<uint32_t>(x))); }
template <class V>
GPU_DEVICE const V* keep_computed(const V* p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));  // otherwise the compiler would not know, and load from any kind of memory (LD)
  return p;
}

template <int R>
GPU_DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}

template <int R>
GPU_DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

}  // namespace fused_attn::gpu

#include "wgmma_ptx.h"
