// The kernel that lists the steps and turns of the fused backward (fused_backward.h) if there is a dense mask.
#pragma once
#include <cstddef>

#include "../mask_bits.h"
#include "../preparation.h"
#include "key_blocks.h"

namespace fused_attn::gpu::sm90 {

// Lists the steps of block `program` of the list of blocks of keys, and writes their number into its KeyBlock. One warp
// calls this. It reads the map of the mask for 32 tiles of queries at a time.
template <int kBlockM>
GPU_DEVICE void list_mask_steps(const Params& p, int32_t program) {
  const int32_t lane = this_lane().index;
  Vec4* const listed = reinterpret_cast<Vec4*>(p.key_blocks + program);
  Vec4 words[kKeyBlockBytes / 16];
  GPU_UNROLL for (uint32_t w = 0; w < kKeyBlockBytes / 16; ++w) words[w] = load_global(listed + w);
  KeyBlock b;
  __builtin_memcpy(&b, words, kKeyBlockBytes);
  if (b.steps == 0) return;
  HeadSlice head_slice{};
  head_slice.batch = b.batch;
  StepInfo* const steps = mask_steps_of<kBlockM>(p, program);
  int32_t count = 0;
  for (head_slice.head = b.head; head_slice.head < b.head + p.group_size; ++head_slice.head) {
    for (int32_t first = b.begin; first < b.end; first += 32) {
      const int32_t tile = first + lane;
      MaskContents contents{0};
      if (tile < b.end)
        contents = mask_contents<kBlockM, kKeyBlock>(p.mask, head_slice, tile * kBlockM, b.number * kKeyBlock);
      const uint32_t visited = warp_ballot(contents.has_visible());
      const bool has_mask = contents.has_hidden() || tile < b.full_begin || tile >= b.full_end;
      if (contents.has_visible())
        store_global(steps + count + count_bits(visited & low_bits(lane)),
                     StepInfo{tile | (has_mask ? kHasMask : 0), head_slice.head});
      count += count_bits(visited);
    }
  }
  sync_warp();  // all lanes have read the KeyBlock
  if (lane == 0) store_global(reinterpret_cast<int32_t*>(listed) + offsetof(KeyBlock, steps) / sizeof(int32_t), count);
}

// Writes the turns of all blocks of keys at tile `tile` of queries: for each block that visits the tile, how many later
// blocks do so, too. One warp calls this. A block visits the tile exactly if list_mask_steps lists the tile.
template <int kBlockM>
GPU_DEVICE void list_mask_turns(const Params& p, int32_t batch, int32_t head, int32_t tile) {
  const HeadSlice head_slice = head_slice_of(p, batch, head, head / p.group_size);
  const int32_t lane = this_lane().index;
  int32_t* const turns = mask_turns_of<kBlockM>(p, batch, head, tile);
  int32_t later = 0;
  const Diagonals band(p, head_slice);
  const int32_t key_blocks = (head_slice.seqlen_k + kKeyBlock - 1) / kKeyBlock;
  for (int32_t last = key_blocks - 1; last >= 0; last -= 32) {
    const int32_t n = last - lane;
    const bool is_visited =
        n >= 0 && tile >= first_tile<kBlockM>(band, n) && tile <= last_tile<kBlockM>(band, n) &&
        key_rank(p, batch, n + 1) != key_rank(p, batch, n) &&
        mask_contents<kBlockM, kKeyBlock>(p.mask, head_slice, tile * kBlockM, n * kKeyBlock).has_visible();
    const uint32_t visited = warp_ballot(is_visited);
    if (is_visited) store_global(turns + n, later + count_bits(visited & low_bits(lane)));
    later += count_bits(visited);
  }
}

// Runs before the fused backward if there is a dense mask: fills Params::mask_steps and Params::mask_turns. The first
// warps list the steps of a block of keys each, and the other ones the turns at a tile of queries. There are no turns
// without dq_sums.
template <int kBlockM>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 1)
    list_mask_steps_kernel(const GPU_GRID_CONSTANT Params p, int num_programs) {
  const int64_t warp = int64_t{block_index_x()} * (kPreparationThreads / 32) + thread_index() / 32;
  if (warp < num_programs) return list_mask_steps<kBlockM>(p, static_cast<int32_t>(warp));
  const int64_t number = warp - num_programs, tiles = tiles_of_head<kBlockM>(p), head = number / tiles;
  if (p.mask_turns == nullptr || head >= int64_t{p.batch} * p.num_heads) return;
  list_mask_turns<kBlockM>(p, static_cast<int32_t>(head / p.num_heads), static_cast<int32_t>(head % p.num_heads),
                           static_cast<int32_t>(number % tiles));
}

}  // namespace fused_attn::gpu::sm90
