// The order of work in the fused backward: which blocks of keys are taken when, which tiles of queries see a block of
// keys, and when a block of keys may add to a tile of dq. The preparation kernel writes the list of all blocks of
// keys (list_key_blocks). The warps of the fused backward read one entry of this list after another from shared memory.
//
// Blocks of keys are taken from the last one of a head to the first. Each visits its tiles of queries in ascending
// order. Measured on an H100 against the opposite order of both, with a causal mask:
//
//   4 to 8 % faster at 1k and 2k
//   equal at 16k for head dim 128
//   28 % faster at 16k for head dim 64, where in the opposite order all blocks of keys begin with the last tile of
//   queries, and wait for one another there
//
// Under a causal mask, each block of keys begins with another tile of queries, so no block waits at its beginning.
//
// A third order would let each block of keys begin at a tile of its own and go round (shifted). For it, all blocks of a
// head have to be resident at the same time. On a GPU with fewer multiprocessors, or beside other kernels, they would
// wait for one another for ever. Measured on an H200 with an earlier form of this kernel, TFLOP/s of a whole backward:
//
//   (B, H, L, D)        mask     ascending   descending   shifted   additions in any order
//   1, 16, 16384, 128   causal   546         557          555       603 to 610
//   8, 16,  2048, 128   causal   408                      354       419
//   4, 32,  4096,  64   full     500                      496       494
//   8, 32,  2048,  64   full     462                                450
//   8, 32,  2048,  64   causal   363                      307       363
#pragma once
#include "../gradient_splits.h"
#include "../mask_bits.h"
#include "../splits.h"
#include "../tile_scheduler.h"

namespace fused_attn::gpu::sm90 {

constexpr int32_t kNoMoreKeys = -1;  // the number of a KeyBlock that tells a warp that no work is left

constexpr uint32_t kKeyBlockBytes = sizeof(KeyBlock);
static_assert(kKeyBlockBytes % 16 == 0);  // bulk copies move multiples of 16 bytes
static_assert(kKeyBlock == 128);          // SharedKeyBlock::valid reads four words

GPU_DEVICE constexpr int32_t floor_log2(int32_t x) { return x <= 1 ? 0 : 1 + floor_log2(x / 2); }

// Tile m of queries and block n of keys meet if, by the band alone, some query of the tile sees some key of the block.
// first_tile and last_tile give the tiles that meet block n, and last_key_block gives the last block that meets tile m.
// All three take whole tiles and whole blocks, also where the sequence ends within one. So both sides count the same
// pairs.
template <int kBlockM>
GPU_DEVICE int32_t first_tile(const Diagonals& band, int32_t n) {
  return band.first_query(n * kKeyBlock) >> floor_log2(kBlockM);  // rounds down, below 0, too
}
template <int kBlockM>
GPU_DEVICE int32_t last_tile(const Diagonals& band, int32_t n) {
  return band.last_query(n * kKeyBlock + kKeyBlock - 1) >> floor_log2(kBlockM);
}
template <int kBlockM>
GPU_DEVICE int32_t last_key_block(const Diagonals& band, int32_t m) {
  return band.last_key(m * kBlockM + kBlockM - 1) >> floor_log2(kKeyBlock);
}

// Returns how many of the first n blocks of keys of a sequence have a valid key. A block without a valid key adds
// nothing to dq, so it has no turn (turn_at).
GPU_DEVICE int32_t key_rank(const Params& p, int32_t batch, int32_t n) {
  return p.key_ranks == nullptr ? n : load_global(p.key_ranks + int64_t{batch} * (p.num_key_blocks + 1) + n);
}

// How many entries of a key head the list has for the sequences before this one, if each has its own number of entries.
GPU_DEVICE int32_t entries_before(const Params& p, int32_t sequence) {
  static_assert(kKeyBlock == kRowBlock);
  return first_row_block_of(p.cu_seqlens_k, sequence, p.rows_k);
}

// Which block of keys number `block` of the list stands for, if each sequence has its own number of entries. The number
// of the block is -1 if the entry belongs to no sequence. The block may lie behind the last one of the sequence.
GPU_DEVICE WorkTile listed_block(const Params& p, int32_t block) {
  const int32_t kv_heads = p.num_heads / p.group_size, entry = block / kv_heads;
  int32_t sequence = 0;
  for (int32_t end = p.batch; end - sequence > 1;) {
    const int32_t middle = (sequence + end) / 2;
    (entries_before(p, middle) <= entry ? sequence : end) = middle;
  }
  const int32_t before = entries_before(p, sequence), entries = entries_before(p, sequence + 1) - before;
  // The offsets have not been checked. With wrong ones, an entry may belong to no sequence.
  if (entry < before || entry - before >= entries) return {-1, 0, 0};
  const WorkTile own = scheduled_tile(block - before * kv_heads, entries, kv_heads, 1, p.heads_per_l2_group,
                                      /*last_first=*/true);
  return {own.block, own.head, sequence};
}

// Computes entry `program` of the list: the KeyBlock of a block of keys (WorkTile::block) of a key head. Each split of
// the block has an entry, and so an equal share of the tiles that meet the block. A block that is none, or that lies
// behind the end of its sequence, has no step.
template <int kBlockM>
GPU_DEVICE KeyBlock key_block(const Params& p, const WorkTile& work, int32_t program) {
  KeyBlock b{};
  b.program = program;
  if (work.block < 0) return b;
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head * p.group_size, work.head);
  const int32_t first_key = work.block * kKeyBlock;
  const ValidRows<kKeyBlock> valid = valid_keys<kKeyBlock>(p, head_slice, work.block);
  const BlockRange range = query_range<kBlockM>(p, head_slice, first_key, first_key + kKeyBlock - 1);
  const Diagonals band(p, head_slice);
  b.number = work.block;
  b.batch = head_slice.batch;
  b.head = head_slice.head;
  b.kv_head = head_slice.kv_head;
  b.q_offset = head_slice.q_offset;
  b.seqlen_q = head_slice.seqlen_q;
  b.padded_q_offset = head_slice.padded_q_offset;
  b.k_offset = head_slice.k_offset;
  b.seqlen_k = head_slice.seqlen_k;
  BlockRange tiles{};
  tiles.begin = max(first_tile<kBlockM>(band, work.block), 0);
  tiles.end = min(last_tile<kBlockM>(band, work.block) + 1, (head_slice.seqlen_q + kBlockM - 1) / kBlockM);
  tiles = blocks_of_split(tiles, SplitOfBlock(program, p.dk_splits).split, p.dk_splits);
  b.begin = tiles.begin;
  b.end = tiles.end;
  b.full_begin = range.full_begin;
  b.full_end = valid.all() ? range.full_end : range.full_begin;
  b.rank_after = key_rank(p, work.batch, work.block + 1);
  b.steps = valid.none() ? 0 : max(b.end - b.begin, 0) * p.group_size;
  GPU_UNROLL for (int w = 0; w < valid.kWords; ++w) b.valid[w] = valid.words[w];
  return b;
}

