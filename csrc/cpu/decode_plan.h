// How the kernel for few queries divides its work among threads, and what it stores of each part.
#pragma once
#include "decode_block.h"

namespace fused_attn::cpu {
namespace {

// The rows of a group from which on tiles multiply. With two rows, vectors took 0.8 of the time of tiles over 64k keys,
// and as long over 256. With three, tiles took 0.95 and 0.75 of the time of vectors.
constexpr int64_t kLeastTileRows = 3;

// The keys of a part of a block where tiles multiply: those whose scores are in tile registers at a time.
constexpr int kTilePartKeys = 64;

// A work item: one split of the keys of a batch entry, for some neighbouring groups of query heads.
struct DecodeItem {
  int64_t b;            // the batch entry
  int64_t split;        // which split of its keys
  int64_t first_group;  // the first group of the item, counted within the batch entry
  int64_t groups;       // the number of groups of the item
};

// How the heads and keys of a call are divided into work items.
struct DecodePlan {
  int64_t heads;        // query heads of a group: those of one kv head, or 1 if each head has its own mask
  int64_t groups;       // the number of groups of a batch entry
  int64_t item_groups;  // the number of groups of a work item; the last item of a batch entry may have fewer
  int64_t turn_groups;  // the number of groups of a turn; the last turn of an item may have fewer
  int part_keys;        // the keys that a turn reads of one group before the next group
  int64_t splits;       // the number of splits into which the keys of a head are divided
  bool has_whole_rows;  // the rows of all heads of a token follow one another in memory
  bool exceeds_cache;   // the keys and values of the call come from so far away that rows are prefetched
  int64_t value_row;    // lanes of a row of DecodePartials::acc: value_dim, padded to whole vectors

  // The number of items of a batch entry that have the same split.
  int64_t items_of_split() const { return (groups + item_groups - 1) / item_groups; }

  // The number of items of the whole call.
  int64_t items(const AttentionParams& p) const { return p.batch * items_of_split() * splits; }

  // Item number `index`. Neighbouring items, which one thread computes, read neighbouring memory: other heads of the
  // same keys if the rows of all heads follow one another, and otherwise other keys of the same heads. A thread that
  // reads half of each row can fill half of the sets of its caches only: one query over 2048 keys of 2 heads in pages
  // (2 threads of a Xeon, keys and values of 4 MiB) took 1.5 of the time.
  DecodeItem item(int64_t index) const {
    const int64_t parts = items_of_split();
    const int64_t b = index / (parts * splits), rest = index % (parts * splits);
    const int64_t split = has_whole_rows ? rest / parts : rest % splits;
    const int64_t first_group = (has_whole_rows ? rest % parts : rest / splits) * item_groups;
    const int64_t left = groups - first_group;
    return {b, split, first_group, left < item_groups ? left : item_groups};
  }

  // The number of query i of head h among the rows of all splits and batch entries. The rows of the heads of a sequence
  // follow one another.
  int64_t row(const AttentionParams& p, const Sequence& seq, int64_t split, int64_t b, int64_t h, int64_t i) const {
    return (split * p.batch + b) * p.num_heads * p.seqlen_q + h * seq.seqlen_q + i;
  }

  // The number of keys of a split of a sequence, in whole blocks. The last splits may have fewer keys, or none. The
  // number depends on no other sequence of the batch, so that with num_splits the results of a sequence do not either.
  int64_t keys_per_split(const Sequence& seq) const { return round_up((seq.seqlen_k + splits - 1) / splits, kBlockK); }

