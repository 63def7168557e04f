// Attention of few queries to many keys, as in decoding against a cache: how rows and keys are divided among programs
// (blocks of threads), and the kernel that merges the splits. decode/kernel.h has the large kernel.
//
// Query heads of a head group read the same keys, so their queries are rows of the same tile. Row n of a head group is
// query n / group_size of query head n % group_size of the group. A program computes one split of the keys for one tile
// of rows.
#pragma once
#include "fragments.h"
#include "kernels.h"
#include "logits.h"
#include "softmax.h"

namespace fused_attn::gpu {

constexpr int kMaxDecodeTiles = 2;  // MAX_DECODE_TILES of fused_attn/backends/cuda.py
constexpr int kDecodeRows = 16;     // rows of a tile: those of one mma_m16n8k16
constexpr int kDecodeKeys = 16;     // keys that a warp visits in a step: the inner dimension of one mma_m16n8k16
// Keys are divided in rounds of this many keys, so that all warps of a program (at most four) have a step in a round.
constexpr int kDecodeRound = 4 * kDecodeKeys;

// What the decode kernels get besides Params. Of Params, they do not use what preparation kernels write: they read
// padding, mask and relative bias as the caller has given them, which takes a launch less.
struct DecodeParams {
  int32_t num_splits;
  int32_t row_tiles;       // tiles of rows of the longest sequence
  bool leaves_out_longer;  // sequences with more queries than Params::seqlen_q are left to other kernels
  const uint8_t* padding;  // (B, S), nonzero = padding; null = none
  int64_t padding_stride_batch;
  int64_t padding_stride_key;
  MaskSource mask;
  // Of each split: the sums of a row relative to its reference. Null if there is one split.
  float* partial_acc;    // (splits, B, H, L, Dv)
  Float2* partial_sums;  // (splits, B, H, L): reference and row_sum
};

// Launches decode_kernel for all tiles and splits. decode/head_dim_*.cu instantiates this function.
template <int kHeadDim>
void launch_decode(const Params& p, const DecodeParams& d, bool is_bf16, Stream stream);

// head_slice_of for the decode kernels: a sequence that is left out has no queries.
GPU_DEVICE HeadSlice decode_slice_of(const Params& p, const DecodeParams& d, int32_t batch, int32_t head) {
  HeadSlice head_slice = head_slice_of(p, batch, head, head / p.group_size);
  if (d.leaves_out_longer && load_global(p.cu_seqlens_q + batch + 1) - head_slice.q_offset > p.seqlen_q)
    head_slice.seqlen_q = 0;
  return head_slice;
}

// The keys begin ... end - 1, divided into splits: split n has keys first + n * keys_per_split and the following ones.
struct SplitKeys {
  int32_t begin;
  int32_t end;
  int32_t first;  // `begin`, rounded down to a multiple of kDecodeKeys
  int32_t keys_per_split;
  int32_t used_splits;  // how many splits have a key
};

// Divides the keys that the band shows to the tile of rows from first_row on. The result depends on the lengths of this
// sequence alone, so the bits of a row do not depend on the other sequences of the batch.
GPU_DEVICE SplitKeys split_keys(const Params& p, const DecodeParams& d, const HeadSlice& head_slice,
                                int32_t first_row) {
  const int32_t first_query = first_row / p.group_size;
  const int32_t last_query = min((first_row + kDecodeRows - 1) / p.group_size, head_slice.seqlen_q - 1);
  const Diagonals band(p, head_slice);
  SplitKeys keys;
  keys.begin = clamp_to(band.first_key(first_query), 0, head_slice.seqlen_k);
  keys.end = clamp_to(band.last_key(last_query) + 1, keys.begin, head_slice.seqlen_k);
  keys.first = keys.begin / kDecodeKeys * kDecodeKeys;
  const int32_t count = keys.end == keys.begin ? 0 : keys.end - keys.first;
  const int32_t rounds = (count + kDecodeRound - 1) / kDecodeRound;
  keys.keys_per_split = (rounds + d.num_splits - 1) / d.num_splits * kDecodeRound;
  keys.used_splits = count == 0 ? 0 : (count + keys.keys_per_split - 1) / keys.keys_per_split;
  return keys;
}

// The index of a row in the arrays of DecodeParams.
GPU_DEVICE int64_t partial_row(const Params& p, int32_t split, const HeadSlice& head_slice, int32_t query) {
  return ((int64_t{split} * p.batch + head_slice.batch) * p.num_heads + head_slice.head) * p.seqlen_q + query;
}

// Divides eight columns of a row of out by the denominator of the softmax, and stores them; the thread of column 0 also
// stores the lse of the row. `sum` is the sum of prob * value for each column, and `total` is the sum of the probs.
// Both are relative to the reference.
template <class T>
GPU_DEVICE void finish_columns(const Params& p, const HeadSlice& head_slice, int32_t query, int column, float reference,
                               float total, const float (&sum)[8]) {
  float factor, lse;
  LazySoftmax::finish_row(reference, total, p.softmax_scale, p.softmax_scale_log2, factor, lse);
  if (p.sinks != nullptr) join_sink(load_global(p.sinks + head_slice.head), factor, lse);
  if (p.lse.data != nullptr && column == 0) store_global(head_slice.query_value(p.lse, query), lse);
  if (column >= p.out.columns) return;
  uint32_t words[4];
  GPU_UNROLL for (int i = 0; i < 4; ++i) words[i] = pack<T>(sum[2 * i] * factor, sum[2 * i + 1] * factor);
  store_global(reinterpret_cast<Vec4*>(head_slice.query_row<T>(p.out, query) + column),
               Vec4{words[0], words[1], words[2], words[3]});
}

// ---- Merging the splits

constexpr int kMergeThreads = 128;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kMergeColumns = 256;                                  // no value has more
constexpr uint32_t kMergeTotals = kMergeWarps * kMergeColumns * 4;  // where the sums of probs lie in shared memory
constexpr uint32_t kMergeBytes = kMergeTotals + kMergeWarps * 4;

// Merges the splits of one query of one head, in a fixed order: first each warp adds every kMergeWarps-th split, then
// the sums of the warps are added. One block of threads computes one row.
template <class T>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kMergeThreads, 1)
    merge_splits_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT DecodeParams d) {
  const int32_t query = block_index_x() % p.seqlen_q, head_and_batch = block_index_x() / p.seqlen_q;
  const int32_t head = head_and_batch % p.num_heads;
  const HeadSlice head_slice = decode_slice_of(p, d, head_and_batch / p.num_heads, head);
  if (query >= head_slice.seqlen_q) return;
  const int32_t row = query * p.group_size + head % p.group_size;
  const int32_t splits = split_keys(p, d, head_slice, row / kDecodeRows * kDecodeRows).used_splits;
  const Lane lane = this_lane();
  const int warp = thread_index() / 32;
  const uint32_t shared = shared_address(shared_memory());
  const auto sums_of = [&](int32_t split) {
    return load_global(d.partial_sums + partial_row(p, split, head_slice, query));
  };

  float reference = -kInfinity;
  for (int32_t split = lane.index; split < splits; split += 32) reference = fmaxf(reference, sums_of(split).x);
  GPU_UNROLL for (int mask = 1; mask < 32; mask *= 2) reference = fmaxf(reference, shuffle_xor(reference, mask));

  constexpr int kColumns = 4;  // that a thread adds at once
  for (int column = kColumns * lane.index; column < kMergeColumns; column += 32 * kColumns) {
    const bool is_column = column < p.v.columns;
    Float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    for (int32_t split = warp; split < splits; split += kMergeWarps) {
      const Float2 sums = sums_of(split);
      const float factor = LazySoftmax::factor_between(sums.x, reference, p.softmax_scale_log2);
      total += sums.y * factor;
      if (!is_column) continue;
      const Float4 x = load_global(reinterpret_cast<const Float4*>(
          d.partial_acc + partial_row(p, split, head_slice, query) * p.v.columns + column));
      acc.x = multiply_add(x.x, factor, acc.x);
      acc.y = multiply_add(x.y, factor, acc.y);
      acc.z = multiply_add(x.z, factor, acc.z);
      acc.w = multiply_add(x.w, factor, acc.w);
    }
    store_shared(shared + (warp * kMergeColumns + column) * 4, acc);
    if (column == 0) store_shared(shared + kMergeTotals + warp * 4, total);
  }
  sync_threads();  // the sums of all warps are stored
  const int column = 8 * thread_index();
  if (column >= kMergeColumns) return;
  float total = 0.0f, sum[8] = {};
  GPU_UNROLL for (int w = 0; w < kMergeWarps; ++w) {
    total += load_shared<float>(shared + kMergeTotals + w * 4);
    GPU_UNROLL for (int i = 0; i < 8; ++i) sum[i] += load_shared<float>(shared + (w * kMergeColumns + column + i) * 4);
  }
  finish_columns<T>(p, head_slice, query, column, reference, total, sum);
}

// Launches the kernel that merges the splits. With one split, there is nothing to merge.
inline void merge_splits(const Params& p, const DecodeParams& d, bool is_bf16, Stream stream) {
  if (d.num_splits == 1) return;
  const LaunchShape shape = shape_of(p.seqlen_q, 1, p.num_heads, p.batch, kMergeThreads, kMergeBytes);
  is_bf16 ? run_kernel(merge_splits_kernel<bf16_t>, shape, stream, p, d)
          : run_kernel(merge_splits_kernel<f16_t>, shape, stream, p, d);
}

}  // namespace fused_attn::gpu