// Writes the entries of the list of blocks of keys for batch entries first_batch ... end_batch - 1. The caller is
// number `thread` of the `threads` threads that share them. Of each head, the last blocks are taken first. The splits
// of a block come one after another. So a block of keys still waits only for entries before its own. All threads of a
// warp call this.
//
// If the offsets of sequences do not ascend, the list has no block of keys. Sequences that overlap would count their
// turns at the same tiles of dq (DqTurn), and blocks of keys that are not listed would never take theirs. So the other
// blocks would wait for ever.
template <int kBlockM>
GPU_DEVICE void list_key_blocks(const Params& p, int32_t first_batch, int32_t end_batch, int64_t thread,
                                int64_t threads) {
  const int32_t kv_heads = p.num_heads / p.group_size;
  const int64_t of_entry = int64_t{kv_heads} * p.num_key_blocks * p.dk_splits;
  const int64_t end = p.finds_keys_by_offset ? p.num_listed_key_blocks : end_batch * of_entry;
  // The preparation kernel has many more threads than the list has entries.
  const bool warp_has_entry = first_batch * of_entry + thread / 32 * 32 < end;
  if (!warp_has_entry) return;
  const bool has_blocks = offsets_ascend(p.cu_seqlens_q, p.batch, p.rows_q, this_lane()) &&
                          offsets_ascend(p.cu_seqlens_k, p.batch, p.rows_k, this_lane());
  for (int64_t i = first_batch * of_entry + thread; i < end; i += threads) {
    WorkTile work;
    int32_t program = static_cast<int32_t>(i);
    const SplitOfBlock part(program, p.dk_splits);
    if (p.finds_keys_by_offset) {
      work = listed_block(p, part.block);
    } else {
      const int32_t head = part.block / p.num_key_blocks;  // counted over all batch entries
      work = {part.block % p.num_key_blocks, head % kv_heads, head / kv_heads};
      const int32_t block =
          program_of(work, p.num_key_blocks, kv_heads, p.batch, p.heads_per_l2_group, /*last_first=*/true);
      program = block * p.dk_splits + part.split;
    }
    if (!has_blocks) work.block = -1;
    const KeyBlock b = key_block<kBlockM>(p, work, program);
    Vec4 words[kKeyBlockBytes / 16];
    __builtin_memcpy(words, &b, kKeyBlockBytes);
    Vec4* const listed = reinterpret_cast<Vec4*>(p.key_blocks + b.program);
    GPU_UNROLL for (uint32_t w = 0; w < kKeyBlockBytes / 16; ++w) store_global(listed + w, words[w]);
  }
}

