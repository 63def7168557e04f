// Small kernels that run before the large ones: padding bytes become bits, a counter becomes 0, and the backward's sums
// over rows.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

struct PaddingParams {
  const uint8_t* padding;  // (B, S), nonzero = IGNORE
  int64_t stride_batch;
  int64_t stride_key;
  int32_t batch;
  int32_t seqlen_k;
  int32_t kept_words;
  uint32_t* kept_keys;  // (B, kept_words), written: see Params
};

constexpr int kPaddingThreads = 128;

// One thread for each word.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPaddingThreads, 1) padding_kernel(const GPU_GRID_CONSTANT PaddingParams p) {
  const int64_t index = int64_t{block_index_x()} * kPaddingThreads + thread_index();
  const int64_t batch = index / p.kept_words, first_key = index % p.kept_words * 32;
  if (batch >= p.batch) return;
  uint32_t kept = 0;
  for (int i = 0; i < 32 && first_key + i < p.seqlen_k; ++i) {
    const bool is_kept = load_global(p.padding + batch * p.stride_batch + (first_key + i) * p.stride_key) == 0;
    kept |= static_cast<uint32_t>(is_kept) << i;
  }
  store_global(p.kept_keys + index, kept);
}

// The counter of tiles that blocks take (Params::tile_counter).
GPU_KERNEL void GPU_LAUNCH_BOUNDS(32, 1) reset_counter_kernel(int32_t* counter) {
  if (thread_index() == 0) store_global(counter, 0);
}

constexpr int kDeltaThreads = 128;
constexpr int kThreadsPerRow = 8;
constexpr int kDeltaRows = kDeltaThreads / kThreadsPerRow;

// delta and lse_log2 of kDeltaRows queries of one head.
template <class T, int kHeadDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kDeltaThreads, 1) delta_kernel(const GPU_GRID_CONSTANT Params p) {
  const int num_blocks = (p.seqlen_q + kDeltaRows - 1) / kDeltaRows;
  const Work work = scheduled_work(block_index_x(), num_blocks, p.num_heads, p.batch, p.heads_per_section, true);
  const Place place = place_of(p, work.batch, work.head, work.head / p.group_size);
  const int row = work.block * kDeltaRows + thread_index() / kThreadsPerRow;
  const bool is_row = row < place.len_q;
  float sum = 0.0f;
  for (int chunk = thread_index() % kThreadsPerRow; is_row && chunk < kHeadDim / 8; chunk += kThreadsPerRow) {
    const Vec4 out = load_global(reinterpret_cast<const Vec4*>(place.query_row<T>(p.out, row) + 8 * chunk));
    const Vec4 dout = load_global(reinterpret_cast<const Vec4*>(place.query_row<T>(p.dout, row) + 8 * chunk));
    const uint32_t out_words[] = {out.x, out.y, out.z, out.w}, dout_words[] = {dout.x, dout.y, dout.z, dout.w};
    GPU_UNROLL for (int i = 0; i < 4; ++i) {
      const Float2 a = unpack<T>(out_words[i]), b = unpack<T>(dout_words[i]);
      sum += a.x * b.x + a.y * b.y;
    }
  }
  GPU_UNROLL for (int mask = 1; mask < kThreadsPerRow; mask *= 2) sum += shuffle_xor(sum, mask);
  if (!is_row || thread_index() % kThreadsPerRow != 0) return;
  if (p.dlse.data != nullptr) sum -= load_global(place.query_value(p.dlse, row));
  const float lse = load_global(place.query_value(p.lse, row));
  // Of an empty row every weight exp2(score - inf) is 0, with no test in the large kernels; 0 * delta has to be 0 too.
  store_global(place.query_value(p.delta, row), lse == -kInfinity ? 0.0f : sum);
  store_global(place.query_value(p.lse_log2, row), lse == -kInfinity ? kInfinity : lse * kLog2E);
}

}  // namespace fused_attn::gpu
