// The notes of the forward kernel (forward.h): what the planning warp tells the other warps, in shared memory.
#pragma once
#include "../head_slice.h"
#include "../visibility.h"

namespace fused_attn::gpu::sm90 {

constexpr int kTileNotes = 2;  // slots of the ring of TileNotes: the next tile is loaded while this one is computed
constexpr uint32_t kTileNoteBytes = 128;  // bytes from one slot to the next
constexpr int kKeyNotes = 8;  // slots of the ring of KeyNotes: more than stages, so that the planning warp is ahead

constexpr int kNoMoreTiles = -1;

// The note about a tile of queries: its head slice, its first row, a split of its keys, and the blocks of this split
// that are visited. Lane 0 of the planning warp writes the note, and the consumers read it. The planning warp also
// reads its own note again instead of keeping these numbers in registers, of which it has few. Bytes: 0 first row,
// first block, end of the blocks, head; 16 batch, key head, k_offset, seqlen_k; 32 q_offset, seqlen_q, split; 48 a
// range of blocks for each consumer.
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

}  // namespace fused_attn::gpu::sm90
