// Forward for Hopper: out = softmax(logits) @ value, with TMA and wgmma. The kernel is persistent: a block of threads
// stays on its multiprocessor and computes one tile of queries after another. A tile has kBlockM queries of one head.
// The warps of the block have four roles:
//
//   planning warp   decides which tile of queries comes next, which blocks of keys the tile visits, and which of these
//                   blocks need no mask
//   loading warp    loads the queries of each tile, and its keys and values block by block, through rings of slots
//   bias warps      two warps, which load tiles of a dense bias for one consumer each (general kernels)
//   consumers       two or three warpgroups, which multiply. Each of them has 64 queries of the tile
//
// The planning warp writes its decisions to shared memory, as records that are called notes: a TileNote for each tile
// of queries, and a KeyNote for each block of keys. A consumer then reads one bit of a KeyNote to learn that a block
// needs no mask. Without notes, each consumer would load the padding and compare positions for every block.
//
// In each step a consumer starts two products on the tensor cores: the scores of the next block of keys, and probs @
// values of the current block. The consumer itself then computes only exponentials (LazySoftmax), which take less time
// than the products. So one consumer keeps the tensor cores busy while another one waits for its products, and the
// consumers need no barrier that makes them take turns.
//
// Padding and rows of other sequences may hold NaN, and NaN times a probability of 0 is NaN. Scores of such keys are
// hidden, which removes NaN from them. Values of such keys are overwritten with zeros by the loading warp, before it
// marks their slot as full.
#pragma once
#include <type_traits>

#include "../dropout.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../softmax.h"
#include "../splits.h"
#include "../tile_scheduler.h"
#include "../tiles.h"
#include "bias_tiles.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

constexpr int kWarpRows = 16;  // queries of one of its four warps
constexpr int kTileNotes = 2;  // slots of the ring of TileNotes: the next tile is loaded while this one is computed
constexpr uint32_t kTileNoteBytes = 128;  // bytes from one slot to the next
constexpr int kKeyNotes = 8;  // slots of the ring of KeyNotes: more than stages, so that the planning warp is ahead

// Sizes of the forward kernel: threads, registers, and where each tile, note and barrier lies in shared memory (byte
// offsets from its start).
template <int kHeadDim, int kValueDim, bool kIsGeneralOption>
struct ForwardPlan : ForwardTileSm90<kHeadDim, kIsGeneralOption> {
  using Sizes = ForwardTileSm90<kHeadDim, kIsGeneralOption>;
  static constexpr bool kIsGeneral = kIsGeneralOption;
  static constexpr int kConsumers = Sizes::kConsumers, kBlockN = Sizes::kBlockN;
  static constexpr int kStages = Sizes::kStages, kQueryStages = Sizes::kQueryStages;
  static constexpr int kBiasStages = Sizes::kBiasStages;
  static constexpr int kBlockM = kForwardRowsSm90<kHeadDim, kIsGeneral>;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kTiles = kBlockN / 8;  // tiles of 8 columns in a fragment of scores
  static constexpr int kConsumerWarps = kConsumers * kWarpsPerWarpgroup;

  // Registers of each thread. With setmaxnreg, the first warpgroup (all warps that do not multiply) gives up registers,
  // and the consumers get them.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 224;
  static_assert(fits_registers(kProducerRegisters, kConsumers, kConsumerRegisters));

  // Whether TMA stores the output. With head dim 128, this takes 175 instructions, and stores from registers take 296.
  // With larger head dims, shared memory is full. In a general kernel, tiles of 16-bit biases use the rest of the
  // memory. The speed has not been measured.
  static constexpr bool kStoresByTma = !kIsGeneral && kHeadDim <= 128;

