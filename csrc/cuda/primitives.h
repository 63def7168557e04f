// All that a kernel may do with the hardware. Kernels use these functions and nothing else: no asm, no raw memory access,
// no built-in variable. So the same source runs on both kinds of hardware that hardware.h knows:
//
//   on a GPU       primitives_ptx.h defines the functions, each as one or two instructions of PTX
//   in the tests   tools/emulation/primitives_emulated.h does, with checks that no GPU makes
//
// Kernels include hardware.h, which includes this file.
//
// Addresses in shared memory are 32-bit numbers ("address"). Addresses in global memory are pointers. A matrix fragment is
// a named array that lives until the operation on it is complete. Shapes are constants.
#pragma once
#include <cstdint>

namespace fused_attn::gpu {

// ---- Types

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

template <class T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16_t> = true;

struct alignas(8) Vec2 {
  uint32_t x, y;
};
struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

// ---- Where a thread is

GPU_DEVICE int thread_index();
GPU_DEVICE int block_index_x();
GPU_DEVICE int block_index_y();
GPU_DEVICE int block_index_z();
GPU_DEVICE int grid_size_x();
GPU_DEVICE int grid_size_y();
GPU_DEVICE int grid_size_z();

// ---- Arithmetic

GPU_DEVICE int min(int a, int b) { return a < b ? a : b; }
GPU_DEVICE int max(int a, int b) { return a > b ? a : b; }
GPU_DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
GPU_DEVICE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
GPU_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b);  // upper half of the 64-bit product
GPU_DEVICE float multiply_add(float a, float b, float c);   // a * b + c, rounded once
GPU_DEVICE float exp2_approx(float x);                      // ex2.approx.ftz
GPU_DEVICE float log2_approx(float x);                      // lg2.approx.ftz
GPU_DEVICE uint32_t float_bits(float x);
GPU_DEVICE float bits_float(uint32_t bits);

// Two floats as 16-bit numbers T, rounded to nearest even, `lo` in the lower half; and back.
template <class T>
GPU_DEVICE uint32_t pack(float lo, float hi);
template <class T>
GPU_DEVICE Float2 unpack(uint32_t pair);

// ---- Threads among themselves

GPU_DEVICE void sync_threads();
GPU_DEVICE void sync_warp();  // also orders the warp's accesses to memory

// Named barriers 1..15 (0 is sync_threads): `threads` of them meet; those that arrive do not wait. The number is a constant
// because with one in a register ptxas would reserve all sixteen barriers.
template <int Id>
GPU_DEVICE void barrier_sync(int threads);
template <int Id>
GPU_DEVICE void barrier_arrive(int threads);

// All 32 lanes take part. V has four bytes.
template <class V>
GPU_DEVICE V shuffle_xor(V v, int lane_mask);
template <class V>
GPU_DEVICE V shuffle(V v, int lane);
GPU_DEVICE bool warp_any(bool is_true);

// ---- Memory. V has 1, 2, 4, 8 or 16 bytes and is as aligned as it is large.

GPU_DEVICE char* shared_memory();  // the block's dynamic shared memory, aligned to 1024 bytes
GPU_DEVICE uint32_t shared_address(const void* shared);
template <class V>
GPU_DEVICE V load_shared(uint32_t address);
template <class V>
GPU_DEVICE void store_shared(uint32_t address, V v);

template <class V>
GPU_DEVICE V load_global(const V* p);
template <class V>
GPU_DEVICE void store_global(V* p, V v);
GPU_DEVICE void atomic_add(float* p, float v);
GPU_DEVICE int atomic_fetch_add(int* p, int v);  // returns what was there before

// Order between blocks through a counter in global memory: `release` makes the block's earlier writes visible to whoever
// acquires the value. Call both from one thread, with sync_threads or a named barrier around as the block's threads need it.
// For what bulk stores write: tma_store_wait, fence_async_proxy_global, add_release; then, in the other block,
// wait_until_equal, fence_async_proxy_global, and the bulk operation that comes after.
GPU_DEVICE void add_release(int* counter, int v);
GPU_DEVICE void wait_until_equal(const int* counter, int value);  // acquires

// ---- cp.async: 16 bytes from global to shared memory; zeros if not is_inside (`p` is then not read)

GPU_DEVICE void copy_async_16(uint32_t address, const void* p, bool is_inside);
GPU_DEVICE void copy_async_commit();
template <int N>
GPU_DEVICE void copy_async_wait();  // until at most the N groups committed last are in flight

// ---- Matrix fragments of a warp. Lane l gives the address of row l % 8 (16 bytes) of the 8x8 matrix l / 8.
//
// Without transposition, lane l holds in r[i] row l / 4, columns 2 * (l % 4) and the next one, of matrix i.

GPU_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address);
GPU_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address);
GPU_DEVICE void load_matrix_x2(uint32_t (&r)[2], uint32_t address);
GPU_DEVICE void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t address);
GPU_DEVICE void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]);             // sm_90
GPU_DEVICE void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]);  // sm_90

