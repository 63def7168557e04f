// The planning warp of the forward kernel (forward.h).
#pragma once
#include "../mask_bits.h"
#include "../splits.h"
#include "../tile_scheduler.h"
#include "forward_plan.h"

namespace fused_attn::gpu::sm90 {

// The role of the planning warp. All 32 lanes run these functions. For each block of keys, lane n writes the View of
// consumer n to the KeyNote, and lane 0 writes the Boxes for the loading warp.
template <class Plan>
struct Planner {
  static constexpr int kBlockN = Plan::kBlockN;
  const Params& p;
  const ForwardRings<Plan> rings;
  const int32_t& piece_rows;  // see ForwardMaps
  const int lane = this_lane().index;
  RingPosition<kTileNotes> tile_position = {};
  RingPosition<kKeyNotes> note_position = {};

  // The blocks of keys that the `rows` queries from first_row on see by the band; an empty range if none of the queries
  // exists.
  GPU_DEVICE BlockRange seen_by(const HeadSlice& head_slice, int first_row, int rows) const {
    if (first_row >= head_slice.seqlen_q) return {};
    return key_range<kBlockN>(p, head_slice, first_row, min(first_row + rows, head_slice.seqlen_q) - 1);
  }

  // The note about the tile that is planned now.
  GPU_DEVICE TileNote tile() const { return rings.tile_note(tile_position); }
  // The last block of keys up to `block` that the tile visits, or a number below the tile's first block. A plain kernel
  // reads only the fields for keys, which saves registers.
  GPU_DEVICE int last_to_visit(int block) const {
    const HeadSlice head_slice = Plan::kIsGeneral ? tile().head_slice() : tile().key_slice();
    return last_block_to_visit<Plan::kIsGeneral, Plan::kBlockM, kBlockN, Plan::kSkipsByLanes>(
        p, head_slice, tile().first_row(), tile().first_block(), block);
  }

  // Writes the KeyNote about `block`, when a slot is empty. `next` is the block that the tile visits after this one. A
  // tile visits its blocks from the last one to the first.
  GPU_DEVICE void post_block(int block, int next) {
    note_position.wait_empty(rings.notes);
    const KeyNote<kBlockN> note = rings.key_note(note_position);
    const ValidRows<kBlockN> valid = valid_keys<kBlockN>(p, tile().key_slice(), block);
    if (lane < Plan::kConsumers) {
      const BlockRange range = tile().range(lane);
      View view{0};
      view.set(View::kIsSeen, range.has(block));
      const bool has_masked =
          Plan::kIsGeneral && has_masked_keys<Plan::kIsGeneral, kConsumerRows, kBlockN>(
                                  p, tile().head_slice(), tile().first_row() + lane * kConsumerRows, block);
      view.set(View::kIsWhole, range.is_within_band(block) && valid.all() && !has_masked);
      view.set(View::kSeesMore, range.has(next));
      view.set(View::kIsLast, next < tile().first_block());
      note.store_view(lane, view);
    }
    if (lane == 0) {
      note.store_block(block, valid);
      const HeadSlice keys = tile().key_slice(), queries = tile().query_slice();
      const int what = Boxes::kKeys | (block + 1 == tile().end_block() ? Boxes::kQueries : 0) |
                       (next < tile().first_block() ? Boxes::kIsLast : 0);
      note.store_boxes({what, keys.k_offset + block * kBlockN, queries.q_offset + tile().first_row(), valid.all(),
                        keys.batch, queries.head, keys.kv_head});
    }
    if (Plan::kIsGeneral && p.pages.table != nullptr && lane < kBlockN / piece_rows)
      note.store_page(lane, page_of_key(block * kBlockN + lane * piece_rows));
    post_note();
  }
  // The page of a key of the tile's sequence. For a key behind the last one, any page that exists.
  GPU_DEVICE int32_t page_of_key(int key) const {
    const HeadSlice keys = tile().key_slice();
    return key < keys.seqlen_k ? existing_page(p.pages, listed_page(p.pages, keys.batch, key)) : 0;
  }
  // Marks the slot of the current KeyNote as full, and goes on to the next slot.
  GPU_DEVICE void post_note() {
    sync_warp();  // the note is complete
    if (lane == 0) mbarrier_arrive(rings.notes.full(note_position.slot()));
    note_position.advance();
  }

  // Marks the slot of the current TileNote as full. Lane 0 has written all fields that other warps read.
  GPU_DEVICE void post_tile() {
    if (lane == 0) mbarrier_arrive(rings.tiles.full(tile_position.slot()));
  }

  // Writes the TileNote about the queries from first_row on and a split of their keys, and then the KeyNote of each
  // block of keys that is visited. The end of the blocks is written twice: first by the band alone, so that
  // last_to_visit can read the note, and then without blocks at the end that have no visible key.
  GPU_DEVICE void plan_tile(const HeadSlice& head_slice, int first_row, int split) {
    tile_position.wait_empty(rings.tiles);
    const BlockRange blocks = blocks_of_split(seen_by(head_slice, first_row, Plan::kBlockM), split, p.splits.count);
    if (lane == 0) tile().store(first_row, split, blocks, head_slice);
    if (lane < Plan::kConsumers) {
      BlockRange own = seen_by(head_slice, first_row + lane * kConsumerRows, kConsumerRows);
      own.begin = max(own.begin, blocks.begin);
      own.end = min(own.end, blocks.end);
      tile().store_range(lane, own);
    }
    sync_warp();
    int block = last_to_visit(tile().end_block() - 1);
    sync_warp();  // all lanes have read it
    if (lane == 0) tile().store_end_block(block + 1);
    post_tile();
    while (block >= tile().first_block()) {
      const int next = last_to_visit(block - 1);
      post_block(block, next);
      block = next;
    }
    tile_position.advance();
  }

  // Plans the tiles that this block of threads takes, one after another. At the end, a TileNote with kNoMoreTiles makes
  // the consumers return, and a KeyNote with empty Boxes makes the loading warp return.
  GPU_DEVICE void run(int launched) {
    int number = block_index_x();
    while (number < num_query_programs(p, launched)) {
      const WorkTile work = query_tile<Plan::kBlockM>(p, number);
      const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
      const int first_row = work.block * Plan::kBlockM;
      if (first_row < head_slice.seqlen_q) plan_tile(head_slice, first_row, number % p.splits.count);
      // The first tile of a block of threads has the number of the block. Further tiles: with a counter, a block takes
      // the next tile that no block has taken. Without a counter, all tiles take equally long, and each block takes
      // every grid_size-th tile.
      if (p.tile_counter != nullptr) {
        if (lane == 0) number = atomic_fetch_add(p.tile_counter, 1);
        number = shuffle(number, 0);
      }
      number += grid_size_x();
    }
    tile_position.wait_empty(rings.tiles);
    if (lane == 0) tile().store(kNoMoreTiles, 0, {}, {});
    post_tile();
    note_position.wait_empty(rings.notes);
    if (lane == 0) rings.key_note(note_position).store_boxes({});
    post_note();
  }
};

}  // namespace fused_attn::gpu::sm90
