// The gradient of a bias, for Hopper, with TMA and wgmma. ../bias_gradient/score_tiles.h says what a program sums.
//
// The speed is bound by the L2 cache: each tile of scores needs four tiles of inputs, and the next tile of scores shares
// none of them. So tiles are as large as the registers allow, and the loading thread runs ahead of the consumers, through
// a ring of slots. A tile of scores takes two slots in turn: queries and keys for the scores, dout and values for dprobs.
#pragma once
#include "../bias_gradient/score_tiles.h"
#include "../dropout.h"
#include "../logits.h"
#include "../row_statistics.h"
#include "../tiles.h"
#include "backward.h"

namespace fused_attn::gpu::sm90 {

// Sizes of the kernel, and where each slot and note lies in shared memory (byte offsets).
template <int kHeadDim, int kValueDim>
struct BiasGradientPlan : BiasGradientTileSm90<kHeadDim> {
  using Sizes = BiasGradientTileSm90<kHeadDim>;
  static constexpr int kBlockM = Sizes::kBlockM, kBlockN = Sizes::kBlockN, kSlots = Sizes::kSlots;
  static_assert(kBlockM == 64 * kGradientConsumers);
  static constexpr int kTiles = kBlockN / 8;

  using QTile = Tile<kHeadDim, kBlockM>;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  using DoutTile = Tile<kValueDim, kBlockM>;
  using ValueTile = Tile<kValueDim, kBlockN>;
  static_assert(kValueDim <= kHeadDim);
  static constexpr uint32_t kSlotBytes = QTile::kBytes + KeyTile::kBytes;
  // The loading thread writes the note of tile i + kNotes when a slot is empty again that was filled 2 * kNotes slots
  // before the one it is about to fill, or later. This slot must be one of a tile after tile i, so that both consumers
  // have finished tile i.
  static constexpr int kNotes = 3;
  static_assert(2 * kNotes - kSlots >= 2);
  static constexpr uint32_t kNoteBytes = 64;  // from one note to the next
  static constexpr uint32_t kNotesAt = kSlots * kSlotBytes;
  static constexpr uint32_t kRing = kNotesAt + kNotes * kNoteBytes;
  static constexpr uint32_t kBytes = kRing + 128;
  static_assert(kBytes <= 227 * 1024);
  static_assert(SumsTile<kBlockM, kBlockN>::kBytes <= kNotesAt);
};

// A note in shared memory says which tile of scores comes next. The loading thread writes it before it loads queries and
// keys. The consumers read a field again whenever they need it, because they have no registers left to keep it.
template <int kBlockN>
struct ScoreTileNote {
  static constexpr uint32_t kIsTile = 1;     // otherwise no tile is left
  static constexpr uint32_t kHasMasked = 2;  // the dense mask hides some entry
  static constexpr uint32_t kIsWhole = 4;    // no entry needs a test
  uint32_t address;

