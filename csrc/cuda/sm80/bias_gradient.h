// The gradient of a bias, with instructions of Ampere, also on later GPUs. One number of a bias is added to many
// scores. So its gradient is the sum of the gradients of these logits: over batch entries, heads, queries or keys of a
// dense bias, and along a diagonal of a relative bias.
//
// A program visits tiles of scores one after another. Its tiles are chosen so that an entry at the same place in each
// tile adds to the same entry of the gradient:
//
//   dense bias      the tiles at one place, of all batch entries and heads that share the bias. If all queries share
//                   one row of the bias, the tiles of a whole column of tiles. If all keys share one column of the
//                   bias, the tiles of a whole row of tiles
//   relative bias   the tiles along one diagonal, of one head and of all batch entries
//
// So the sum stays in registers until the last tile, the order of additions is fixed, and nothing as large as the
// scores is stored. The price is to compute two products again: the scores, and dprobs = dout @ v^T.
//
// The sum over splits follows in other kernels: see BiasGradientParams for owners and splits.
#pragma once
#include "../bias_gradient.h"
#include "../dropout.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../row_statistics.h"
#include "../tiles.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm80 {

// Sizes of the kernel, and where its tiles lie in shared memory (byte offsets).
template <int kHeadDim>
struct BiasGradientPlan : BiasGradientTileSm80<kHeadDim> {
  using Tile = BiasGradientTileSm80<kHeadDim>;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kTiles = Tile::kBlockN / 8;
  static_assert(Tile::kBlockM == 16 * Tile::kWarps);
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + Tile::kBlockM * kHeadDim * 2;
  static constexpr uint32_t kK = kDout + Tile::kBlockM * kHeadDim * 2;
  static constexpr uint32_t kV = kK + Tile::kBlockN * kHeadDim * 2;
  static constexpr uint32_t kBytes = kV + Tile::kBlockN * kHeadDim * 2;
  // After the last tile, the sums of all threads are written over the tiles in shared memory. A row has one float more
  // than columns, so that the entries of a diagonal, and those of a column, lie in different banks.
  static constexpr int kRowFloats = Tile::kBlockN + 1;
  static_assert(Tile::kBlockM * kRowFloats * 4 <= kBytes);
};

// The tiles of scores that a program visits: tiles begin ... end - 1 of its owner. at(i) says where tile i lies. kRatio
// blocks of keys are as long as one block of queries.
template <int kBlockM, int kBlockN>
struct ScoreTiles {
  static constexpr int kRatio = kBlockM / kBlockN;
  const Params& p;
  const BiasGradientParams& g;
  int32_t owner;
  int32_t begin;  // the split of this program has the tiles begin ... end - 1
  int32_t end;

  GPU_DEVICE ScoreTiles(const Params& p, const BiasGradientParams& g, int32_t program)
      : p(p), g(g), owner(program % g.owners) {
    const int32_t split = program / g.owners;
    const int64_t count = g.is_relative ? int64_t{p.batch} * diagonal_length() : g.tiles_of_owner;
    begin = static_cast<int32_t>(count * split / g.splits);
    end = static_cast<int32_t>(count * (split + 1) / g.splits);
  }

  struct ScoreTile {
    int32_t batch;
    int32_t head;
    int32_t query_block;
    int32_t key_block;
  };
  GPU_DEVICE ScoreTile at(int32_t i) const {
    if (g.is_relative) {
      const int32_t m = first_query_block() + i % diagonal_length();
      return {i / diagonal_length(), owner / g.diagonals, m, diagonal() + m * kRatio};
    }
    // Dense. The number of the owner encodes the indices of the dimensions that are not summed over, and i encodes those
    // of the dimensions that are. Both are mixed-radix numbers: each index is a digit, whose base is the size of the
    // dimension. `next` takes the lowest digit off one of the two numbers.
    int32_t fixed = owner;
    const auto next = [&](bool is_summed, int32_t size) {
      const int32_t number = is_summed ? i : fixed, rest = number / size;
      i = is_summed ? rest : i;
      fixed = is_summed ? fixed : rest;
      return number - rest * size;
    };
    ScoreTile tile;
    tile.key_block = next(g.sums_keys, g.key_blocks);
    tile.query_block = next(g.sums_queries, g.query_blocks);
    tile.head = next(g.sums_heads, p.num_heads);
    tile.batch = next(g.sums_batch, p.batch);
    return tile;
  }

