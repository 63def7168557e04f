// The loading warp of the forward kernel (forward.h), and the warps that load a bias.
#pragma once
#include "forward_plan.h"

namespace fused_attn::gpu::sm90 {

// The keys or values of a block that lie in pages. TMA loads them in pieces of piece_rows rows. A piece lies in one
// page, because its size divides the sizes of a block and of a page.
template <int kBlockN>
struct PagedRows {
  static_assert(kBlockN / kLeastPieceRows <= 16);  // a KeyNote has room for this many pages
  const Map& map;
  int piece_rows;
  int page_size;
  KeyNote<kBlockN> note;

  template <class SlotTile>
  GPU_DEVICE void load(uint32_t tile, uint32_t barrier) const {
    const Boxes boxes = note.boxes();
    int row = boxes.key_row % page_size;
    for (int piece = 0; piece < kBlockN / piece_rows; ++piece) {
      SlotTile::load(tile + piece * piece_rows * SlotTile::kRowBytes, map, barrier, row, boxes.kv_head,
                     note.page(piece));
      row += piece_rows;
      if (row == page_size) row = 0;
    }
  }
};

// The role of the loading warp. All 32 lanes run these functions. TileLoader says which of them issues the loads.
template <class Plan>
struct Loader {
  static constexpr int kBlockN = Plan::kBlockN;
  const Params& p;
  const ForwardMaps& maps;
  const ForwardRings<Plan> rings;
  TileLoader loader;
  RingPosition<Plan::kQueryStages> q_position = {};
  RingPosition<Plan::kStages> k_position = {}, v_position = {};
  RingPosition<kKeyNotes> note_position = {}, free_position = {};
  int notes_in_use = 0;

  // Calls f with the rows of keys or values, of which `map` is the tensor map, of the block that a KeyNote is about.
  template <class F>
  GPU_DEVICE void with_rows(const Map& map, KeyNote<kBlockN> note, const Boxes& boxes, F f) const {
    if (Plan::kIsGeneral && p.pages.table != nullptr) {
      f(PagedRows<kBlockN>{map, maps.piece_rows, p.pages.size, note});
    } else {
      f(HeadRows{map, boxes.key_row, boxes.kv_head, boxes.batch});
    }
  }

  // Loads the keys of block n (counting from 0) as soon as a slot of their ring is empty. Then releases KeyNote n -
  // kStages - 1: the slot was empty, so every consumer has released the keys of block n - kStages. A consumer does that
  // after it has finished with the note of the block before.
  GPU_DEVICE void load_keys(KeyNote<kBlockN> note, const Boxes& boxes) {
    with_rows(maps.k, note, boxes, [&](const auto& rows) {
      loader.template load<typename Plan::KeyTile>(rings.k, k_position, rings.key_tile(k_position), rows);
    });
    k_position.advance();
    if (++notes_in_use <= Plan::kStages + 1) return;
    if (loader.is_leader) mbarrier_arrive(rings.notes.empty(free_position.slot()));
    free_position.advance();
  }

  // Loads the values of the block that a KeyNote is about. If some keys are not valid, their rows of the tile become
  // zeros.
  GPU_DEVICE void load_values(KeyNote<kBlockN> note) {
    const Boxes boxes = note.boxes();
    const uint32_t tile = rings.value_tile(v_position);
    with_rows(maps.v, note, boxes, [&](const auto& rows) {
      if (boxes.all_valid) {
        loader.template load<typename Plan::ValueTile>(rings.v, v_position, tile, rows);
      } else {
        loader.template load_valid<typename Plan::ValueTile>(rings.v, v_position, tile, rows, note.valid());
      }
    });
    v_position.advance();
  }

  // Loads the queries of a tile.
  GPU_DEVICE void load_queries(const Boxes& boxes) {
    loader.template load<typename Plan::QTile>(rings.q, q_position, rings.query_tile(q_position),
                                               {maps.q, boxes.query_row, boxes.head, boxes.batch});
    q_position.advance();
  }

  // Loads what each KeyNote asks for, until a note asks for nothing. The keys of a block are loaded before the values
  // of the block before it, because the consumers multiply in this order: they compute the scores of the next block
  // before they sum the values of this one. The queries of a tile come after the first keys of the tile.
  GPU_DEVICE void run() {
    KeyNote<kBlockN> before{};  // the note about the block before, whose values have not been loaded
    while (true) {
      note_position.wait_full(rings.notes);
      const KeyNote<kBlockN> note = rings.key_note(note_position);
      const Boxes boxes = note.boxes();
      if (boxes.what == 0) return;
      load_keys(note, boxes);
      if (boxes.what & Boxes::kQueries) {
        load_queries(boxes);
      } else {
        load_values(before);
      }
      if (boxes.what & Boxes::kIsLast) load_values(note);
      before = note;
      sync_warp();
      note_position.advance();
    }
  }
};

// The role of a warp that loads the bias for one consumer. One lane runs this: each KeyNote gives it a tile to load. It
// reads a KeyNote before the loading warp releases the note, for two reasons. The consumer waits for the tile before it
// releases the keys of the next block. The loading warp releases the note of block n only after all consumers have
// released the keys of block n + 1.
template <class Plan>
GPU_DEVICE void load_bias(const BiasMap& bias, const ForwardRings<Plan>& rings, int consumer) {
  using BiasTile = typename Plan::BiasTile;
  RingPosition<kKeyNotes> note_position = {};
  RingPosition<Plan::kBiasStages> position = {};
  for (; bias.is_used; note_position.advance(), position.advance()) {
    note_position.wait_full(rings.notes);
    const KeyNote<Plan::kBlockN> note = rings.key_note(note_position);
    const Boxes boxes = note.boxes();
    if (boxes.what == 0) return;
    position.wait_empty(rings.bias_ring(consumer));
    const uint32_t barrier = rings.bias_ring(consumer).full(position.slot());
    mbarrier_arrive_expect(barrier, BiasTile::loaded_bytes(bias));
    BiasTile::load(rings.bias_tile(consumer, position), bias, barrier, boxes.query_row + consumer * kConsumerRows,
                   boxes.key_row, boxes.head, boxes.batch);
  }
}

}  // namespace fused_attn::gpu::sm90
