// The tile scheduler: which block of queries or keys, of which head, a program (a block of threads) works on.
#pragma once
#include "fragments.h"
#include "head_slice.h"

namespace fused_attn::gpu {

// What a program works on.
struct WorkTile {
  int32_t block;
  int32_t head;
  int32_t batch;
};

// Which block of rows of which head program number `program` works on, of num_blocks blocks of num_heads * batch heads.
// Programs are numbered so that the heads of an L2 group run side by side. Their keys and values then stay in the L2
// cache.
//
// Within an L2 group, the blocks that take longest start first, so that only short ones are left when the
// multiprocessors run out of work. Under a causal mask, these are the last blocks of queries (last_first), and the
// first blocks of keys.
GPU_DEVICE WorkTile scheduled_tile(int32_t program, int32_t num_blocks, int32_t num_heads, int32_t batch,
                                   int32_t heads_per_l2_group, bool last_first) {
  const int32_t total_heads = num_heads * batch;
  heads_per_l2_group = min(heads_per_l2_group, total_heads);  // otherwise the product below could exceed 2^31
  const int32_t l2_group = program / (heads_per_l2_group * num_blocks);
  const int32_t first_head = l2_group * heads_per_l2_group;
  const int32_t heads_here = min(heads_per_l2_group, total_heads - first_head);
  const int32_t within = program - first_head * num_blocks;
  int32_t block = within / heads_here;
  const int32_t head = first_head + within % heads_here;
  if (last_first) block = num_blocks - 1 - block;
  return {block, head % num_heads, head / num_heads};
}

// Which tile of queries program number `program` of the forward pass works on; tiles have kBlockM rows. Program n
// computes split n % count of the keys of tile n / count. The tiles of a packed call are listed once for all heads, as
// if the call had one batch entry.
template <int kBlockM>
GPU_DEVICE WorkTile query_tile(const Params& p, int32_t program) {
  program /= p.splits.count;
  if (p.query_tiles == nullptr)
    return scheduled_tile(program, (p.seqlen_q + kBlockM - 1) / kBlockM, p.num_heads, p.batch, p.heads_per_l2_group,
                          /*last_first=*/true);
  const WorkTile listed = scheduled_tile(program, load_global(p.num_query_tiles), p.num_heads, 1, p.heads_per_l2_group,
                                         /*last_first=*/true);
  const QueryTile tile = load_global(p.query_tiles + listed.block);
  return {tile.block, listed.head, tile.sequence};
}

// How many programs the forward pass has, of the `launched` ones that the host knows of.
GPU_DEVICE int32_t num_query_programs(const Params& p, int32_t launched) {
  if (p.query_tiles == nullptr) return launched;
  return min(launched, load_global(p.num_query_tiles) * p.num_heads * p.splits.count);
}

// Whether the offsets of packed sequences ascend within the rows of their tensor. All lanes of a warp call this.
GPU_DEVICE bool offsets_ascend(const int32_t* cu_seqlens, int32_t batch, int32_t rows, Lane lane) {
  if (cu_seqlens == nullptr) return true;
  bool is_wrong = false;
  for (int32_t sequence = lane.index; sequence < batch; sequence += 32) {
    const int32_t offset = load_global(cu_seqlens + sequence), end = load_global(cu_seqlens + sequence + 1);
    is_wrong |= offset < 0 || end < offset || end > rows;
  }
  return !warp_any(is_wrong);
}

// The sequence that has row block `row_block` of a packed tensor, if each sequence begins a row block of its own
// (HeadSlice::padded_q_offset); or, if there is none, another sequence. All lanes of a warp call this. Each lane looks
// at one of 32 sequences at a time, so that a thousand sequences take two loads that wait for each other.
GPU_DEVICE int32_t sequence_of_row_block(const int32_t* cu_seqlens, int32_t batch, int32_t rows, int32_t row_block,
                                         Lane lane) {
  int32_t begin = 0;
  for (int32_t end = batch; end - begin > 1;) {
    const int32_t step = (end - begin + 31) / 32, sequence = begin + lane.index * step;
    const bool begins_before = sequence < end && first_row_block_of(cu_seqlens, sequence, rows) <= row_block;
    begin += max(count_bits(warp_ballot(begins_before)) - 1, 0) * step;
    end = min(begin + step, end);
  }
  return begin;
}

// The rows of a tensor of a backward call, as the tiles of a kernel divide them.
struct TiledRows {
  const int32_t* cu_seqlens;  // null if the call is not packed
  int32_t rows;               // of a head of the tensor
  int32_t longest;            // how many rows of the longest sequence have tiles
  int32_t num_heads;
  bool is_by_offset;  // Params::finds_queries_by_offset, or finds_keys_by_offset
};

// Which tile of kRows rows program number `program` works on. The tile may lie behind the end of its sequence. By
// offset, a kernel has a program for each tile of each head of the rows of all sequences. A tile that belongs to no
// sequence becomes one behind the end of the longest then. All lanes of a warp call this.
template <int kRows>
GPU_DEVICE WorkTile gradient_tile(const Params& p, const TiledRows& x, int32_t program, bool last_first) {
  static_assert(kRowBlock % kRows == 0);
  constexpr int32_t kTiles = kRowBlock / kRows;  // of a row block
  const int32_t most = (x.longest + kRows - 1) / kRows, of_all = (x.rows / kRowBlock + p.batch) * kTiles;
  WorkTile work = scheduled_tile(program, x.is_by_offset ? of_all : most, x.num_heads, x.is_by_offset ? 1 : p.batch,
                                 p.heads_per_l2_group, last_first);
  if (x.is_by_offset) {
    work.batch = sequence_of_row_block(x.cu_seqlens, p.batch, x.rows, work.block / kTiles, this_lane());
    work.block -= first_row_block_of(x.cu_seqlens, work.batch, x.rows) * kTiles;
    if (work.block < 0) work.block = most;
  }
  return work;
}

// The same for queries. rows: how many rows of the longest sequence have tiles
template <int kRows>
GPU_DEVICE WorkTile query_gradient_tile(const Params& p, int32_t program, int32_t rows) {
  const TiledRows queries{p.cu_seqlens_q, p.rows_q, rows, p.num_heads, p.finds_queries_by_offset};
  return gradient_tile<kRows>(p, queries, program, /*last_first=*/true);
}

// The same for keys. WorkTile::head is a key head. kByOffset: whether the kernel has registers for finds_keys_by_offset
template <int kRows, bool kByOffset = true>
GPU_DEVICE WorkTile key_gradient_tile(const Params& p, int32_t program) {
  const TiledRows keys{p.cu_seqlens_k, p.rows_k, p.seqlen_k, p.num_heads / p.group_size,
                       kByOffset && p.finds_keys_by_offset};
  return gradient_tile<kRows>(p, keys, program, /*last_first=*/false);
}

// The number of the program that works on this tile: the inverse of scheduled_tile.
GPU_DEVICE int32_t program_of(const WorkTile& work, int32_t num_blocks, int32_t num_heads, int32_t batch,
                              int32_t heads_per_l2_group, bool last_first) {
  const int32_t total_heads = num_heads * batch, head = work.batch * num_heads + work.head;
  heads_per_l2_group = min(heads_per_l2_group, total_heads);
  const int32_t first_head = head / heads_per_l2_group * heads_per_l2_group;
  const int32_t heads_here = min(heads_per_l2_group, total_heads - first_head);
  const int32_t block = last_first ? num_blocks - 1 - work.block : work.block;
  return first_head * num_blocks + block * heads_here + head - first_head;
}

}  // namespace fused_attn::gpu