  GPU_DEVICE void store(uint32_t bits, int32_t first_query, int32_t key_block, int32_t batch, int32_t head,
                        const ValidRows<kBlockN>& valid) const {
    store_shared(address, bits);
    store_shared(address + 4, first_query);
    store_shared(address + 8, key_block);
    store_shared(address + 12, batch);
    store_shared(address + 16, head);
    GPU_UNROLL for (int w = 0; w < valid.kWords; ++w) store_shared(address + 32 + 4 * w, valid.words[w]);
  }
  GPU_DEVICE void store_end() const { store_shared(address, 0u); }
  GPU_DEVICE bool has(uint32_t bit) const { return (load_shared<uint32_t>(address) & bit) != 0; }
  GPU_DEVICE int32_t first_query() const { return load_shared<int32_t>(address + 4); }
  GPU_DEVICE int32_t key_block() const { return load_shared<int32_t>(address + 8); }
  GPU_DEVICE HeadSlice head_slice(const Params& p) const {
    const int32_t head = load_shared<int32_t>(address + 16);
    return head_slice_of(p, load_shared<int32_t>(address + 12), head, head / p.group_size);
  }
  GPU_DEVICE ValidRows<kBlockN> valid() const {  // which keys of the block are valid
    ValidRows<kBlockN> valid;
    GPU_UNROLL for (int w = 0; w < valid.kWords; ++w) valid.words[w] = load_shared<uint32_t>(address + 32 + 4 * w);
    return valid;
  }
};

template <class Plan>
GPU_DEVICE ScoreTileNote<Plan::kBlockN> note_at(uint32_t shared, RingPosition<Plan::kNotes> position) {
  return {shared + Plan::kNotesAt + position.slot() * Plan::kNoteBytes};
}

// The role of the loading thread: finds the tiles of scores, and loads what each of them needs.
template <class Plan>
GPU_DEVICE void load_score_tiles(const ScoreTiles<Plan::kBlockM, Plan::kBlockN>& tiles, const BackwardMaps& maps,
                                 uint32_t shared, const Ring<Plan::kSlots>& ring) {
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  using DoutTile = typename Plan::DoutTile;
  using ValueTile = typename Plan::ValueTile;
  using Note = ScoreTileNote<Plan::kBlockN>;
  const Params& p = tiles.p;
  RingPosition<Plan::kSlots> position;
  RingPosition<Plan::kNotes> note_position;
  for (auto tile = tiles.find(tiles.begin); tile.number < tiles.end; tile = tiles.find(tile.number + 1)) {
    const HeadSlice& head_slice = tile.head_slice;
    const int row = head_slice.q_offset + tile.first_query;
    const int key = head_slice.k_offset + tile.key_block * Plan::kBlockN;
    // In a packed tensor, rows of another sequence follow the rows of this one. Otherwise TMA gives zeros.
    const bool has_all_rows = p.cu_seqlens_q == nullptr || tile.first_query + Plan::kBlockM <= head_slice.seqlen_q;
    position.wait_empty(ring);
    const uint32_t bits =
        Note::kIsTile + (tile.has_masked ? Note::kHasMasked : 0) + (tile.is_full && has_all_rows ? Note::kIsWhole : 0);
    note_at<Plan>(shared, note_position)
        .store(bits, tile.first_query, tile.key_block, head_slice.batch, head_slice.head, tile.valid);
    note_position.advance();
    uint32_t barrier = ring.full(position.slot()), slot = shared + position.slot() * Plan::kSlotBytes;
    mbarrier_arrive_expect(barrier, QTile::kBytes + KeyTile::kBytes);
    QTile::load(slot, maps.q, barrier, row, head_slice.head, head_slice.batch);
    KeyTile::load(slot + QTile::kBytes, maps.k, barrier, key, head_slice.kv_head, head_slice.batch);
    position.advance();

    position.wait_empty(ring);
    barrier = ring.full(position.slot());
    slot = shared + position.slot() * Plan::kSlotBytes;
    mbarrier_arrive_expect(barrier, DoutTile::kBytes + ValueTile::kBytes);
    DoutTile::load(slot, maps.dout, barrier, row, head_slice.head, head_slice.batch);
    ValueTile::load(slot + DoutTile::kBytes, maps.v, barrier, key, head_slice.kv_head, head_slice.batch);
    position.advance();
  }
  position.wait_empty(ring);
  note_at<Plan>(shared, note_position).store_end();
  mbarrier_arrive(ring.full(position.slot()));
}

// Sets x to 0 where the prob is 0.
template <int kTiles>
GPU_DEVICE void clear_where_zero(float (&x)[kTiles][4], const float (&probs)[kTiles][4]) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) x[t][j] = probs[t][j] == 0.0f ? 0.0f : x[t][j];
  }
}

