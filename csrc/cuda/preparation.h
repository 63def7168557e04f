// The preparation kernel, which runs before the other kernels, at most once in nearly all calls. Each of its jobs has
// blocks of threads of its own (PreparationParams), so that all of them take one launch:
//
//   key padding      is packed to bits
//   relative bias    is copied into the workspace, with margins
//   tiles of queries are listed in forward of packed calls
//   unowned rows     of packed results are cleared: those that belong to no sequence
//   masks            the dense mask and the ranges of keys are packed to bits, and a map of these is made (mask_bits.h)
//   row statistics   of backward are computed; counters of dq, or dq itself, are set to 0
//
// For the fused backward, the kernel also lists the blocks of keys. Which keys are valid decides what the list says. So
// the block of threads that packs the padding of a batch entry then lists the blocks of keys of this batch entry.
// Without padding, the blocks of threads for the row statistics share the list. If a batch entry has very many blocks
// of keys (kMostListedWithPadding), one launch packs the padding, and a second one does the other jobs as without
// padding.
//
// The large kernels are not launched with programmatic dependent launch. CUDA would let a large kernel start while this
// kernel ends, if this kernel asks for it and the large one waits before it reads the results. What that saves, about
// the time of a launch, has not been measured.
#pragma once
#include "fragments.h"
#include "kernels.h"
#include "mask_bits.h"
#include "sm90/key_blocks.h"
#include "tile_scheduler.h"
#include "unowned_rows.h"