// A KeyBlock in a slot of shared memory. Each function reads one field where it is needed, because keeping the fields
// would take registers. See KeyBlock (params.h) for what the fields mean.
struct SharedKeyBlock {
  uint32_t address;

  GPU_DEVICE int32_t number() const { return read(offsetof(KeyBlock, number)); }
  GPU_DEVICE int32_t batch() const { return read(offsetof(KeyBlock, batch)); }
  GPU_DEVICE int32_t head() const { return read(offsetof(KeyBlock, head)); }
  GPU_DEVICE int32_t kv_head() const { return read(offsetof(KeyBlock, kv_head)); }
  GPU_DEVICE int32_t q_offset() const { return read(offsetof(KeyBlock, q_offset)); }
  GPU_DEVICE int32_t seqlen_q() const { return read(offsetof(KeyBlock, seqlen_q)); }
  GPU_DEVICE int32_t padded_q_offset() const { return read(offsetof(KeyBlock, padded_q_offset)); }
  GPU_DEVICE int32_t k_offset() const { return read(offsetof(KeyBlock, k_offset)); }
  GPU_DEVICE int32_t seqlen_k() const { return read(offsetof(KeyBlock, seqlen_k)); }
  GPU_DEVICE int32_t begin() const { return read(offsetof(KeyBlock, begin)); }
  GPU_DEVICE int32_t end() const { return read(offsetof(KeyBlock, end)); }
  GPU_DEVICE int32_t rank_after() const { return read(offsetof(KeyBlock, rank_after)); }
  GPU_DEVICE int32_t steps() const { return read(offsetof(KeyBlock, steps)); }
  GPU_DEVICE int32_t program() const { return read(offsetof(KeyBlock, program)); }

  // Whether all queries of a tile see all keys of the block, so that no entry needs a test.
  GPU_DEVICE bool is_whole(int32_t tile) const {
    return tile >= read(offsetof(KeyBlock, full_begin)) && tile < read(offsetof(KeyBlock, full_end));
  }
  GPU_DEVICE ValidRows<kKeyBlock> valid() const {
    const Vec4 words = load_shared<Vec4>(address + offsetof(KeyBlock, valid));
    return {{words.x, words.y, words.z, words.w}};
  }
  // Whether key `key` of the block is valid.
  GPU_DEVICE bool is_valid(uint32_t key) const {
    return read(offsetof(KeyBlock, valid) + key / 32 * 4) >> (key % 32) & 1;
  }
  // What to_logits and the dense mask need to know of the head slice of a query head.
  GPU_DEVICE HeadSlice score_slice(int32_t head) const { return {batch(), head, 0, 0, 0, seqlen_q(), seqlen_k(), 0}; }
  // Address of row `row` of this key head in a tensor like key: as HeadSlice::key_row.
  template <class T>
  GPU_DEVICE T* key_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch() * x.stride_batch + kv_head() * x.stride_head +
           (k_offset() + row) * x.stride_row;
  }
  // Address of row `row` of a query head in a tensor like query: as HeadSlice::query_row.
  template <class T>
  GPU_DEVICE T* query_row(const Rows& x, int32_t head, int64_t row) const {
    return static_cast<T*>(x.data) + batch() * x.stride_batch + head * x.stride_head +
           (q_offset() + row) * x.stride_row;
  }
  // The number of the first row block of the sequence for a query head of the group: as HeadSlice::first_row_block.
  GPU_DEVICE int64_t row_block(const Params& p, int32_t head) const {
    const int64_t entry = p.cu_seqlens_q != nullptr ? 0 : batch();
    return (entry * p.num_heads + head) * p.row_blocks + padded_q_offset() / kRowBlock;
  }

 private:
  GPU_DEVICE int32_t read(uint32_t offset) const { return load_shared<int32_t>(address + offset); }
};

// To which sum of a tile of dq a block of keys adds, and when. `earlier` blocks come before it at this tile. If few
// tiles of queries meet many blocks of keys, these would wait for one another. So a tile has several sums then, and
// neighbouring blocks add to different ones. Each sum has a counter of the blocks that have added to it, and a block
// has its turn when the counter shows the block's own number. round_dq_kernel adds the sums.
struct DqTurn {
  int64_t sum;     // the index of the sum, over all tiles
  int32_t number;  // of the block among those that add to this sum

  GPU_DEVICE DqTurn(const Params& p, int64_t tile, int32_t earlier)
      : sum((tile << p.dq_sums_log2) + (earlier & ((1 << p.dq_sums_log2) - 1))), number(earlier >> p.dq_sums_log2) {}
};