  using QTile = Tile<kHeadDim, kBlockM>;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  using ValueTile = Tile<kValueDim, kBlockN>;
  using OutTile = Tile<kValueDim, kWarpRows>;  // each warp of the consumers stores its own rows
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + kQueryStages * QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KeyTile::kBytes;
  static constexpr uint32_t kOut = kV + kStages * ValueTile::kBytes;
  static constexpr uint32_t kTileNotesAt = kOut + (kStoresByTma ? kConsumerWarps * OutTile::kBytes : 0);
  static constexpr uint32_t kKeyNotesAt = kTileNotesAt + kTileNotes * kTileNoteBytes;
  static constexpr uint32_t kKeyNoteBytes = kIsGeneral ? 128 : 64;  // a plain kernel has no pages
  static constexpr uint32_t kRings = kKeyNotesAt + kKeyNotes * kKeyNoteBytes;
  static constexpr uint32_t kBytesWithoutBias = kRings + 512;
  // Tiles of a bias come last, so that a call without them leaves their memory to the L1 cache.
  using BiasTile = sm90::BiasTile<kBlockN, kConsumerRows>;
  static constexpr uint32_t kBias = (kBytesWithoutBias + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr uint32_t kBytes =
      kIsGeneral ? kBias + kConsumers * kBiasStages * BiasTile::kBytes : kBytesWithoutBias;
  static_assert(kBytes <= 227 * 1024);
  static_assert(!kIsGeneral || kConsumers == 2);  // there are two warps that load a bias
  static_assert(kKeyNotes % kBiasStages == 0);    // see Consumer::bias_position
  // The loading warp needs the note of block n to load the keys of this block, and releases the note of block n -
  // kStages - 1 only then (Loader::load_keys). With fewer slots, the planning warp would wait for this slot for ever.
  static_assert(kKeyNotes >= kStages + 2);
};

// ---- Notes in shared memory

constexpr int kNoMoreTiles = -1;

// The note about a tile of queries: its head slice, its first row, a split of its keys, and the blocks of this split
// that are visited. Lane 0 of the planning warp writes the note, and the consumers read it. The planning warp also reads
// its own note again instead of keeping these numbers in registers, of which it has few.
struct TileNote {
  uint32_t address;

  // Writes all fields but the ranges of the consumers.
  GPU_DEVICE void store(int32_t first_row, int32_t split, const BlockRange& blocks, const HeadSlice& head_slice) const {
    store_shared(address, Vec4{word(first_row), word(blocks.begin), word(blocks.end), word(head_slice.head)});
    store_shared(address + 16, Vec4{word(head_slice.batch), word(head_slice.kv_head), word(head_slice.k_offset),
                                    word(head_slice.seqlen_k)});
    store_shared(address + 32, Vec4{word(head_slice.q_offset), word(head_slice.seqlen_q), word(split), 0});
  }
  // The first query of the tile, or kNoMoreTiles.
  GPU_DEVICE int32_t first_row() const { return load_shared<int32_t>(address); }
  // Which split of the keys the blocks are.
  GPU_DEVICE int32_t split() const { return load_shared<int32_t>(address + 40); }
  // The blocks of keys to visit are first_block ... end_block - 1.
  GPU_DEVICE int32_t first_block() const { return load_shared<int32_t>(address + 4); }
  GPU_DEVICE int32_t end_block() const { return load_shared<int32_t>(address + 8); }

  GPU_DEVICE void store_end_block(int32_t block) const { store_shared(address + 8, block); }

  // The head slice with its fields for queries alone, or for keys alone. The other fields are 0, and need no register.
  GPU_DEVICE HeadSlice query_slice() const {
    const Vec2 x = load_shared<Vec2>(address + 32);
    return {
        load_shared<int32_t>(address + 16), load_shared<int32_t>(address + 12), 0, int32_t(x.x), 0, int32_t(x.y), 0};
  }
  GPU_DEVICE HeadSlice key_slice() const {
    const Vec4 x = load_shared<Vec4>(address + 16);
    return {int32_t(x.x), 0, int32_t(x.y), 0, int32_t(x.z), 0, int32_t(x.w)};
  }

  GPU_DEVICE HeadSlice head_slice() const {
    const Vec4 x = load_shared<Vec4>(address + 16);
    const Vec2 queries = load_shared<Vec2>(address + 32);
    return {int32_t(x.x), load_shared<int32_t>(address + 12),
            int32_t(x.y), int32_t(queries.x),
            int32_t(x.z), int32_t(queries.y),
            int32_t(x.w)};
  }

  // The blocks of keys that the 64 queries of a consumer see, by the band.
  GPU_DEVICE void store_range(int consumer, const BlockRange& range) const {
    store_shared(address + 48 + 16 * consumer,
                 Vec4{word(range.begin), word(range.end), word(range.full_begin), word(range.full_end)});
  }
  GPU_DEVICE BlockRange range(int consumer) const {
    const Vec4 x = load_shared<Vec4>(address + 48 + 16 * consumer);
    return {int32_t(x.x), int32_t(x.y), int32_t(x.z), int32_t(x.w)};
  }