// c (16x8, float) += a (16x16) * b (16x8). With g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 * (i & 1),  columns 2t + 8 * (i >> 1) and the next one
//   b_i:  rows 2t + 8 * i and the next one, column g
//   c[i]: row g + 8 * (i >> 1), column 2t + (i & 1)
template <class T>
GPU_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// ---- mbarriers (8 bytes of shared memory). A phase is complete when all arrivals and all expected bytes have come; waiting
// for parity 0 passes after the first, third, ... phase is complete, and a fresh barrier lets parity 1 pass.

GPU_DEVICE void mbarrier_init(uint32_t address, int arrivals);
GPU_DEVICE void fence_mbarrier_init();  // after all inits, before the block synchronises and TMA uses them
GPU_DEVICE void mbarrier_arrive(uint32_t address);
GPU_DEVICE void mbarrier_arrive_expect(uint32_t address, uint32_t bytes);
GPU_DEVICE void mbarrier_wait(uint32_t address, uint32_t parity);

// What ordinary instructions wrote to shared memory before it is visible to TMA and wgmma after it.
GPU_DEVICE void fence_async_proxy();
// Likewise for global memory, in both directions: between a counter that is waited for or raised with ordinary
// instructions and bulk stores whose order the counter decides.
GPU_DEVICE void fence_async_proxy_global();

// ---- TMA: boxes of a tensor, by one thread. Boxes may reach beyond the tensor: loads give zeros (and count their bytes),
// stores and additions skip. Only a load may begin before the tensor, at negative coordinates. c0 is a multiple of 16
// bytes. Tensor maps are made by encode_tensor_map (tensor_map.h).

GPU_DEVICE void tma_prefetch(const TensorMap* map);
GPU_DEVICE void tma_load_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0, int c1, int c2,
                            int c3);
GPU_DEVICE void tma_store_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3);
GPU_DEVICE void tma_reduce_add_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3);

// The same for contiguous memory: all addresses and `bytes` are multiples of 16.
GPU_DEVICE void bulk_load(uint32_t destination, const void* p, uint32_t bytes, uint32_t mbarrier);
GPU_DEVICE void bulk_store(float* p, uint32_t source, uint32_t bytes);
GPU_DEVICE void bulk_reduce_add_f32(float* p, uint32_t source, uint32_t bytes);

// Groups of the thread's stores and additions. wait_read: their sources may be written again; wait: they are complete.
GPU_DEVICE void tma_store_commit();
template <int N>
GPU_DEVICE void tma_store_wait_read();
template <int N>
GPU_DEVICE void tma_store_wait();

// ---- wgmma: d (64xN, float, over the 128 threads of a warpgroup) = a (64x16) * b (16xN) + (accumulate ? d : 0)
//
// Thread t holds in d[i] row 16 * (t / 32) + t % 32 / 4 + 8 * ((i >> 1) & 1), column 8 * (i >> 2) + 2 * (t % 4) + (i & 1).
// `a` in registers is laid out as for mma_m16n8k16, 16 rows a warp. b's descriptor gives b transposed, N x 16, with the 16
// contiguous (TransB = 0), or as it is, with the N contiguous (TransB = 1, "MN-major"); likewise TransA.

// Orders the registers of d and a that were touched before the next wgmma. One is demanded for each commit group.
GPU_DEVICE void wgmma_fence();
GPU_DEVICE void wgmma_commit();
template <int N>
GPU_DEVICE void wgmma_wait();

template <class T, int N, int TransA, int TransB>
GPU_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);
template <class T, int N, int TransB>
GPU_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

// Pins values where they are: the compiler moves no access to these registers across.
template <int N>
GPU_DEVICE void keep_registers(float (&r)[N]);

// The values are not wanted any more: a product that overwrites them need not preserve them.
template <int N>
GPU_DEVICE void forget_registers(float (&r)[N]);

// x, in a way that the compiler cannot compute it again and so keeps it in a register.
GPU_DEVICE uint32_t keep_computed(uint32_t x);

// Descriptor of a 16-bit matrix in shared memory, swizzled by 128 bytes, at the corner `address` of the operand.
//   contiguous along k:    rows of 128 bytes; groups of 8 rows lie stride_bytes apart; leading_bytes is not used
//   contiguous along m, n: columns of 64 elements; the next 8 of k lie stride_bytes on, the next 64 of m or n leading_bytes
GPU_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         kSwizzle128 << 62;
}

// What to add to a descriptor for an operand that lies `bytes` further on. Adding a constant is one instruction in
// uniform registers, where a descriptor made anew for each product takes thirteen.
GPU_DEVICE constexpr uint64_t matrix_descriptor_step(uint32_t bytes) { return bytes >> 4; }

// Registers of each of a warpgroup's threads from here on. Increasing waits until others have given theirs up.
template <int R>
GPU_DEVICE void increase_registers();
template <int R>
GPU_DEVICE void decrease_registers();

}  // namespace fused_attn::gpu