// The role of a consumer warpgroup: adds the gradients of the logits of all tiles to `sums`. The warpgroup has 64 of the
// queries of each tile. All 128 threads call this.
template <class T, int kHeadDim, int kValueDim, class Plan>
GPU_DEVICE void sum_score_tiles(const Params& p, uint32_t shared, const Ring<Plan::kSlots>& ring, int group,
                                float (&sums)[Plan::kTiles][4]) {
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;
  using Note = ScoreTileNote<kBlockN>;
  const Lane lane = this_lane();
  const int thread_row = 64 * group + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  RingPosition<Plan::kSlots> position;
  RingPosition<Plan::kNotes> note_position;
  while (true) {
    position.wait_full(ring);
    const Note note = note_at<Plan>(shared, note_position);
    note_position.advance();
    if (!note.has(Note::kIsTile)) return;
    const HeadSlice head_slice = note.head_slice(p);
    const int query = note.first_query() + thread_row, first_key = note.key_block() * kBlockN;
    float scores[kTiles][4], dprobs[kTiles][4];
    uint32_t slot = shared + position.slot() * Plan::kSlotBytes;
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockM>(scores, slot, 64 * group, slot + Plan::QTile::kBytes);
    wgmma_commit();
    const RingPosition<Plan::kSlots> scores_position = position;
    position.advance();
    position.wait_full(ring);
    slot = shared + position.slot() * Plan::kSlotBytes;
    wgmma_fence();
    start_multiply_transposed<T, kValueDim, kBlockM>(dprobs, slot, 64 * group, slot + Plan::DoutTile::kBytes);
    wgmma_commit();
    const RowStatistics statistics[2] = {row_statistics(p, head_slice, query),
                                         row_statistics(p, head_slice, query + 8)};
    DropoutKeep<kTiles> dropout_keep{};
    if (p.dropout_seed != nullptr)
      dropout_keep = dropout_keep_of_query_rows<kTiles>(Dropout(p, head_slice), query, first_key, lane);

    wgmma_wait<1>();
    keep_registers(flat(scores));
    scores_position.release(ring);
    to_logits<T>(p, head_slice, scores, QueryRows{query, first_key + 2 * lane.q}, NoGradients{});
    if (!note.has(Note::kIsWhole)) {
      VisibleColumns<kBlockN> visible = visible_keys(p, note.valid(), note.key_block(), query);
      if (note.has(Note::kHasMasked)) hide_masked_keys(p, head_slice, visible, query, first_key);
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        GPU_UNROLL for (int w = 0; w < kBlockN / 32; ++w) {
          if (query + 8 * r >= head_slice.seqlen_q) visible.words[r][w] = 0;
        }
      }
      hide(scores, visible, lane);
    }
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] =
          prob_of(scores[t][j], p.softmax_scale_log2, statistics[j / 2].lse_log2);
    }

    wgmma_wait<0>();
    keep_registers(flat(dprobs));
    position.release(ring);
    position.advance();
    if (p.dropout_seed != nullptr) drop(dprobs, dropout_keep, p.dropout_scale);
    // Values that are not valid, and rows of another sequence, may hold NaN, and NaN times a prob of 0 is NaN.
    if (!note.has(Note::kIsWhole)) clear_where_zero(dprobs, scores);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) sums[t][j] += scores[t][j] * (dprobs[t][j] - statistics[j / 2].delta);
    }
  }
}

// Sums the gradients of logits over the tiles of one owner and split. One program is one block of threads: a loading
// thread, and two consumer warpgroups.
template <class T, int kHeadDim, int kValueDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kGradientThreads, 1)
    bias_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BiasGradientParams g,
                         const GPU_GRID_CONSTANT BackwardMaps maps) {
  using Plan = BiasGradientPlan<kHeadDim, kValueDim>;
  const ScoreTiles<Plan::kBlockM, Plan::kBlockN> tiles(p, g, block_index_x());
  const uint32_t shared = shared_address(shared_memory());
  const Ring<Plan::kSlots> ring{shared + Plan::kRing};
  if (thread_index() == 0) {
    ring.init(kGradientConsumerWarps);
    fence_mbarrier_init();
  }
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<kGradientProducerRegisters>();
    if (thread_index() == 0) load_score_tiles<Plan>(tiles, maps, shared, ring);
    return;
  }
  increase_registers<kGradientConsumerRegisters>();
  constexpr int kConsumerThreads = kGradientConsumers * kWarpgroup;
  const int group = warpgroup - 1;
  float sums[Plan::kTiles][4];
  fill(sums, 0.0f);
  sum_score_tiles<T, kHeadDim, kValueDim, Plan>(p, shared, ring, group, sums);

  // Epilogue. The slots are not needed any more when both consumers have come to the end, so the sums are written over
  // them.
  barrier_sync<1>(kConsumerThreads);
  const SumsTile<Plan::kBlockM, Plan::kBlockN> sums_tile{shared};
  sums_tile.store(sums, 64 * group + thread_index() % kWarpgroup / 32 * 16, this_lane());
  barrier_sync<1>(kConsumerThreads);
  store_gradient<kConsumerThreads>(tiles, sums_tile, thread_index() - kWarpgroup);
}

}  // namespace fused_attn::gpu::sm90