 private:
  static GPU_DEVICE uint32_t word(int32_t x) { return static_cast<uint32_t>(x); }
};

// Bits about one consumer and one block of keys: what the 64 queries of the consumer see. A word of a KeyNote.
struct View {
  static constexpr uint32_t kIsSeen = 1;    // some query sees some key
  static constexpr uint32_t kIsWhole = 2;   // every query sees every key, so that no entry needs a test
  static constexpr uint32_t kSeesMore = 4;  // some query sees some key of the block that is visited next
  static constexpr uint32_t kIsLast = 8;    // the tile visits no block after this one
  uint32_t bits;

  GPU_DEVICE bool has(uint32_t bit) const { return (bits & bit) != 0; }
  GPU_DEVICE void set(uint32_t bit, bool is_set) { bits |= is_set ? bit : 0; }
};

// What the loading warp has to load when a KeyNote comes. The two row numbers are rows of the tensors, as TMA counts
// them.
struct Boxes {
  static constexpr int32_t kKeys = 1, kQueries = 2, kIsLast = 4;  // kIsLast: the last block of keys of a tile
  int32_t what;       // a sum of the bits above; 0 = there is nothing more to load
  int32_t key_row;    // first row of the block in key and value
  int32_t query_row;  // first row of the tile in query
  int32_t all_valid;  // not 0 if all keys of the block are valid: no row of the values is overwritten with zeros
  int32_t batch, head, kv_head;
};

// The note about a block of keys. Lanes of the planning warp write its fields, and the loading warp and the consumers
// read them. Bytes: 0 views of the consumers, 12 number of the block, 16 valid keys, 32 boxes to load, 64 pages.
template <int kBlockN>
struct KeyNote {
  uint32_t address;

  GPU_DEVICE void store_view(int consumer, View view) const { store_shared(address + 4 * consumer, view.bits); }
  GPU_DEVICE View view(int consumer) const { return {load_shared<uint32_t>(address + 4 * consumer)}; }

  GPU_DEVICE void store_block(int32_t block, const ValidRows<kBlockN>& valid) const {
    store_shared(address + 12, block);
    store_shared(address + 16, valid);
  }
  GPU_DEVICE int32_t block() const { return load_shared<int32_t>(address + 12); }
  GPU_DEVICE ValidRows<kBlockN> valid() const { return load_shared<ValidRows<kBlockN>>(address + 16); }

  GPU_DEVICE void store_boxes(const Boxes& x) const {
    store_shared(address + 32,
                 Vec4{uint32_t(x.what), uint32_t(x.key_row), uint32_t(x.query_row), uint32_t(x.all_valid)});
    store_shared(address + 48, Vec4{uint32_t(x.batch), uint32_t(x.head), uint32_t(x.kv_head), 0});
  }
  GPU_DEVICE Boxes boxes() const {
    const Vec4 a = load_shared<Vec4>(address + 32), b = load_shared<Vec4>(address + 48);
    return {int32_t(a.x), int32_t(a.y), int32_t(a.z), int32_t(a.w), int32_t(b.x), int32_t(b.y), int32_t(b.z)};
  }

  // The page of each piece of the block, if keys lie in pages: see PagedRows.
  GPU_DEVICE void store_page(int piece, int32_t page) const { store_shared(address + 64 + 4 * piece, page); }
  GPU_DEVICE int32_t page(int piece) const { return load_shared<int32_t>(address + 64 + 4 * piece); }
};

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

// All rings and barriers of the forward kernel, and the addresses of their slots in shared memory.
template <class Plan>
struct ForwardRings {
  Ring<Plan::kQueryStages> q;  // tiles of queries
  Ring<Plan::kStages> k;       // tiles of keys; v: tiles of values
  Ring<Plan::kStages> v;
  Ring<kTileNotes> tiles;            // TileNotes
  Ring<kKeyNotes> notes;             // KeyNotes
  Ring<2 * Plan::kBiasStages> bias;  // tiles of the bias, in a general kernel: see bias_ring
  uint32_t cleaning;  // a barrier: a tile of values has arrived, and its rows that are not valid can be overwritten
  uint32_t shared;    // address of the dynamic shared memory

  GPU_DEVICE explicit ForwardRings(uint32_t shared) : shared(shared) {
    cleaning =
        lay_out_rings<Plan::kBytesWithoutBias - Plan::kRings, 8>(shared + Plan::kRings, q, k, v, tiles, notes, bias);
  }

