// All that a kernel may do with the hardware. Kernels use these functions and nothing else: no asm, no raw memory
// access, no built-in variable. So the same source runs on both kinds of hardware that hardware.h knows:
//
//   on a GPU       primitives_ptx.h defines the functions, each as one or two instructions of PTX
//   in the tests   tools/emulation/primitives_emulated.h defines them, with checks that a GPU does not make
//
// Kernels include hardware.h, which includes this file.
//
// Addresses in shared memory are 32-bit numbers (`address`). Addresses in global memory are pointers. An array that
// holds a fragment has to live until the operation on it is complete. Shapes are template arguments.
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
GPU_DEVICE float max_or_nan(float a, float b);              // max.NaN: NaN if a or b is NaN, unlike fmaxf
GPU_DEVICE float exp2_approx(float x);                      // ex2.approx.ftz
GPU_DEVICE float log2_approx(float x);                      // lg2.approx.ftz
GPU_DEVICE float reciprocal_approx(float x);                // rcp.approx.ftz
// How many bits of x are set.
GPU_DEVICE int32_t count_bits(uint32_t x) { return __builtin_popcount(x); }
// The number of the lowest bit of x that is set. x must not be 0.
GPU_DEVICE int32_t lowest_bit(uint32_t x) { return count_bits(x ^ (x - 1)) - 1; }
GPU_DEVICE uint32_t float_bits(float x);
GPU_DEVICE float bits_float(uint32_t bits);

// pack: two floats as 16-bit numbers of type T, rounded to nearest even, with `lo` in the lower half of the word.
// unpack: the two numbers as floats.
template <class T>
GPU_DEVICE uint32_t pack(float lo, float hi);
template <class T>
GPU_DEVICE Float2 unpack(uint32_t pair);

// ---- Threads among themselves

GPU_DEVICE void sync_threads();
GPU_DEVICE void sync_warp();  // also orders the warp's accesses to memory

// Named barriers 1 to 15 (barrier 0 is sync_threads). `threads` threads meet at a barrier: those that call barrier_sync
// wait for all, those that call barrier_arrive do not wait. Id is a constant, because with a number in a register ptxas
// would reserve all sixteen barriers.
template <int Id>
GPU_DEVICE void barrier_sync(int threads);
template <int Id>
GPU_DEVICE void barrier_arrive(int threads);

// All 32 lanes of a warp take part. V has four bytes. shuffle returns the v of lane `lane`, shuffle_xor that of lane
// (own lane ^ lane_mask).
template <class V>
GPU_DEVICE V shuffle_xor(V v, int lane_mask);
template <class V>
GPU_DEVICE V shuffle(V v, int lane);
GPU_DEVICE bool warp_any(bool is_true);
GPU_DEVICE uint32_t warp_ballot(bool is_true);  // bit l is what lane l has passed

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

// Order between blocks of threads through a counter in global memory. add_release makes the block's earlier writes
// visible to whoever acquires the new value. One thread calls each function, with sync_threads or a named barrier
// around it for the other threads of its block.
//
// Bulk stores need fences as well. The block that writes calls tma_store_wait, fence_async_proxy_global and
// add_release. The other block calls wait_until_equal and fence_async_proxy_global before its bulk operation.
GPU_DEVICE void add_release(int* counter, int v);
GPU_DEVICE void wait_until_equal(const int* counter, int value);  // acquires

// ---- cp.async: copies 16 bytes from global to shared memory; writes zeros, and does not read `p`, if not is_inside

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

// ---- mbarriers (8 bytes of shared memory)
//
// A phase is complete when all arrivals and all expected bytes have come. A wait for parity 0 passes when the first,
// third, ... phase is complete. A wait for parity 1 passes at a fresh barrier, too.

GPU_DEVICE void mbarrier_init(uint32_t address, int arrivals);
GPU_DEVICE void fence_mbarrier_init();  // after all inits, before the block synchronises and TMA uses them
GPU_DEVICE void mbarrier_arrive(uint32_t address);
GPU_DEVICE void mbarrier_arrive_expect(uint32_t address, uint32_t bytes);
GPU_DEVICE void mbarrier_wait(uint32_t address, uint32_t parity);

// This fence makes what ordinary instructions wrote to shared memory before it visible to TMA and wgmma after it.
GPU_DEVICE void fence_async_proxy();
// The same for global memory, in both directions. This fence belongs between bulk stores and the counter that decides
// their order, because ordinary instructions raise the counter and wait for it.
GPU_DEVICE void fence_async_proxy_global();

