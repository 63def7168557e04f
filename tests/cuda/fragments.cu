// Each kernel executes one primitive, and copies the registers or the shared memory after it to global memory.
// test_fragments.py compares them with layouts from another source (cute.py). The file is compiled for the emulation,
// and on a machine with a GPU also for the GPU.
#include <cmath>

#include "cuda/hardware.h"
#include "cuda/tensor_map.h"

namespace fused_attn::gpu {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

// Copy `bytes` bytes (an image of shared memory) from global to shared memory, and back. All threads take part. Sizes
// are multiples of 16 bytes.
GPU_DEVICE void read_image(const char* image, int bytes, uint32_t shared, int threads) {
  for (int i = 16 * thread_index(); i < bytes; i += 16 * threads)
    store_shared(shared + i, load_global(reinterpret_cast<const Vec4*>(image + i)));
}

GPU_DEVICE void write_image(char* image, int bytes, uint32_t shared, int threads) {
  for (int i = 16 * thread_index(); i < bytes; i += 16 * threads)
    store_global(reinterpret_cast<Vec4*>(image + i), load_shared<Vec4>(shared + i));
}

template <class T>
GPU_KERNEL void mma_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = thread_index();
  uint32_t left[4];
  float sum[4];
  for (int i = 0; i < 4; i++) left[i] = load_global(a + 4 * lane + i);
  for (int i = 0; i < 4; i++) sum[i] = load_global(c + 4 * lane + i);
  mma_m16n8k16<T>(sum, left, load_global(b + 2 * lane), load_global(b + 2 * lane + 1));
  for (int i = 0; i < 4; i++) store_global(c + 4 * lane + i, sum[i]);
}

template <int Matrices, bool IsTransposed>
GPU_KERNEL void load_matrix_kernel(const char* image, int bytes, const int* offsets, uint32_t* registers) {
  const int lane = thread_index();
  const uint32_t shared = shared_address(shared_memory());
  read_image(image, bytes, shared, kWarp);
  sync_threads();
  const uint32_t address = shared + load_global(offsets + lane);
  uint32_t r[Matrices];
  if constexpr (Matrices == 4) {
    if constexpr (IsTransposed) {
      load_matrix_x4_transposed(r, address);
    } else {
      load_matrix_x4(r, address);
    }
  } else {
    if constexpr (IsTransposed) {
      load_matrix_x2_transposed(r, address);
    } else {
      load_matrix_x2(r, address);
    }
  }
  for (int i = 0; i < Matrices; i++) store_global(registers + Matrices * lane + i, r[i]);
}

template <bool IsTransposed>
GPU_KERNEL void store_matrix_kernel(const uint32_t* registers, const int* offsets, char* image, int bytes) {
  const int lane = thread_index();
  const uint32_t shared = shared_address(shared_memory());
  read_image(image, bytes, shared, kWarp);
  sync_threads();
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = load_global(registers + 4 * lane + i);
  const uint32_t address = shared + load_global(offsets + lane);
  if constexpr (IsTransposed) {
    store_matrix_x4_transposed(address, r);
  } else {
    store_matrix_x4(address, r);
  }
  sync_threads();
  write_image(image, bytes, shared, kWarp);
}