  // Initialises all barriers. One thread calls this, before the block synchronises.
  GPU_DEVICE void init() const {
    init_rings(Plan::kConsumerWarps, q, k, v, tiles);
    notes.init(1);  // the loading warp alone releases KeyNotes, see Loader::load_keys
    if constexpr (Plan::kIsGeneral) bias.init(kWarpsPerWarpgroup);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }

  // The slot in shared memory that a position in a ring stands for: a note, or the address of a tile.
  GPU_DEVICE TileNote tile_note(RingPosition<kTileNotes> position) const {
    return {shared + Plan::kTileNotesAt + position.slot() * kTileNoteBytes};
  }
  GPU_DEVICE KeyNote<Plan::kBlockN> key_note(RingPosition<kKeyNotes> position) const {
    return {shared + Plan::kKeyNotesAt + position.slot() * Plan::kKeyNoteBytes};
  }
  GPU_DEVICE uint32_t query_tile(RingPosition<Plan::kQueryStages> position) const {
    return shared + Plan::kQ + position.slot() * Plan::QTile::kBytes;
  }
  GPU_DEVICE uint32_t key_tile(RingPosition<Plan::kStages> position) const {
    return shared + Plan::kK + position.slot() * Plan::KeyTile::kBytes;
  }
  GPU_DEVICE uint32_t value_tile(RingPosition<Plan::kStages> position) const {
    return shared + Plan::kV + position.slot() * Plan::ValueTile::kBytes;
  }

  // Each consumer of a general kernel has a ring of its own for tiles of the bias.
  GPU_DEVICE Ring<Plan::kBiasStages> bias_ring(int consumer) const { return {bias.full(consumer * Plan::kBiasStages)}; }
  GPU_DEVICE uint32_t bias_tile(int consumer, RingPosition<Plan::kBiasStages> position) const {
    return shared + Plan::kBias + (consumer * Plan::kBiasStages + position.slot()) * Plan::BiasTile::kBytes;
  }
};

// Tensor maps, by which TMA loads query, key, value and a dense bias, and stores the output (kStoresByTma).
struct ForwardMaps {
  Map q;
  Map k;
  Map v;
  Map out;
  BiasMap bias;
  int32_t piece_rows;  // the rows that one copy of keys or values moves: a whole block, or a piece of it within a page
};

// ---- The planning warp

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
    return last_block_to_visit<Plan::kIsGeneral, Plan::kBlockM, kBlockN>(p, head_slice, tile().first_row(),
                                                                         tile().first_block(), block);
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

// ---- The loading warp

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

// ---- The consumers

// The role of a consumer. All 128 threads of the warpgroup run these functions, and each thread has two rows of the
// fragments: queries thread_row and thread_row + 8 of the tile. The positions say how far this consumer has got in each
// ring.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
struct Consumer {
  using Plan = ForwardPlan<kHeadDim, kValueDim, kIsGeneral>;
  static constexpr int kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;
  const Params& p;
  const ForwardMaps& maps;
  const ForwardRings<Plan> rings;
  const int number;  // 0, 1, ...: which consumer this is
  const Lane lane = this_lane();
  const int thread_row = kConsumerRows * number + thread_index() % kWarpgroup / 32 * 16 + lane.g;

  RingPosition<kTileNotes> tile_position = {};
  RingPosition<Plan::kQueryStages> q_position = {};
  RingPosition<Plan::kStages> k_position = {}, v_position = {};
  RingPosition<kKeyNotes> note_position = {};

  LazySoftmax softmax;
  RowMaxima maxima;  // of a general kernel, if the caller wants row_max
  float acc[kValueDim / 8][4], scores[kTiles][4], rescale[2];
  uint32_t probs[kBlockN / 16][4];
  DropoutKeep<kTiles> dropout_keep;  // of a general kernel with dropout

  // Marks the slot as empty for this warp, and goes on to the next slot.
  template <int kSlots>
  static GPU_DEVICE void release(const Ring<kSlots>& ring, RingPosition<kSlots>& position) {
    position.release(ring);
    position.advance();
  }