// Returns the number of blocks of keys that add to tile m of dq before block b does. Blocks with higher numbers add
// first. So the order of the additions is fixed.
template <int kBlockM>
GPU_DEVICE int32_t turn_at(const Params& p, const SharedKeyBlock& b, int32_t m) {
  const int32_t key_blocks = (b.seqlen_k() + kKeyBlock - 1) / kKeyBlock;
  const Diagonals band(p, b.score_slice(b.head()));
  return key_rank(p, b.batch(), min(last_key_block<kBlockM>(band, m) + 1, key_blocks)) - b.rank_after();
}

// The current step of a role within a block of keys. The steps go over the query heads of the group, and for each head
// over the tiles of queries that meet the block. In a general kernel, steps without a visible entry are left out.
template <int kBlockM, bool kIsGeneral>
class Step;

template <int kBlockM>
class Step<kBlockM, false> {
 public:
  GPU_DEVICE Step(const Params&, const SharedKeyBlock& b) : head_(b.head()), tile_(b.begin()) {}
  GPU_DEVICE bool is_left(const Params& p, const SharedKeyBlock& b) const { return head_ < b.head() + p.group_size; }
  GPU_DEVICE void advance(const Params&, const SharedKeyBlock& b) {
    if (++tile_ < b.end()) return;
    tile_ = b.begin();
    ++head_;
  }
  GPU_DEVICE int32_t head() const { return head_; }
  GPU_DEVICE int32_t tile() const { return tile_; }
  GPU_DEVICE StepInfo info(const SharedKeyBlock& b) const {
    return {tile_ | (b.is_whole(tile_) ? 0 : kHasMask), head_};
  }
  // The number of blocks of keys that add to this tile of dq before block b.
  GPU_DEVICE int32_t earlier(const Params& p, const SharedKeyBlock& b) const { return turn_at<kBlockM>(p, b, tile_); }

 private:
  int32_t head_;
  int32_t tile_;
};

// How many tiles of queries a head of the longest sequence has.
template <int kBlockM>
GPU_DEVICE int32_t tiles_of_head(const Params& p) {
  return (p.seqlen_q + kBlockM - 1) / kBlockM;
}

// The list of steps of the block of keys, or of the split of one, that is taken as number `program`.
template <int kBlockM>
GPU_DEVICE StepInfo* mask_steps_of(const Params& p, int32_t program) {
  const int32_t tiles = (tiles_of_head<kBlockM>(p) + p.dk_splits - 1) / p.dk_splits;  // of a split, at most
  return p.mask_steps + int64_t{program} * p.group_size * tiles;
}

// The turns of all blocks of keys at a tile of queries.
template <int kBlockM>
GPU_DEVICE int32_t* mask_turns_of(const Params& p, int32_t batch, int32_t head, int32_t tile) {
  const int64_t tiles = tiles_of_head<kBlockM>(p);
  return p.mask_turns + ((int64_t{batch} * p.num_heads + head) * tiles + tile) * p.num_key_blocks;
}

template <int kBlockM>
class Step<kBlockM, true> {
 public:
  GPU_DEVICE Step(const Params& p, const SharedKeyBlock& b) : info_{b.begin(), b.head()} { look_up(p, b); }
  GPU_DEVICE bool is_left(const Params&, const SharedKeyBlock& b) const { return index_ < b.steps(); }
  GPU_DEVICE void advance(const Params& p, const SharedKeyBlock& b) {
    ++index_;
    info_.tile = tile() + 1;
    if (info_.tile == b.end()) {
      info_.tile = b.begin();
      ++info_.head;
    }
    look_up(p, b);
  }
  GPU_DEVICE int32_t head() const { return info_.head; }
  GPU_DEVICE int32_t tile() const { return info_.tile & kTileNumber; }
  GPU_DEVICE StepInfo info(const SharedKeyBlock&) const { return info_; }
  GPU_DEVICE int32_t earlier(const Params& p, const SharedKeyBlock& b) const {
    if (p.mask_turns == nullptr) return turn_at<kBlockM>(p, b, tile());
    return load_global(mask_turns_of<kBlockM>(p, b.batch(), head(), tile()) + b.number());
  }

 private:
  // Completes the step, which may lie past the last one. With a dense mask, reads it from the list.
  GPU_DEVICE void look_up(const Params& p, const SharedKeyBlock& b) {
    if (p.mask_steps != nullptr) {
      if (index_ < b.steps()) info_ = load_global(mask_steps_of<kBlockM>(p, b.program()) + index_);
    } else if (!b.is_whole(info_.tile)) {
      info_.tile |= kHasMask;
    }
  }

  StepInfo info_;
  int32_t index_ = 0;  // of this step among those of the block
};

}  // namespace fused_attn::gpu::sm90