namespace fused_attn::gpu {

constexpr int kPreparationThreads = 128;
constexpr int kPreparationWarps = kPreparationThreads / 32;
constexpr int kThreadsPerRow = 8;  // threads that compute the statistics of one query
constexpr int kPreparationRows = kPreparationThreads / kThreadsPerRow;
static_assert(kRowBlock % kPreparationRows == 0);

// Packs the key padding of one batch entry to bits, and counts its blocks of keys that have a valid key (key ranks).
// Keys behind the length of the entry are not valid. All threads of one block call this. They may read the results when
// they have synchronised.
GPU_DEVICE void pack_padding(const Params& p, const PaddingParams& padding, int32_t batch) {
  uint32_t* const valid_keys = padding.valid_keys + int64_t{batch} * p.valid_words;
  const uint8_t* const bytes = padding.padding + batch * padding.stride_batch;
  const int32_t seqlen_k = head_slice_of(p, batch, 0, 0).seqlen_k;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  constexpr int kWords = 8;  // words that a warp packs at a time; all their loads are issued before the first is used
  for (int first = kWords * warp; first < p.valid_words; first += kWords * kPreparationWarps) {
    bool is_valid[kWords];
    GPU_UNROLL for (int w = 0; w < kWords; ++w) {
      const int64_t key = 32 * (int64_t{first} + w) + lane;
      is_valid[w] = key < seqlen_k && load_global(bytes + key * padding.stride_key) == 0;
    }
    uint32_t own = 0;
    GPU_UNROLL for (int w = 0; w < kWords; ++w) {
      const uint32_t word = warp_ballot(is_valid[w]);
      if (lane == w) own = word;
    }
    if (lane < kWords) store_global(valid_keys + first + lane, own);
  }
  if (padding.key_ranks == nullptr) return;
  sync_threads();
  if (warp > 0) return;

  // The first warp computes the key ranks: entry n counts those of the first n blocks of keys that have a valid key. A
  // pass of the loop computes 32 entries as a prefix sum over the lanes.
  constexpr int kWordsOfBlock = kKeyBlock / 32;
  int32_t* const ranks = padding.key_ranks + int64_t{batch} * (p.num_key_blocks + 1);
  int32_t before = 0;
  for (int first = 0; first < p.num_key_blocks; first += 32) {
    const int block = first + lane;
    uint32_t any = 0;
    for (int w = 0; w < kWordsOfBlock && block < p.num_key_blocks; ++w)
      any |= load_global(valid_keys + kWordsOfBlock * block + w);
    const uint32_t has_valid_key = warp_ballot(any != 0);
    if (block < p.num_key_blocks)
      store_global(ranks + block + 1, before + count_bits(has_valid_key & low_bits(lane + 1)));
    before += count_bits(has_valid_key);
  }
  if (lane == 0) store_global(ranks, 0);
}

// Lists the tiles of queries of a packed call, sequence by sequence. One warp calls this. A pass of the loop lists
// those of 32 sequences, of which each lane has one.
GPU_DEVICE void list_query_tiles(const Params& p, const QueryTileParams& list, Lane lane) {
  const auto rows_of = [&](int32_t sequence) {
    if (sequence >= p.batch) return 0;
    return offset_in(p.cu_seqlens_q, sequence + 1, p.rows_q) - offset_in(p.cu_seqlens_q, sequence, p.rows_q);
  };
  int32_t listed = 0;
  for (int32_t first = 0; first < p.batch; first += 32) {
    const int32_t sequence = first + lane.index;
    const int32_t rows = clamp_to(rows_of(sequence), 0, p.seqlen_q);
    const int32_t tiles = rows >= list.fewest ? (rows + list.rows - 1) / list.rows : 0;
    int32_t end = tiles;  // the sum over all lanes up to this one
    GPU_UNROLL for (int step = 1; step < 32; step *= 2) {
      const int32_t before = shuffle(end, max(lane.index - step, 0));
      if (lane.index >= step) end += before;
    }
    // With wrong offsets, sequences may have more tiles together than the list has room for.
    for (int32_t block = 0, next = listed + end - tiles; block < tiles && next < list.most; ++block, ++next) {
      store_global(list.tiles + next, QueryTile{sequence, block});
    }
    listed = min(listed + shuffle(end, 31), list.most);
  }
  if (lane.index == 0) store_global(list.count, listed);
}

// Copies a relative bias into the workspace, with a margin of zeros on both sides of each row: see LogitParams. Each
// thread writes one number. `i` is the thread's number among all that do so.
GPU_DEVICE void copy_relative_bias(const RelativeBiasParams& p, int64_t i) {
  const int64_t stride = p.columns + 2 * kRelativeBiasMargin, head = i / stride,
                column = i % stride - kRelativeBiasMargin;
  if (head >= p.heads) return;
  const bool is_inside = column >= 0 && column < p.columns;
  store_global(p.padded + i, is_inside ? load_global(p.bias + head * p.stride_head + column) : 0.0f);
}

// Rows with a larger lse_log2 count as empty in backward. A float of this size is rounded by 1/2 or more, and so are
// the exponents of all probs of the row. If all keys of a row have a bias of -1e9, the exponents, which are about 0,
// would be rounded by up to 64: the probs would be 2^64, or infinite.
constexpr float kLargestLseLog2 = 16777216.0f;

// Computes the row statistics of kPreparationRows queries of one head, and writes them to the workspace. kThreadsPerRow
// threads share a query. For the fused backward, the function also sets the counters dq_turns to 0. There is one
// counter for each kTileRows queries. Without such counters, it sets dq to zero if a query may see no key (clears_dq).
// `block` is the number of the caller's block among those that have this job.
template <class T, int kTileRows>
GPU_DEVICE void prepare_rows(const Params& p, int32_t block) {
  const int32_t whole_blocks = (p.seqlen_q + kRowBlock - 1) / kRowBlock * kRowBlock;
  const WorkTile work = query_gradient_tile<kPreparationRows>(p, block, whole_blocks);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int row = work.block * kPreparationRows + thread_index() / kThreadsPerRow;
  const bool is_row = row < head_slice.seqlen_q;
  float sum = 0.0f;
  const int columns = is_row ? p.out.columns : 0;
  constexpr int kChunks = 2;  // chunks of eight columns that are loaded before the first is used
  for (int first = thread_index() % kThreadsPerRow; 8 * first < columns; first += kChunks * kThreadsPerRow) {
    Vec4 out[kChunks], dout[kChunks];
    GPU_UNROLL for (int c = 0; c < kChunks; ++c) {
      const int column = 8 * (first + c * kThreadsPerRow);
      out[c] = dout[c] = Vec4{0, 0, 0, 0};
      if (column >= columns) continue;
      out[c] = load_global(reinterpret_cast<const Vec4*>(head_slice.query_row<T>(p.out, row) + column));
      dout[c] = load_global(reinterpret_cast<const Vec4*>(head_slice.query_row<T>(p.dout, row) + column));
    }
    GPU_UNROLL for (int c = 0; c < kChunks; ++c) {
      const uint32_t out_words[] = {out[c].x, out[c].y, out[c].z, out[c].w};
      const uint32_t dout_words[] = {dout[c].x, dout[c].y, dout[c].z, dout[c].w};
      GPU_UNROLL for (int i = 0; i < 4; ++i) {
        const Float2 a = unpack<T>(out_words[i]), b = unpack<T>(dout_words[i]);
        sum += a.x * b.x + a.y * b.y;
      }
    }
  }
  if (p.clears_dq && is_row) {
    for (int column = 8 * (thread_index() % kThreadsPerRow); column < p.dq.columns; column += 8 * kThreadsPerRow)
      store_global(reinterpret_cast<Vec4*>(head_slice.query_row<T>(p.dq, row) + column), Vec4{0, 0, 0, 0});
  }
  GPU_UNROLL for (int mask = 1; mask < kThreadsPerRow; mask *= 2) sum += shuffle_xor(sum, mask);
  const bool is_in_block = row / kRowBlock * kRowBlock < head_slice.seqlen_q;  // the arrays have no room for other rows
  if (!is_in_block || thread_index() % kThreadsPerRow != 0) return;
  float lse = -kInfinity;  // rows past the last one count as empty rows
  if (is_row) {
    if (p.dlse.data != nullptr) sum -= load_global(head_slice.query_value(p.dlse, row));
    lse = load_global(head_slice.query_value(p.lse, row));
  }
  // With lse_log2 = +inf, every prob exp2(score - inf) of an empty row is 0, and the large kernels need no test. delta
  // must be finite, so that 0 * delta is 0. A row with a logit of +inf or NaN is not empty: its gradients are NaN.
  const float lse_log2 = lse * kLog2E;
  const bool is_empty = lse_log2 < -kLargestLseLog2 || (lse_log2 > kLargestLseLog2 && lse != kInfinity);
  store_global(head_slice.row_statistic(p.delta, row), is_empty ? 0.0f : sum);
  store_global(head_slice.row_statistic(p.lse_log2, row), is_empty ? kInfinity : lse_log2);
  if (p.dq_turns == nullptr || row % kTileRows != 0) return;
  const int64_t tile = head_slice.first_row_block(p) * (kRowBlock / kTileRows) + row / kTileRows;
  GPU_NO_UNROLL for (int n = 0; n < 1 << p.dq_sums_log2; ++n)
      store_global(p.dq_turns + (tile << p.dq_sums_log2) + n, 0);
}

// The preparation kernel. kTileRows: the queries of a tile of dq in the fused backward. The bound keeps 12 blocks of
// threads on a multiprocessor, which leaves 40 registers for a thread. Without the bound, ptxas took 59 on sm_90, with
// room for 8 blocks. The speed of neither has been measured.
template <class T, int kTileRows>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 12)
    preparation_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT PreparationParams jobs) {
  int32_t block = block_index_x();
  const int32_t thread = thread_index();
  if (block == 0 && thread == 0 && p.tile_counter != nullptr) store_global(p.tile_counter, 0);
  if (block == 0 && thread == 0 && p.program_counter != nullptr) store_global(p.program_counter, 0);
  if (block < jobs.padding_blocks) {
    pack_padding(p, jobs.padding, block);
    if (p.key_blocks == nullptr) return;
    sync_threads();
    return sm90::list_key_blocks<kTileRows>(p, block, block + 1, thread, kPreparationThreads);
  }
  block -= jobs.padding_blocks;
  if (block < jobs.relative_bias_blocks)
    return copy_relative_bias(jobs.relative_bias, int64_t{block} * kPreparationThreads + thread);
  block -= jobs.relative_bias_blocks;
  if (block < jobs.mask_blocks) return pack_mask(p, jobs.mask, int64_t{block} * kPreparationWarps + thread / 32);
  block -= jobs.mask_blocks;
  if (block < jobs.query_tile_blocks) {
    if (thread < 32) list_query_tiles(p, jobs.query_tiles, this_lane());
    return;
  }
  block -= jobs.query_tile_blocks;
  const auto clear_rows = [&](const UnownedRows& x, int32_t blocks) {
    const int64_t first_row = int64_t{block} * kPreparationThreads + thread / 32 * 32;
    clear_unowned_rows(p, x, first_row, int64_t{blocks} * kPreparationThreads, this_lane());
  };
  if (block < jobs.query_clearing_blocks) return clear_rows(jobs.queries, jobs.query_clearing_blocks);
  block -= jobs.query_clearing_blocks;
  if (block < jobs.key_clearing_blocks) return clear_rows(jobs.keys, jobs.key_clearing_blocks);
  block -= jobs.key_clearing_blocks;
  if (block >= jobs.row_blocks) return;
  prepare_rows<T, kTileRows>(p, block);
  if (p.key_blocks != nullptr && jobs.padding_blocks == 0)
    sm90::list_key_blocks<kTileRows>(p, 0, p.batch, int64_t{block} * kPreparationThreads + thread,
                                     int64_t{jobs.row_blocks} * kPreparationThreads);
}

}  // namespace fused_attn::gpu