  // The number of splits of a sequence that have keys; 1 without any keys. The other splits have no partial results.
  // With 16 valid keys in a cache of 4096, 32 heads take 0.5 (bfloat16, AMX) and 0.6 (float32) of the time that they
  // take if each split writes its results, and all are merged.
  int64_t splits_of(const Sequence& seq) const {
    if (seq.seqlen_k == 0) return 1;
    const int64_t keys = keys_per_split(seq);
    return (seq.seqlen_k + keys - 1) / keys;
  }
};

// The number of groups of a work item. An item reads a block of keys for all of its groups before the next block. So
// pages, and rows of all heads that follow one another in memory, are read as a whole. Hence items are as large as the
// number of threads allows. The results do not depend on this number.
inline int64_t groups_of_item(const AttentionParams& p, const DecodePlan& plan) {
  // If all keys of a head follow one another, memory is read faster head by head. In turns, one query over 64k keys of
  // 32 heads took 1.1 of the time (bfloat16, Xeon with AVX-512), and as long with 8 heads.
  if (plan.exceeds_cache && p.page_size == 0 && p.key.stride_row < p.key.stride_head) return 1;
  // So many items that threads finish at about the same time, although sequences have different lengths.
  constexpr int64_t kItemsPerThread = 4;
  const int64_t splits = p.batch * plan.splits;
  const int64_t parts = p.num_threads > 1 ? (kItemsPerThread * p.num_threads + splits - 1) / splits : 1;
  return parts < plan.groups ? (plan.groups + parts - 1) / parts : 1;
}

// The number of groups of a turn. If the rows of all heads of a token follow one another in memory, the rows of one
// head are far apart. Several queries read values in tiles that are narrower than a row, so they would return to each
// of these rows. Hence some heads take turns: kPartKeys or kTilePartKeys keys of each, as many heads as have kTurnBytes
// in the row of a token. So the keys of a part take 64 or 128 KiB at most, and those of a block stay in the
// second-level cache with the values.
//
// Four query heads per kv head over 32k keys, pages of 64 rows, head dim 128, one thread of a Xeon with AVX-512, took
// this share of the time with keys head by head, by vectors: bfloat16 1.03 with 16 kv heads (1.57 without turns), 1.07
// with 32 (1.57); float32 1.09 with 8 (1.10). One query of a kv head took 1.01 to 1.2 of its time in turns (float32).
template <class Storage>
int64_t groups_of_turn(const AttentionParams& p, const DecodePlan& plan) {
  constexpr int64_t kTurnBytes = 2048;
  if (plan.heads * p.seqlen_q == 1 || !plan.has_whole_rows) return 1;
  const int64_t groups = kTurnBytes / (p.head_dim * static_cast<int64_t>(sizeof(Storage)));
  const int64_t most = groups < plan.item_groups ? groups : plan.item_groups;
  return most > 1 ? most : 1;
}

// Chooses the number of groups and splits for one call.
template <class Policy>
DecodePlan plan_decode(const AttentionParams& p) {
  // Many items keep many threads busy. But each item takes time to start, which is small only beside this many keys.
  constexpr int64_t kLeastKeys = 512;
  DecodePlan plan;
  const bool own_masks = has_score_mask_of_heads(p);
  plan.heads = own_masks ? 1 : group_size_of(p);
  plan.groups = p.num_heads / plan.heads;
  constexpr int64_t kItems = 64;
  const int64_t wanted = (kItems + p.batch * plan.groups - 1) / (p.batch * plan.groups);
  const int64_t possible = p.seqlen_k / kLeastKeys;
  plan.splits = wanted < possible ? wanted : possible;
  if (p.num_splits > 0) plan.splits = p.num_splits;
  if (plan.splits < 1) plan.splits = 1;
  const int64_t stride_token = p.page_size == 1 ? p.key.stride_batch : p.key.stride_row;
  plan.has_whole_rows = p.key.stride_head < stride_token;
  // The third-level cache delivers the rows of one query in time without prefetches: at 2 to 8 MiB, calls took 0.9 to
  // 1.0 of the time. With four queries of a kv head, calls of 4 and 8 MiB took 1.05 and 1.1 of the time.
  const int64_t cached_bytes = plan.heads * p.seqlen_q == 1 ? 8 * kCachedBytes : kCachedBytes;
  plan.exceeds_cache = key_value_bytes<typename Policy::Storage>(p) > cached_bytes;
  plan.item_groups = own_masks ? 1 : groups_of_item(p, plan);
  plan.turn_groups = groups_of_turn<typename Policy::Storage>(p, plan);
  const bool has_tiles = Policy::kUsesAmx && plan.heads * p.seqlen_q >= kLeastTileRows;
  plan.part_keys = plan.turn_groups == 1 ? kBlockK : has_tiles ? kTilePartKeys : kPartKeys;
  plan.value_row = round_up(p.value_dim, kLanes<typename Policy::Lane>);
  return plan;
}

// The softmax of each row over the keys of one split, before the division by the sum of exponentials. merge_splits
// merges the splits of a row. With several splits, the arrays hold all rows, because a second pass merges them. With
// one split, each thread has arrays for the rows of one item, which stay in the cache: 64 heads of 4 x 4 scores of head
// dim 64 take 0.82 of the time.
template <class Lane>
struct DecodePartials {
  Lane* acc;              // [row][value_row]: the sum of exp(logit - row_max) * value
  Lane* row_max;          // the largest logit of the row in the split
  Lane* row_sum;          // the sum of exp(logit - row_max); 0 if the row sees no key of the split
  int64_t first_row = 0;  // the row (DecodePlan::row) with which the arrays begin

  // Takes the memory of the three arrays, for `rows` rows, out of the arena.
  void layout(Arena& arena, const DecodePlan& plan, int64_t rows) {
    acc = arena.take<Lane>(rows * plan.value_row);
    row_max = arena.take<Lane>(rows);
    row_sum = arena.take<Lane>(rows);
  }
};

}  // namespace
}  // namespace fused_attn::cpu