  // Starts scores = queries @ keys^T on the tensor cores. wgmma_wait waits for the result.
  GPU_DEVICE void start_scores() {
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, Plan::kBlockM>(scores, rings.query_tile(q_position), kConsumerRows * number,
                                                          rings.key_tile(k_position));
    wgmma_commit();
  }
  // Starts acc += probs @ values on the tensor cores.
  GPU_DEVICE void start_values() {
    wgmma_fence();
    start_multiply<T, kValueDim>(acc, probs, rings.value_tile(v_position));
    wgmma_commit();
  }
  GPU_DEVICE bool has_dropout() const { return kIsGeneral && p.dropout_seed != nullptr; }
  // With dropout, computes which probs of this block survive. This is called while products run on the tensor cores.
  GPU_DEVICE void draw_dropout(TileNote tile, KeyNote<kBlockN> note) {
    if (has_dropout())
      dropout_keep = dropout_keep_of_query_rows<kTiles>(Dropout(p, tile.query_slice()), tile.first_row() + thread_row,
                                                        note.block() * kBlockN, lane);
  }
  // The ring of tiles of the bias, and the position in it of the current block of keys. There is a tile for each
  // KeyNote, so that the position needs no register of its own.
  GPU_DEVICE Ring<Plan::kBiasStages> bias_ring() const { return rings.bias_ring(number); }
  GPU_DEVICE RingPosition<Plan::kBiasStages> bias_position() const { return {note_position.uses - 1}; }

  // The tile of the bias for the current scores, as to_logits takes it.
  struct CurrentBias {
    const BiasMap& bias;
    Ring<Plan::kBiasStages> ring;
    RingPosition<Plan::kBiasStages> position;
    uint32_t tile;
    int first_query;  // of this warp, in the tile
    Lane lane;

    GPU_DEVICE bool is_used() const { return bias.is_used; }
    GPU_DEVICE void add(float (&scores)[kTiles][4], float factor) const {
      position.wait_full(ring);
      Plan::BiasTile::template add<T>(scores, factor, tile, bias, first_query, lane);
      position.release(ring);
    }
  };
  GPU_DEVICE CurrentBias current_bias() const {
    return {maps.bias,
            bias_ring(),
            bias_position(),
            rings.bias_tile(number, bias_position()),
            (thread_row - lane.g) % kConsumerRows,
            lane};
  }

  // Turns scores into logits (general kernels), sets the entries to -inf that a query does not see, and takes the
  // scores into account for row_max.
  GPU_DEVICE void finish_scores(TileNote tile, KeyNote<kBlockN> note, View view) {
    const int query = tile.first_row() + thread_row;
    if constexpr (kIsGeneral)
      to_logits<T>(p, tile.head_slice(), scores, QueryRows{query, note.block() * kBlockN + 2 * lane.q}, NoGradients{},
                   current_bias());
    if (!view.has(View::kIsWhole)) {
      VisibleColumns<kBlockN> visible = visible_keys({p, tile.head_slice()}, note.valid(), note.block(), query);
      if constexpr (kIsGeneral) {
        if (p.mask.map != nullptr) hide_masked_keys(p, tile.head_slice(), visible, query, note.block() * kBlockN);
      }
      hide(scores, visible, lane);
    }
    if (kIsGeneral && p.row_max.data != nullptr) maxima.add(scores);
  }
  // Calls f with what tells which entries survive dropout: dropout_keep, or NoDropout.
  template <class F>
  GPU_DEVICE void with_dropout(F f) {
    has_dropout() ? f(dropout_keep) : f(NoDropout{});
  }
  // Computes probs of a tile's first block, which needs a new reference in any case.
  GPU_DEVICE void raise_and_compute_probs() {
    with_dropout([&](const auto& survivors) {
      softmax.template raise_and_compute_probs<T>(scores, p.softmax_scale_log2, survivors, probs, rescale);
    });
  }
  // Computes probs of a later block with the reference as it is. If the probs are too large, raises the reference and
  // multiplies acc by the rescale factor.
  GPU_DEVICE void compute_probs() {
    with_dropout([&](const auto& survivors) {
      if (softmax.template try_probs<T>(scores, p.softmax_scale_log2, survivors, probs)) return;
      softmax.template raise_and_compute_probs<T>(scores, p.softmax_scale_log2, survivors, probs, rescale);
      scale_rows(acc, rescale);
    });
  }