  // The owner's diagonal has the tiles whose first key lies diagonal() blocks of keys to the right of their first query
  // (to the left if negative).
  GPU_DEVICE int32_t diagonal() const { return owner % g.diagonals - (g.query_blocks - 1) * kRatio; }

 private:
  // The first block of queries of the diagonal, and the number of its tiles. The tile of block of queries m is in block
  // of keys diagonal() + m * kRatio. The diagonal has only those tiles whose block of keys exists: it is not negative,
  // and below key_blocks.
  GPU_DEVICE int32_t first_query_block() const { return max((kRatio - 1 - diagonal()) / kRatio, 0); }
  GPU_DEVICE int32_t diagonal_length() const {
    const int32_t right = g.key_blocks - 1 - diagonal();  // not negative, because diagonal() < key_blocks
    return min(right / kRatio, g.query_blocks - 1) + 1 - first_query_block();
  }
};

// Sums the gradients of logits over the tiles of one owner and split. One program is one block of threads, and each
// warp has 16 queries of every tile.
template <class T, int kHeadDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(BiasGradientPlan<kHeadDim>::kThreads, 1)
    bias_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BiasGradientParams g) {
  using Plan = BiasGradientPlan<kHeadDim>;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kThreads = Plan::kThreads, kTiles = Plan::kTiles;
  using Tiles = ScoreTiles<kBlockM, kBlockN>;
  const Tiles tiles(p, g, block_index_x());
  const Lane lane = this_lane();
  const int warp_row = thread_index() / 32 * 16;
  const uint32_t shared = shared_address(shared_memory());
  const Corners<kHeadDim> corners(shared, warp_row, lane);

  // A tile of scores to visit, with what is known about its mask. Its number is tiles.end if there is none.
  struct Next {
    int32_t number;
    HeadSlice head_slice;
    int32_t first_query;
    int32_t key_block;
    ValidRows<kBlockN> valid;
    bool has_masked;  // the dense mask hides some entry
    bool is_full;     // every entry is visible
  };
  // The first tile from `number` on that may have a visible entry, by band, padding and the map of the mask. All
  // threads compute the same.
  const auto find = [&](int32_t number) {
    Next next{};
    for (; number < tiles.end; ++number) {
      const auto tile = tiles.at(number);
      next.head_slice = head_slice_of(p, tile.batch, tile.head, tile.head / p.group_size);
      next.first_query = tile.query_block * kBlockM;
      next.key_block = tile.key_block;
      const int32_t end = min(next.first_query + kBlockM, next.head_slice.seqlen_q);
      if (next.first_query >= end) continue;
      const BlockRange range = key_range<kBlockN>(p, next.head_slice, next.first_query, end - 1);
      if (!range.has(tile.key_block)) continue;
      next.valid = valid_keys<kBlockN>(p, next.head_slice, tile.key_block);
      if (next.valid.none()) continue;
      MaskContents mask{MaskContents::kVisible};
      if (p.mask.map != nullptr)
        mask = mask_contents<kBlockM, kBlockN>(p.mask, next.head_slice, next.first_query, tile.key_block * kBlockN);
      if (!mask.has_visible()) continue;
      next.has_masked = mask.has_hidden();
      next.is_full = range.is_within_band(tile.key_block) && next.valid.all() && !next.has_masked;
      break;
    }
    next.number = number;
    return next;
  };
  // Starts to copy queries, dout, keys and values of a tile to shared memory. All threads of the block take part. This
  // kernel also runs for tensors with fewer columns than kHeadDim, so copy_rows checks the columns.
  constexpr bool kChecksColumns = true;
  const auto load = [&](const Next& next) {
    const HeadSlice& head_slice = next.head_slice;
    const auto load_queries = [&](uint32_t tile, const Rows& x) {
      copy_rows<kHeadDim, kBlockM, kThreads, kChecksColumns>(
          tile, x, head_slice.query_row<const T>(x, next.first_query),
          [&](int first, int offset) { return next.first_query + first + offset < head_slice.seqlen_q; });
    };
    const auto load_keys = [&](uint32_t tile, const Rows& x) {
      copy_rows<kHeadDim, kBlockN, kThreads, kChecksColumns>(
          tile, x, head_slice.key_row<const T>(x, int64_t{next.key_block} * kBlockN),
          [&](int first, int offset) { return next.valid.has(first, offset); });
    };
    load_queries(shared + Plan::kQ, p.q);
    load_queries(shared + Plan::kDout, p.dout);
    load_keys(shared + Plan::kK, p.k);
    load_keys(shared + Plan::kV, p.v);
    copy_async_commit();
  };

  // Loop. The inputs of the next tile are loaded while the exponentials of this one are computed.
  float sums[kTiles][4];
  fill(sums, 0.0f);
  Next next = find(tiles.begin);
  if (next.number < tiles.end) load(next);
  while (next.number < tiles.end) {
    const Next now = next;
    const int query = now.first_query + warp_row + lane.g, first_key = now.key_block * kBlockN;
    const RowStatistics statistics[2] = {row_statistics(p, now.head_slice, query),
                                         row_statistics(p, now.head_slice, query + 8)};
    copy_async_wait<0>();
    sync_threads();  // the tiles have come
    float scores[1][kTiles][4], dprobs[1][kTiles][4];
    fill(scores[0], 0.0f);
    fill(dprobs[0], 0.0f);
    multiply_transposed<T, kHeadDim>(scores, corners, Plan::kQ, Plan::kK);
    multiply_transposed<T, kHeadDim>(dprobs, corners, Plan::kDout, Plan::kV);
    sync_threads();  // every warp is done with the tiles
    next = find(now.number + 1);
    if (next.number < tiles.end) load(next);

    if (p.dropout_seed != nullptr)
      drop(dprobs[0], dropout_keep_of_query_rows<kTiles>(Dropout(p, now.head_slice), query, first_key, lane),
           p.dropout_scale);
    to_logits<T>(p, now.head_slice, scores[0], QueryRows{query, first_key + 2 * lane.q}, NoGradients{});
    if (!now.is_full) {
      VisibleColumns<kBlockN> visible = visible_keys(p, now.valid, now.key_block, query);
      if (now.has_masked) hide_masked_keys(p, now.head_slice, visible, query, first_key);
      hide(scores[0], visible, lane);
    }
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) {
        const float prob = prob_of(scores[0][t][j], p.softmax_scale_log2, statistics[j / 2].lse_log2);
        sums[t][j] += prob * (dprobs[0][t][j] - statistics[j / 2].delta);
      }
    }
  }

  // Epilogue: the sums of all threads go through shared memory, so that each thread can add up a diagonal, or store
  // neighbouring entries.
  const auto address = [&](int row, int column) {
    return shared + static_cast<uint32_t>(row * Plan::kRowFloats + column) * 4;
  };
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j)
        store_shared(address(warp_row + lane.g + 8 * (j / 2), 8 * t + 2 * lane.q + j % 2), sums[t][j]);
  }
  sync_threads();
  float* const split_sums = g.sums + block_index_x() / g.owners * g.stride_split;
  if (g.is_relative) {
    // Each thread adds up some diagonals of the tile. Diagonal d has the entries with column - row = d - (kBlockM - 1).
    for (int d = thread_index(); d < kBlockM + kBlockN - 1; d += kThreads) {
      float sum = 0.0f;
      for (int row = max(kBlockM - 1 - d, 0); row < min(kBlockM, kBlockM + kBlockN - 1 - d); ++row)
        sum += load_shared<float>(address(row, row + d - (kBlockM - 1)));
      store_global(split_sums + int64_t{tiles.owner} * (kBlockM + kBlockN) + d, sum);
    }
    return;
  }
  // Dense. If the bias broadcasts along queries (or keys), each thread adds up a column (or row) of the tile.
  const auto tile = tiles.at(0);
  const int rows = g.sums_queries ? 1 : kBlockM, columns = g.sums_keys ? 1 : kBlockN;
  const int64_t first_query = g.sums_queries ? 0 : tile.query_block * kBlockM;
  const int64_t first_key = g.sums_keys ? 0 : tile.key_block * kBlockN;
  for (int i = thread_index(); i < rows * columns; i += kThreads) {
    const int row = i / columns, column = i % columns;
    float sum = 0.0f;
    for (int r = row; r < (g.sums_queries ? kBlockM : row + 1); ++r) {
      for (int c = column; c < (g.sums_keys ? kBlockN : column + 1); ++c) sum += load_shared<float>(address(r, c));
    }
    const bool exists =
        (g.sums_queries || first_query + row < p.seqlen_q) && (g.sums_keys || first_key + column < p.seqlen_k);
    if (exists)
      store_global(split_sums + (g.sums_batch ? 0 : tile.batch) * g.stride_batch +
                       (g.sums_heads ? 0 : tile.head) * g.stride_head + (first_query + row) * g.stride_query +
                       (first_key + column) * g.stride_key,
                   sum);
  }
}

}  // namespace fused_attn::gpu::sm80