// ---- TMA: one thread moves boxes of a tensor
//
// Boxes may reach beyond the tensor: loads then give zeros (and count their bytes), stores and additions leave out what
// is outside. Only a load may begin before the tensor, at negative coordinates. c0 is a multiple of 16 bytes.
// encode_tensor_map (tensor_map.h) makes tensor maps.

GPU_DEVICE void tma_prefetch(const TensorMap* map);
GPU_DEVICE void tma_load_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0, int c1, int c2,
                            int c3);
GPU_DEVICE void tma_store_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3);
GPU_DEVICE void tma_reduce_add_4d(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3);

// TMA for contiguous memory, without a tensor map. All addresses, and `bytes`, are multiples of 16.
GPU_DEVICE void bulk_load(uint32_t destination, const void* p, uint32_t bytes, uint32_t mbarrier);
GPU_DEVICE void bulk_store(float* p, uint32_t source, uint32_t bytes);
GPU_DEVICE void bulk_reduce_add_f32(float* p, uint32_t source, uint32_t bytes);

// The stores and additions that a thread has issued before a commit are a group. wait<N> waits until at most the N
// groups committed last are incomplete. After wait_read, the sources in shared memory of the waited groups may be
// written again. After wait, the groups are complete in global memory.
GPU_DEVICE void tma_store_commit();
template <int N>
GPU_DEVICE void tma_store_wait_read();
template <int N>
GPU_DEVICE void tma_store_wait();

// ---- wgmma: d (64xN, float, over the 128 threads of a warpgroup) = a (64x16) * b (16xN) + (accumulate ? d : 0)
//
// Thread t holds in d[i] row 16 * (t / 32) + t % 32 / 4 + 8 * ((i >> 1) & 1), column 8 * (i >> 2) + 2 * (t % 4) + (i &
// 1). `a` in registers is laid out as for mma_m16n8k16, with 16 rows for each warp. With TransB = 0, the descriptor of
// b gives b transposed: N x 16, of which the 16 are contiguous. With TransB = 1 ("MN-major"), it gives b itself, of
// which the N are contiguous. TransA means the same for a.

// Orders earlier accesses to the registers of d and a before the next wgmma. Each commit group needs a fence.
GPU_DEVICE void wgmma_fence();
GPU_DEVICE void wgmma_commit();
template <int N>
GPU_DEVICE void wgmma_wait();

template <class T, int N, int TransA, int TransB>
GPU_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);
template <class T, int N, int TransB>
GPU_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

// An empty instruction that reads and writes the registers r. So the compiler moves no access to these registers across
// this call. A kernel calls it after wgmma_wait: the compiler does not know that the tensor cores write to the
// registers until then.
template <int N>
GPU_DEVICE void keep_registers(float (&r)[N]);

// Tells the compiler that the values of r are not needed any more. So the compiler need not copy these values before
// the next product overwrites them.
template <int N>
GPU_DEVICE void forget_registers(float (&r)[N]);

// Returns x, as a value that the compiler knows nothing about. So the compiler keeps the result in a register. Without
// this call, it might compute x again, or compute expressions of x in advance and keep these in registers.
GPU_DEVICE uint32_t keep_computed(uint32_t x);
GPU_DEVICE int32_t keep_computed(int32_t x);
template <class V>
GPU_DEVICE const V* keep_computed(const V* p);  // p points to global memory

// Descriptor of a 16-bit matrix in shared memory, at the corner `address` of the operand. Rows have kRowBytes bytes
// (128 or 64), and are swizzled by as many.
//   contiguous along k:      groups of 8 rows lie stride_bytes apart; leading_bytes is not used
//   contiguous along m, n:   the next 8 of k lie stride_bytes further on, and what follows the elements of a row along
//                            m or n lies leading_bytes further on
template <int kRowBytes = 128>
GPU_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         kSwizzle << 62;
}

// What to add to a descriptor to get the descriptor of an operand that lies `bytes` further on. Adding a constant takes
// one instruction in uniform registers. Making a new descriptor for each product takes thirteen.
GPU_DEVICE constexpr uint64_t matrix_descriptor_step(uint32_t bytes) { return bytes >> 4; }

// From this call on, each thread of the warpgroup has R registers (setmaxnreg). increase_registers waits until other
// warpgroups have given up theirs.
template <int R>
GPU_DEVICE void increase_registers();
template <int R>
GPU_DEVICE void decrease_registers();

}  // namespace fused_attn::gpu
