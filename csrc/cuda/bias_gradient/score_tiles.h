// The gradient of a bias: which tiles of scores a program visits, and how it stores what it has summed. One number of a
// bias is added to many scores. So its gradient is the sum of the gradients of these logits: over batch entries, heads,
// queries or keys of a dense bias, and along a diagonal of a relative bias.
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
#include "../mask_bits.h"

namespace fused_attn::gpu {

// The tiles of scores that a program visits: tiles begin ... end - 1 of its owner. at(i) says where tile i lies. kRatio
// blocks of keys are as long as one block of queries.
template <int kBlockM, int kBlockN>
struct ScoreTiles {
  static constexpr int kRatio = kBlockM / kBlockN;
  const Params& p;
  const BiasGradientParams& g;
  int32_t owner;
  int32_t split;
  int32_t begin;  // the split of this program has the tiles begin ... end - 1
  int32_t end;

  GPU_DEVICE ScoreTiles(const Params& p, const BiasGradientParams& g, int32_t program)
      : p(p), g(g), owner(program % g.owners), split(program / g.owners) {
    const int64_t count = g.is_relative ? int64_t{p.batch} * diagonal_length() : g.tiles_of_owner;
    begin = static_cast<int32_t>(count * split / g.splits);
    end = static_cast<int32_t>(count * (split + 1) / g.splits);
  }

  // Where a tile lies.
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
    // Dense. The number of the owner encodes the indices of the dimensions that are not summed over, and i encodes
    // those of the dimensions that are. Both are mixed-radix numbers: each index is a digit, whose base is the size of
    // the dimension. `next` takes the lowest digit off one of the two numbers.
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

  // A tile of scores to visit, and what is known about its masks.
  struct VisitedTile {
    int32_t number;  // `end` if there is no tile left; then the other fields mean nothing
    HeadSlice head_slice;
    int32_t first_query;
    int32_t key_block;
    ValidRows<kBlockN> valid;
    bool has_masked;  // the dense mask hides some entry
    bool is_full;     // every entry exists and is visible
  };
  // The first tile from `number` on that may have a visible entry, by band, padding and the map of the mask.
  GPU_DEVICE VisitedTile find(int32_t number) const {
    VisitedTile found{};
    for (; number < end; ++number) {
      const ScoreTile tile = at(number);
      found.head_slice = head_slice_of(p, tile.batch, tile.head, tile.head / p.group_size);
      found.first_query = tile.query_block * kBlockM;
      found.key_block = tile.key_block;
      const int32_t end_query = min(found.first_query + kBlockM, found.head_slice.seqlen_q);
      if (found.first_query >= end_query) continue;
      const BlockRange range = key_range<kBlockN>(p, found.head_slice, found.first_query, end_query - 1);
      if (!range.has(tile.key_block)) continue;
      found.valid = valid_keys<kBlockN>(p, found.head_slice, tile.key_block);
      if (found.valid.none()) continue;
      MaskContents mask{MaskContents::kVisible};
      if (p.mask.map != nullptr)
        mask = mask_contents<kBlockM, kBlockN>(p.mask, found.head_slice, found.first_query, tile.key_block * kBlockN);
      if (!mask.has_visible()) continue;
      found.has_masked = mask.has_hidden();
      found.is_full = range.is_within_band(tile.key_block) && found.valid.all() && !found.has_masked &&
                      end_query == found.first_query + kBlockM;
      break;
    }
    found.number = number;
    return found;
  }

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

// Returns which keys of a tile that is not full the thread's queries `query` and query + 8 see. A query past the end of
// its sequence sees none.
template <int kBlockN>
GPU_DEVICE VisibleColumns<kBlockN> visible_keys_of_tile(const Params& p, const HeadSlice& head_slice,
                                                        const ValidRows<kBlockN>& valid, int32_t key_block,
                                                        bool has_masked, int32_t query) {
  VisibleColumns<kBlockN> visible = visible_keys({p, head_slice}, valid, key_block, query);
  if (has_masked) hide_masked_keys(p, head_slice, visible, query, key_block * kBlockN);
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    GPU_UNROLL for (int w = 0; w < kBlockN / 32; ++w) {
      if (query + 8 * r >= head_slice.seqlen_q) visible.words[r][w] = 0;
    }
  }
  return visible;
}

// Writes row r of a warp's fragment of sums to row `row` of the array of sums, from this offset on. is_row says whether
// the row exists; the array has `columns` columns from there on. All lanes of the warp call this.
template <class T, int r, int kTiles>
GPU_DEVICE void store_row_of_sums(const BiasGradientParams& g, int64_t offset, const float (&sums)[kTiles][4],
                                  bool is_row, int columns, Lane lane) {
  const auto store_entries = [&](auto* entries) {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 2; ++j) {
        const int column = 8 * t + 2 * lane.q + j;
        if (is_row && column < columns) store_as(entries + column * g.stride_key, sums[t][2 * r + j]);
      }
    }
  };
  if (g.is_rounded) {
    T* const entries = static_cast<T*>(g.sums) + offset;
    g.has_pieces ? store_row(entries, sums, r, 1.0f, is_row, columns, lane) : store_entries(entries);
  } else if (float* const entries = static_cast<float*>(g.sums) + offset; !g.has_pieces) {
    store_entries(entries);
  } else {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      const int column = 8 * t + 2 * lane.q;
      const Vec2 pair{float_bits(sums[t][2 * r]), float_bits(sums[t][2 * r + 1])};
      if (is_row && column < columns) store_global(reinterpret_cast<Vec2*>(entries + column), pair);
    }
  }
}