// d = a @ b in `steps` products, one for each descriptor. Descriptors are those of shared memory that starts at 0, and
// the kernel adds the real start. If `a` is not null, it has the left factors in registers [step][128][4].
template <class T, int N, int TransA, int TransB>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kWarpgroup, 1)
    wgmma_kernel(const char* image, int bytes, const uint32_t* a, const uint64_t* a_descriptors,
                 const uint64_t* b_descriptors, int steps, float* d) {
  const int thread = thread_index();
  const uint32_t shared = shared_address(shared_memory());
  read_image(image, bytes, shared, kWarpgroup);
  fence_async_proxy();
  sync_threads();
  float sum[N / 2];
  for (int i = 0; i < N / 2; i++) sum[i] = NAN;  // NaN would stay in the result if the first product added to these
  uint32_t left[4];
  for (int step = 0; step < steps; step++) {
    const uint64_t right = load_global(b_descriptors + step) + (shared >> 4);
    if (a) {
      for (int i = 0; i < 4; i++) left[i] = load_global(a + (step * kWarpgroup + thread) * 4 + i);
      wgmma_fence();
      wgmma_rs<T, N, TransB>(sum, left, right, step > 0);
    } else {
      wgmma_fence();
      wgmma_ss<T, N, TransA, TransB>(sum, load_global(a_descriptors + step) + (shared >> 4), right, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
  for (int i = 0; i < N / 2; i++) store_global(d + thread * (N / 2) + i, sum[i]);
}

GPU_KERNEL void descriptor_kernel(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, uint64_t* out) {
  if (thread_index() == 0) store_global(out, matrix_descriptor(address, leading_bytes, stride_bytes));
}

enum TmaOperation { kLoad, kStore, kReduce };

// kLoad loads one box into shared memory, and copies it to `image`. kStore and kReduce copy `image` to shared memory,
// and from there to the tensor.
GPU_KERNEL void tma_kernel(const GPU_GRID_CONSTANT TensorMap map, int operation, int c0, int c1, int c2, int c3,
                           char* image, int bytes) {
  const uint32_t shared = shared_address(shared_memory());
  const uint32_t mbarrier = shared + bytes;
  const bool is_first = thread_index() == 0;
  if (is_first) {
    mbarrier_init(mbarrier, 1);
    fence_mbarrier_init();
    tma_prefetch(&map);
  }
  sync_threads();
  if (operation == kLoad) {
    if (is_first) {
      mbarrier_arrive_expect(mbarrier, bytes);
      tma_load_4d(shared, &map, mbarrier, c0, c1, c2, c3);
    }
    mbarrier_wait(mbarrier, 0);
    write_image(image, bytes, shared, kWarp);
    return;
  }
  read_image(image, bytes, shared, kWarp);
  fence_async_proxy();
  sync_threads();
  if (is_first) {
    if (operation == kStore) tma_store_4d(&map, shared, c0, c1, c2, c3);
    if (operation == kReduce) tma_reduce_add_4d(&map, shared, c0, c1, c2, c3);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

// destination = source, or destination += source: a bulk load to shared memory, and a bulk store or addition from
// there.
GPU_KERNEL void bulk_kernel(int operation, const float* source, float* destination, int bytes) {
  const uint32_t shared = shared_address(shared_memory());
  const uint32_t mbarrier = shared + bytes;
  if (thread_index() != 0) return;
  mbarrier_init(mbarrier, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect(mbarrier, bytes);
  bulk_load(shared, source, bytes, mbarrier);
  mbarrier_wait(mbarrier, 0);
  if (operation == kStore) bulk_store(destination, shared, bytes);
  if (operation == kReduce) bulk_reduce_add_f32(destination, shared, bytes);
  tma_store_commit();
  tma_store_wait<0>();
}

// Stores the same slot of shared memory to each row of `rows`, with other numbers each time. The slot is written again
// as soon as the bulk store has read it.
GPU_KERNEL void reused_source_kernel(float* rows, int num_rows) {
  const uint32_t shared = shared_address(shared_memory());
  const int lane = thread_index();
  for (int row = 0; row < num_rows; row++) {
    store_shared(shared + 4 * lane, float(kWarp * row + lane));
    fence_async_proxy();
    sync_warp();
    if (lane == 0) {
      bulk_store(rows + kWarp * row, shared, 4 * kWarp);
      tma_store_commit();
      tma_store_wait_read<0>();
    }
    sync_warp();
  }
  if (lane == 0) tma_store_wait<0>();
}

// Block b adds row b of `rows` to `sums`, in its turn. `turns` gives the order of the blocks. The first block stores
// instead, so `sums` need not be initialised.
GPU_KERNEL void ordered_sums_kernel(const float* rows, const int* turns, float* sums, int* counter) {
  const uint32_t shared = shared_address(shared_memory());
  const int lane = thread_index(), block = block_index_x();
  store_shared(shared + 4 * lane, load_global(rows + kWarp * block + lane));
  sync_warp();
  if (lane != 0) return;
  const int turn = load_global(turns + block);
  wait_until_equal(counter, turn);
  fence_async_proxy_global();
  fence_async_proxy();
  if (turn == 0) {
    bulk_store(sums, shared, 4 * kWarp);
  } else {
    bulk_reduce_add_f32(sums, shared, 4 * kWarp);
  }
  tma_store_commit();
  tma_store_wait<0>();
  fence_async_proxy_global();
  add_release(counter, 1);
}

// Applies each arithmetic primitive to the 32 values x of a warp. out: [function][32].
template <class T>
GPU_KERNEL void arithmetic_kernel(const float* x, uint32_t* out) {
  const int lane = thread_index();
  const float own = load_global(x + lane);
  const float next = shuffle(own, (lane + 1) % kWarp);
  const uint32_t pair = pack<T>(own, next);
  const Float2 floats = unpack<T>(pair);
  const uint32_t results[] = {float_bits(exp2_approx(own)),
                              float_bits(log2_approx(own)),
                              pair,
                              float_bits(floats.x),
                              float_bits(floats.y),
                              float_bits(shuffle_xor(own, 5)),
                              multiply_high(float_bits(own), 0xD2511F53u),
                              uint32_t(warp_any(own > 1e6f)),
                              float_bits(max_or_nan(own, next)),
                              float_bits(max_or_nan(own * 0.0f / 0.0f, next)),
                              float_bits(max_or_nan(own, next * 0.0f / 0.0f))};
  int i = 0;
  for (uint32_t result : results) store_global(out + kWarp * i++ + lane, result);
}

std::string result;  // text of the last exported function, which returns a pointer to it

const char* keep(std::string error) {
  result = std::move(error);
  return result.c_str();
}

// One limit for all sizes of image: a kernel keeps the limit that a launch has set. Compute capability 8.0 allows it.
constexpr int kMostSharedBytes = 160 * 1024;

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), int threads, int shared_bytes, Arguments... arguments) {
  return keep(launch(kernel, {1, 1, 1, threads, shared_bytes, kMostSharedBytes}, nullptr, arguments...));
}

template <class T, int N>
const char* run_wgmma(int trans_a, int trans_b, const char* image, int bytes, const uint32_t* a,
                      const uint64_t* a_descriptors, const uint64_t* b_descriptors, int steps, float* d) {
  const auto kernel = trans_a ? (trans_b ? wgmma_kernel<T, N, 1, 1> : wgmma_kernel<T, N, 1, 0>)
                              : (trans_b ? wgmma_kernel<T, N, 0, 1> : wgmma_kernel<T, N, 0, 0>);
  return run(kernel, kWarpgroup, bytes, image, bytes, a, a_descriptors, b_descriptors, steps, d);
}

}  // namespace
}  // namespace fused_attn::gpu

using namespace fused_attn::gpu;

extern "C" {

const char* mma(int is_bf16, const uint32_t* a, const uint32_t* b, float* c) {
  return run(is_bf16 ? mma_kernel<bf16_t> : mma_kernel<f16_t>, kWarp, 0, a, b, c);
}

const char* load_matrix(int matrices, int is_transposed, const char* image, int bytes, const int* offsets,
                        uint32_t* registers) {
  const auto kernel = matrices == 4 ? (is_transposed ? load_matrix_kernel<4, true> : load_matrix_kernel<4, false>)
                                    : (is_transposed ? load_matrix_kernel<2, true> : load_matrix_kernel<2, false>);
  return run(kernel, kWarp, bytes, image, bytes, offsets, registers);
}

const char* store_matrix(int is_transposed, const uint32_t* registers, const int* offsets, char* image, int bytes) {
  return run(is_transposed ? store_matrix_kernel<true> : store_matrix_kernel<false>, kWarp, bytes, registers, offsets,
             image, bytes);
}

const char* wgmma(int is_bf16, int n, int trans_a, int trans_b, const char* image, int bytes, const uint32_t* a,
                  const uint64_t* a_descriptors, const uint64_t* b_descriptors, int steps, float* d) {
#define WIDTH(N)                                                                                            \
  if (n == N && is_bf16)                                                                                    \
    return run_wgmma<bf16_t, N>(trans_a, trans_b, image, bytes, a, a_descriptors, b_descriptors, steps, d); \
  if (n == N) return run_wgmma<f16_t, N>(trans_a, trans_b, image, bytes, a, a_descriptors, b_descriptors, steps, d);
  WIDTH(32)
  WIDTH(64)
  WIDTH(80)
  WIDTH(96)
  WIDTH(128)
  WIDTH(176)
  WIDTH(192)
  WIDTH(256)
#undef WIDTH
  return "no such width";
}

// element: 0 bf16, 1 f16, 2 f32
const char* tma(int operation, void* tensor, int element, const int64_t* sizes, const int64_t* stride_bytes,
                const int* box, int swizzle_bytes, const int* coordinates, char* image, int bytes) {
  TensorMapSpec spec = {tensor, Element(element), 4, {}, {}, {}, swizzle_bytes};
  for (int i = 0; i < 4; i++) {
    spec.sizes[i] = sizes[i];
    spec.stride_bytes[i] = stride_bytes[i];
    spec.box[i] = box[i];
  }
  TensorMap map;
  if (std::string error = encode_tensor_map(spec, &map); !error.empty()) return keep(error);
  return run(tma_kernel, kWarp, bytes + 16, map, operation, coordinates[0], coordinates[1], coordinates[2],
             coordinates[3], image, bytes);
}

const char* bulk(int operation, const float* source, float* destination, int bytes) {
  return run(bulk_kernel, kWarp, bytes + 16, operation, source, destination, bytes);
}

const char* reused_source(float* rows, int num_rows) {
  return run(reused_source_kernel, kWarp, 4 * kWarp, rows, num_rows);
}

const char* ordered_sums(int blocks, const float* rows, const int* turns, float* sums, int* counter) {
  return keep(launch(ordered_sums_kernel, {blocks, 1, 1, kWarp, 4 * kWarp}, nullptr, rows, turns, sums, counter));
}

const char* arithmetic(int is_bf16, const float* x, uint32_t* out) {
  return run(is_bf16 ? arithmetic_kernel<bf16_t> : arithmetic_kernel<f16_t>, kWarp, 0, x, out);
}

const char* descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, uint64_t* out) {
  return run(descriptor_kernel, kWarp, 0, address, leading_bytes, stride_bytes, out);
}
}