  // Waits until the next block of keys is in shared memory. Sets `note` to the block's KeyNote, and returns what this
  // consumer sees of the block. The loaded keys imply a full note: the loading warp has read the note before.
  GPU_DEVICE View wait_for_keys(KeyNote<kBlockN>& note) {
    k_position.wait_full(rings.k);
    note = rings.key_note(note_position);
    note_position.advance();
    return note.view(number);
  }
  // Releases the bias, the keys and the values of a block that only other consumers of this block of threads see.
  GPU_DEVICE void pass_block() {
    if (kIsGeneral && maps.bias.is_used) {
      bias_position().wait_full(bias_ring());
      bias_position().release(bias_ring());
    }
    release(rings.k, k_position);
    v_position.wait_full(rings.v);
    release(rings.v, v_position);
  }

  // Sums probs @ values over all blocks of keys of the tile into acc. The scores of the next block are computed in the
  // same step as the values of this block are summed, so the first scores and the last values stand outside of the
  // loop.
  GPU_DEVICE void visit_blocks(TileNote tile) {
    q_position.wait_full(rings.q);
    KeyNote<kBlockN> note;
    View view = wait_for_keys(note);
    while (!view.has(View::kIsSeen)) {
      pass_block();
      if (view.has(View::kIsLast)) return release(rings.q, q_position);
      view = wait_for_keys(note);
    }

    // The first scores.
    start_scores();
    draw_dropout(tile, note);
    wgmma_wait<0>();
    keep_registers(flat(scores));
    release(rings.k, k_position);
    if (!view.has(View::kSeesMore)) release(rings.q, q_position);
    finish_scores(tile, note, view);
    raise_and_compute_probs();

    // The next scores and these values.
    while (view.has(View::kSeesMore)) {
      view = wait_for_keys(note);
      v_position.wait_full(rings.v);
      start_scores();
      start_values();
      draw_dropout(tile, note);
      wgmma_wait<1>();
      keep_registers(flat(scores));
      release(rings.k, k_position);
      finish_scores(tile, note, view);
      wgmma_wait<0>();  // before the probabilities are overwritten
      keep_registers(flat(acc));
      release(rings.v, v_position);
      // The order matters: this branch between the release of the values and compute_probs keeps ptxas from moving the
      // release down among the exponentials.
      if (!view.has(View::kSeesMore)) release(rings.q, q_position);
      compute_probs();
    }

    // The last values.
    v_position.wait_full(rings.v);
    start_values();
    wgmma_wait<0>();
    keep_registers(flat(acc));
    release(rings.v, v_position);
    while (!view.has(View::kIsLast)) {
      view = wait_for_keys(note);
      pass_block();
    }
  }