// Writes what the warp has summed, if each score of the tile has an entry of the gradient of its own. The first row of
// the warp's fragment is warp_row of the tile. All lanes of the warp call this.
template <class T, int kBlockM, int kBlockN>
GPU_DEVICE void store_tile_of_sums(const ScoreTiles<kBlockM, kBlockN>& tiles, const float (&sums)[kBlockN / 8][4],
                                   int warp_row, Lane lane) {
  const BiasGradientParams& g = tiles.g;
  const auto tile = tiles.at(0);
  const int query = tile.query_block * kBlockM + warp_row + lane.g, first_key = tile.key_block * kBlockN;
  const int columns = tiles.p.seqlen_k - first_key;
  const int64_t row = tiles.split * g.stride_split + (g.sums_batch ? 0 : tile.batch) * g.stride_batch +
                      (g.sums_heads ? 0 : tile.head) * g.stride_head + query * g.stride_query +
                      first_key * g.stride_key;
  store_row_of_sums<T, 0>(g, row, sums, query < tiles.p.seqlen_q, columns, lane);
  store_row_of_sums<T, 1>(g, row + 8 * g.stride_query, sums, query + 8 < tiles.p.seqlen_q, columns, lane);
}

// What a program has summed, as a tile of floats in shared memory at `tile`. A row has one float more than columns, so
// that the entries of a diagonal, and those of a column, lie in different banks.
template <int kBlockM, int kBlockN>
struct SumsTile {
  static constexpr int kRowFloats = kBlockN + 1;
  static constexpr uint32_t kBytes = kBlockM * kRowFloats * 4;
  uint32_t tile;

  GPU_DEVICE uint32_t address(int row, int column) const {
    return tile + static_cast<uint32_t>(row * kRowFloats + column) * 4;
  }
  // Writes the fragment of a warp, whose first row is warp_row of the tile.
  GPU_DEVICE void store(const float (&sums)[kBlockN / 8][4], int warp_row, Lane lane) const {
    GPU_UNROLL for (int t = 0; t < kBlockN / 8; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j)
          store_shared(address(warp_row + lane.g + 8 * (j / 2), 8 * t + 2 * lane.q + j % 2), sums[t][j]);
    }
  }
};

// Adds up the entries of the tile that belong to one entry of the gradient, and stores the results to the sums of this
// program's split. kThreads threads call this, with their numbers from 0 on, when all warps have written to the tile.
template <class T, int kThreads, int kBlockM, int kBlockN>
GPU_DEVICE void store_sums(const ScoreTiles<kBlockM, kBlockN>& tiles, const SumsTile<kBlockM, kBlockN>& sums,
                           int thread) {
  const Params& p = tiles.p;
  const BiasGradientParams& g = tiles.g;
  const int64_t first = tiles.split * g.stride_split;
  if (g.is_relative) {
    // Each thread adds up some diagonals of the tile. Diagonal d has the entries with column - row = d - (kBlockM - 1).
    float* const entries = static_cast<float*>(g.sums) + first + int64_t{tiles.owner} * (kBlockM + kBlockN);
    for (int d = thread; d < kBlockM + kBlockN - 1; d += kThreads) {
      float sum = 0.0f;
      for (int row = max(kBlockM - 1 - d, 0); row < min(kBlockM, kBlockM + kBlockN - 1 - d); ++row)
        sum += load_shared<float>(sums.address(row, row + d - (kBlockM - 1)));
      store_global(entries + d, sum);
    }
    return;
  }
  // Dense. If the bias broadcasts along queries (or keys), each thread adds up a column (or row) of the tile. If it
  // broadcasts along both, one thread adds up the whole tile.
  const auto tile = tiles.at(0);
  const int64_t first_query = g.sums_queries ? 0 : tile.query_block * kBlockM;
  const int64_t first_key = g.sums_keys ? 0 : tile.key_block * kBlockN;
  const int entries = g.sums_queries ? (g.sums_keys ? 1 : kBlockN) : kBlockM;
  for (int i = thread; i < entries; i += kThreads) {
    const int row = g.sums_queries ? 0 : i, column = g.sums_keys ? 0 : i;
    if (first_query + row >= p.seqlen_q || first_key + column >= p.seqlen_k) continue;
    float sum = 0.0f;
    for (int r = row; r < (g.sums_queries ? kBlockM : row + 1); ++r) {
      for (int c = column; c < (g.sums_keys ? kBlockN : column + 1); ++c) sum += load_shared<float>(sums.address(r, c));
    }
    const int64_t entry = first + (g.sums_batch ? 0 : tile.batch) * g.stride_batch +
                          (g.sums_heads ? 0 : tile.head) * g.stride_head + (first_query + row) * g.stride_query +
                          (first_key + column) * g.stride_key;
    g.is_rounded ? store_as(static_cast<T*>(g.sums) + entry, sum) : store_as(static_cast<float*>(g.sums) + entry, sum);
  }
}

}  // namespace fused_attn::gpu