  // Divides acc by the sums of the softmax, and writes out and lse of this thread's two rows to global memory. If keys
  // are divided, writes the sums of the split instead.
  GPU_DEVICE void store(TileNote tile) {
    const HeadSlice head_slice = tile.query_slice();
    const int warp_row = tile.first_row() + thread_row - lane.g;
    if (p.splits.count > 1) {
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        store_split_row(p, tile.split(), head_slice, warp_row + lane.g + 8 * r, acc, r, softmax, row_max(r), lane);
      }
      return;
    }
    if constexpr (Plan::kStoresByTma) {
      // TMA leaves out rows past the end of the tensor. In a packed tensor, rows of another sequence follow. shuffle
      // tells the compiler that a warp agrees: otherwise it moves descriptors between the products of the main loop.
      const bool is_whole = p.cu_seqlens_q == nullptr || warp_row + kWarpRows <= head_slice.seqlen_q;
      if (shuffle(static_cast<uint32_t>(is_whole), 0)) {
        float factor[2], lse[2];
        GPU_UNROLL for (int r = 0; r < 2; ++r) finish_row(head_slice, r, factor[r], lse[r]);
        store_by_tma(head_slice, warp_row, factor);
        // lse comes last, because the fence in store_by_tma waits for the stores before it.
        GPU_UNROLL for (int r = 0; r < 2; ++r) store_statistics(head_slice, r, warp_row + lane.g + 8 * r, lse[r]);
        return;
      }
    }
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = warp_row + lane.g + 8 * r;
      float factor, lse;
      finish_row(head_slice, r, factor, lse);
      store_statistics(head_slice, r, row, lse);
      store_row<T>(head_slice.query_row<T>(p.out, row), acc, r, factor, row < head_slice.seqlen_q, p.out.columns, lane);
    }
  }

  // What acc of this thread's row r is multiplied by, and the row's lse.
  GPU_DEVICE void finish_row(const HeadSlice& head_slice, int r, float& factor, float& lse) {
    softmax.finish(r, p.softmax_scale, p.softmax_scale_log2, factor, lse);
    if constexpr (kIsGeneral) {
      if (p.sinks != nullptr) join_sink(load_global(p.sinks + head_slice.head), factor, lse);
      factor *= p.dropout_scale;
    }
  }

  // The largest logit of this thread's row r, if it is wanted.
  GPU_DEVICE float row_max(int r) const {
    return kIsGeneral && p.row_max.data != nullptr ? maxima.of_row(r, p.softmax_scale) : -kInfinity;
  }

  // Writes lse and the largest logit of this thread's row r, if they are wanted. row: its number in its sequence
  GPU_DEVICE void store_statistics(const HeadSlice& head_slice, int r, int row, float lse) {
    const bool is_row = row < head_slice.seqlen_q;
    const float largest = row_max(r);
    if (kIsGeneral && p.row_max.data != nullptr && lane.q == 0 && is_row)
      store_global(head_slice.query_value(p.row_max, row), largest);
    if (p.lse.data != nullptr && lane.q == 0 && is_row) store_global(head_slice.query_value(p.lse, row), lse);
  }

  // Writes this warp's rows of the output to shared memory, and lets TMA copy them to the rows of `out` from warp_row
  // on.
  GPU_DEVICE void store_by_tma(const HeadSlice& head_slice, int warp_row, const float (&factor)[2]) {
    using OutTile = typename Plan::OutTile;
    const uint32_t rows = rings.shared + Plan::kOut + (thread_index() / 32 - kWarpsPerWarpgroup) * OutTile::kBytes;
    scale_rows(acc, factor);
    wait_for_store();
    sync_warp();
    const uint32_t own_row = OutTile::matrix_row(rows, 0, lane);
    GPU_UNROLL for (int k = 0; k < kValueDim / 16; ++k) {
      uint32_t rounded[4];
      left_factor<T>(rounded, acc, k);
      store_matrix_x4(OutTile::matrix_chunk(own_row, k), rounded);
    }
    fence_async_proxy();
    sync_warp();  // all lanes have written
    if (lane.index == 0) {
      OutTile::store(maps.out, rows, head_slice.q_offset + warp_row, head_slice.head, head_slice.batch, p.out.columns);
      tma_store_commit();
    }
  }

  // Waits until TMA has read what this warp has written to shared memory before. Lane 0 alone has issued copies, and
  // the other lanes pass at once.
  GPU_DEVICE void wait_for_store() const {
    if constexpr (Plan::kStoresByTma) tma_store_wait_read<0>();
  }

  GPU_DEVICE void run() {
    while (true) {
      tile_position.wait_full(rings.tiles);
      const TileNote tile = rings.tile_note(tile_position);
      if (tile.first_row() == kNoMoreTiles) break;
      softmax.init();
      maxima.init();
      fill(acc, 0.0f);
      if (tile.first_block() < tile.end_block()) visit_blocks(tile);
      store(tile);
      release(rings.tiles, tile_position);
    }
    wait_for_store();
  }
};

// The forward kernel, launched by launch_forward (launchers.h). Of the first warpgroup, warp 0 is the loading warp and
// warp 1 the planning warp. Warps 2 and 3 load a bias (load_bias). Each further warpgroup is a consumer.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((ForwardPlan<kHeadDim, kValueDim, kIsGeneral>::kThreads), 1)
    forward_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT ForwardMaps maps, int num_tiles) {
  using Plan = ForwardPlan<kHeadDim, kValueDim, kIsGeneral>;
  const ForwardRings<Plan> rings(keep_computed(shared_address(shared_memory())));
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<Plan::kProducerRegisters>();
    if (thread_index() < 32) {
      Loader<Plan>{p, maps, rings, {rings.cleaning, thread_index() == 0}}.run();
    } else if (thread_index() < 64) {
      Planner<Plan>{p, rings, maps.piece_rows}.run(num_tiles);
    } else if (kIsGeneral && thread_index() % 32 == 0) {
      load_bias(maps.bias, rings, thread_index() / 32 - 2);
    }
  } else {
    increase_registers<Plan::kConsumerRegisters>();
    Consumer<T, kHeadDim, kValueDim, kIsGeneral>{p, maps, rings, warpgroup - 1}.run();
  }
}

}  // namespace fused_attn::gpu::sm90
