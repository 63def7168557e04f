// The gradient of a bias, for Hopper, with TMA and wgmma. ../bias_gradient/score_tiles.h says what a program sums.
//
// Each tile of scores needs four tiles of inputs, and usually shares none of them with the tile before. So the L2 cache
// is expected to be the limit. Tiles are as large as the registers allow, and the loading thread runs ahead of the
// consumers, through a ring of slots. A tile of scores takes two slots one after the other: queries and keys for the
// scores, dout and values for dprobs.
//
// A program may have a single tile of scores. So where programs need no shared memory for their sums, the blocks of
// threads are persistent: the loading thread goes on to the next program while the consumers store the sums of this
// one.
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
  // Tile i takes the slots number 2 * i and 2 * i + 1, counted without end. Its note is overwritten by that of tile i +
  // kNotes, as soon as the consumers have released slot number 2 * (i + kNotes) - kSlots. A consumer reads the note
  // until it waits for slot 2 * i + 2, so this must be that slot or a later one.
  static constexpr int kNotes = kSlots == 3 ? 3 : 4;
  static_assert(2 * kNotes - kSlots >= 2);
  static constexpr uint32_t kNoteBytes = 64;  // from one note to the next
  static constexpr uint32_t kNotesAt = kSlots * kSlotBytes;
  static constexpr uint32_t kRings = kNotesAt + kNotes * kNoteBytes;
  static constexpr uint32_t kBytesWithoutBias = kRings + 128;
  // A tile of the bias for each consumer comes last, so that a call without it leaves the memory to the L1 cache.
  using BiasTile = sm90::BiasTile<kBlockN, 64>;
  static constexpr uint32_t kBias = (kBytesWithoutBias + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr uint32_t kBytes = kBias + kGradientConsumers * BiasTile::kBytes;
  static_assert(kBytes <= 227 * 1024);
  static_assert(SumsTile<kBlockM, kBlockN>::kBytes <= kNotesAt);
};

// A note in shared memory says which tile of scores comes next. The loading thread writes it before it loads queries
// and keys. The consumers read a field again whenever they need it, because they have no registers left to keep it.
template <int kBlockN>
struct ScoreTileNote {
  static constexpr uint32_t kIsTile = 1;       // otherwise the program has no tile with a visible entry
  static constexpr uint32_t kHasMasked = 2;    // the dense mask hides some entry
  static constexpr uint32_t kIsFull = 4;       // no entry needs a test
  static constexpr uint32_t kEndsProgram = 8;  // the last note of a program
  static constexpr uint32_t kEnd = 16;         // no program is left
  static constexpr uint32_t kBiasParity = 32;  // the parity of the phase in which the bias comes
  uint32_t address;

  GPU_DEVICE void store(uint32_t bits, int32_t program, int32_t first_query, int32_t key_block,
                        const HeadSlice& head_slice, const ValidRows<kBlockN>& valid) const {
    store_shared(address, bits);
    store_shared(address + 4, first_query);
    store_shared(address + 8, key_block);
    store_shared(address + 12, head_slice.batch);
    store_shared(address + 16, head_slice.head);
    store_shared(address + 20, head_slice.seqlen_q);
    store_shared(address + 24, head_slice.seqlen_k);
    store_shared(address + 28, head_slice.padded_q_offset);
    store_shared(address + 32, program);
    GPU_UNROLL for (int w = 0; w < valid.kWords; ++w) store_shared(address + 36 + 4 * w, valid.words[w]);
  }
  GPU_DEVICE void store_end() const { store_shared(address, kEnd); }
  GPU_DEVICE bool has(uint32_t bit) const { return (load_shared<uint32_t>(address) & bit) != 0; }
  GPU_DEVICE int32_t first_query() const { return load_shared<int32_t>(address + 4); }
  GPU_DEVICE int32_t key_block() const { return load_shared<int32_t>(address + 8); }
  // The head slice, without what tells where rows of keys and queries lie in tensors.
  GPU_DEVICE HeadSlice head_slice() const {
    HeadSlice head_slice{};
    head_slice.batch = load_shared<int32_t>(address + 12);
    head_slice.head = load_shared<int32_t>(address + 16);
    head_slice.seqlen_q = load_shared<int32_t>(address + 20);
    head_slice.seqlen_k = load_shared<int32_t>(address + 24);
    head_slice.padded_q_offset = load_shared<int32_t>(address + 28);
    return head_slice;
  }
  GPU_DEVICE int32_t program() const { return load_shared<int32_t>(address + 32); }
  GPU_DEVICE ValidRows<kBlockN> valid() const {  // which keys of the block are valid
    ValidRows<kBlockN> valid;
    GPU_UNROLL for (int w = 0; w < valid.kWords; ++w) valid.words[w] = load_shared<uint32_t>(address + 36 + 4 * w);
    return valid;
  }
};

// The ring of slots, and that of the tiles of the bias, with one slot. All roles of the kernel use them.
template <class Plan>
struct BiasGradientRings {
  uint32_t shared;
  Ring<Plan::kSlots> slots;
  Ring<1> bias;

  GPU_DEVICE explicit BiasGradientRings(uint32_t shared) : shared(shared) {
    lay_out_rings<Plan::kBytesWithoutBias - Plan::kRings, 0>(shared + Plan::kRings, slots, bias);
  }
  GPU_DEVICE void init() const {
    init_rings(kGradientConsumerWarps, slots, bias);
    fence_mbarrier_init();
  }
  GPU_DEVICE uint32_t slot(RingPosition<Plan::kSlots> position) const {
    return shared + position.slot() * Plan::kSlotBytes;
  }
  // The note of the tile whose first slot is at this position. With three slots, a position counts modulo 6, and so the
  // tiles modulo 3. Otherwise it counts modulo 2^32.
  GPU_DEVICE ScoreTileNote<Plan::kBlockN> note(RingPosition<Plan::kSlots> position) const {
    const uint32_t tile = position.uses / 2;
    return {shared + Plan::kNotesAt + (Plan::kSlots == 3 ? tile : tile % Plan::kNotes) * Plan::kNoteBytes};
  }
  GPU_DEVICE uint32_t bias_tile(int consumer) const { return shared + Plan::kBias + consumer * Plan::BiasTile::kBytes; }
};

// The role of the loading thread: finds the tiles of scores of each program, and loads what they need.
template <class Plan>
GPU_DEVICE void load_score_tiles(const Params& p, const BiasGradientParams& g, const BackwardMaps& maps,
                                 const BiasGradientRings<Plan>& rings) {
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  using DoutTile = typename Plan::DoutTile;
  using ValueTile = typename Plan::ValueTile;
  using Note = ScoreTileNote<Plan::kBlockN>;
  RingPosition<Plan::kSlots> position;
  // Of the last tile of the bias: bit 0 is its parity, and bit 1 says that it has not been loaded yet.
  uint32_t bias_state = 1;
  // Starts to load two tiles into the next slot, which is empty: rows of queries, and keys.
  const auto load_pair = [&](auto left, const Map& left_map, auto right, const Map& right_map,
                             const HeadSlice& head_slice, int first_query, int first_key) {
    using Left = decltype(left);
    using Right = decltype(right);
    const uint32_t barrier = rings.slots.full(position.slot()), slot = rings.slot(position);
    mbarrier_arrive_expect(barrier, Left::kBytes + Right::kBytes);
    Left::load(slot, left_map, barrier, head_slice.q_offset + first_query, head_slice.head, head_slice.batch);
    Right::load(slot + Left::kBytes, right_map, barrier, head_slice.k_offset + first_key, head_slice.kv_head,
                head_slice.batch);
    position.advance();
  };
  const auto load_bias = [&](const auto& tile) {
    mbarrier_wait(rings.bias.empty(0), (bias_state & 1) ^ 1);
    const uint32_t barrier = rings.bias.full(0);
    mbarrier_arrive_expect(barrier, kGradientConsumers * Plan::BiasTile::loaded_bytes(maps.bias));
    for (int consumer = 0; consumer < kGradientConsumers; ++consumer) {
      Plan::BiasTile::load(rings.bias_tile(consumer), maps.bias, barrier, tile.first_query + 64 * consumer,
                           tile.key_block * Plan::kBlockN, tile.head_slice.head, tile.head_slice.batch);
    }
  };
  const int32_t num_programs = g.owners * g.splits;
  for (int32_t program = block_index_x(); program < num_programs;) {
    const ScoreTiles<Plan::kBlockM, Plan::kBlockN> tiles(p, g, program);
    int32_t number = tiles.find(tiles.begin).number;
    if (number < tiles.end && maps.bias.is_used) bias_state = (bias_state ^ 1) | 2;
    do {
      const bool is_tile = number < tiles.end;
      // Not the whole next tile, because this thread has no registers for two.
      const int32_t next_number = is_tile ? tiles.find(number + 1).number : tiles.end;
      const auto tile = tiles.find(number);
      position.wait_empty(rings.slots);
      const uint32_t bits = (is_tile ? Note::kIsTile : 0) + (tile.has_masked ? Note::kHasMasked : 0) +
                            (tile.is_full ? Note::kIsFull : 0) + (next_number == tiles.end ? Note::kEndsProgram : 0) +
                            (bias_state & 1 ? Note::kBiasParity : 0);
      rings.note(position).store(bits, program, tile.first_query, tile.key_block, tile.head_slice, tile.valid);
      if (is_tile) {
        const int first_key = tile.key_block * Plan::kBlockN;
        load_pair(QTile{}, maps.q, KeyTile{}, maps.k, tile.head_slice, tile.first_query, first_key);
        if (bias_state & 2) load_bias(tile);  // waits for the logits of the program before, so it must not come first
        bias_state &= 1;
        position.wait_empty(rings.slots);
        load_pair(DoutTile{}, maps.dout, ValueTile{}, maps.v, tile.head_slice, tile.first_query, first_key);
      } else {  // a note alone takes two slots, too
        mbarrier_arrive(rings.slots.full(position.slot()));
        position.advance();
        position.wait_empty(rings.slots);
        mbarrier_arrive(rings.slots.full(position.slot()));
        position.advance();
      }
      number = next_number;
    } while (number < tiles.end);
    program = g.program_counter == nullptr ? num_programs : grid_size_x() + atomic_fetch_add(g.program_counter, 1);
  }
  position.wait_empty(rings.slots);
  rings.note(position).store_end();
  mbarrier_arrive(rings.slots.full(position.slot()));
}

// Sets x to 0 where the prob is 0.
template <int kTiles>
GPU_DEVICE void clear_where_zero(float (&x)[kTiles][4], const float (&probs)[kTiles][4]) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) x[t][j] = probs[t][j] == 0.0f ? 0.0f : x[t][j];
  }
}

// The tile of the bias of this consumer, as to_logits takes it. `thread_row` is the thread's first row of the tile of
// scores, and a tile of the bias has the rows of one consumer.
template <class T, class Plan>
struct ProgramBias {
  const BiasMap& bias;
  uint32_t loaded;  // a barrier
  uint32_t parity;
  uint32_t tile;
  int thread_row;
  Lane lane;

  GPU_DEVICE bool is_used() const { return bias.is_used; }
  GPU_DEVICE void add(float (&scores)[Plan::kTiles][4], float factor) const {
    mbarrier_wait(loaded, parity);
    // Without keep_computed, the compiler would compute addresses in the tile before the loop over tiles of scores, and
    // keep them in registers.
    const int warp_row = keep_computed(thread_row) % 64 / 16 * 16;
    Plan::BiasTile::template add<T>(scores, factor, tile, bias, warp_row, lane_of(keep_computed(lane.index)));
  }
};

// The role of a consumer warpgroup: adds up the gradients of the logits of all tiles of a program. The warpgroup has 64
// of the queries of each tile. If each score has an entry of the gradient of its own, the warpgroup stores the sums of
// each program. Otherwise there is one program, whose sums are left in `sums`. All 128 threads call this.
template <class T, int kHeadDim, int kValueDim, class Plan>
GPU_DEVICE void sum_score_tiles(const Params& p, const BiasGradientParams& g, const BiasMap& bias,
                                const BiasGradientRings<Plan>& rings, int group, float (&sums)[Plan::kTiles][4]) {
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;
  using Note = ScoreTileNote<kBlockN>;
  const Lane lane = this_lane();
  const int warp_row = thread_index() % kWarpgroup / 32 * 16, thread_row = 64 * group + warp_row + lane.g;
  RingPosition<Plan::kSlots> position;
  const auto add_tile = [&](const Note& note) {
    const HeadSlice head_slice = note.head_slice();
    const int query = note.first_query() + thread_row, first_key = note.key_block() * kBlockN;
    float scores[kTiles][4], dprobs[kTiles][4];
    // All lanes have the same position. shuffle tells the compiler, which would otherwise move each descriptor of the
    // products to uniform registers by itself.
    position.uses = shuffle(position.uses, 0);
    uint32_t slot = rings.slot(position);
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockM>(scores, slot, 64 * group, slot + Plan::QTile::kBytes);
    wgmma_commit();
    const RingPosition<Plan::kSlots> scores_position = position;
    position.advance();
    position.wait_full(rings.slots);
    slot = rings.slot(position);
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
    scores_position.release(rings.slots);
    to_logits<T>(p, head_slice, scores, QueryRows{query, first_key + 2 * lane.q}, NoGradients{},
                 ProgramBias<T, Plan>{bias, rings.bias.full(0), note.has(Note::kBiasParity), rings.bias_tile(group),
                                      thread_row, lane});
    if (bias.is_used && note.has(Note::kEndsProgram)) RingPosition<1>{}.release(rings.bias);
    // The head slice is read again: if the one from above were kept until here, ptxas would spill up to 20 bytes.
    if (!note.has(Note::kIsFull))
      hide(
          scores,
          visible_keys_of_tile(p, note.head_slice(), note.valid(), note.key_block(), note.has(Note::kHasMasked), query),
          lane);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] =
          prob_of(scores[t][j], p.softmax_scale_log2, statistics[j / 2].lse_log2);
    }

    // The second wait for the same slot returns at once. It is here for its branch, which keeps ptxas from moving
    // wgmma_wait before the exponentials.
    position.wait_full(rings.slots);
    wgmma_wait<0>();
    keep_registers(flat(dprobs));
    position.release(rings.slots);
    position.advance();
    if (p.dropout_seed != nullptr) drop(dprobs, dropout_keep, p.dropout_scale);
    // Values that are not valid, and rows of another sequence, may hold NaN, and NaN times a prob of 0 is NaN.
    if (!note.has(Note::kIsFull)) clear_where_zero(dprobs, scores);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) sums[t][j] += scores[t][j] * (dprobs[t][j] - statistics[j / 2].delta);
    }
  };
  fill(sums, 0.0f);
  while (true) {
    position.wait_full(rings.slots);
    const Note note = rings.note(position);
    if (note.has(Note::kEnd)) return;
    if (note.has(Note::kIsTile)) {
      add_tile(note);
    } else {
      position.release(rings.slots);
      position.advance();
      position.wait_full(rings.slots);
      position.release(rings.slots);
      position.advance();
    }
    if (g.has_entry_of_each_score && note.has(Note::kEndsProgram)) {
      store_tile_of_sums<T>(ScoreTiles<kBlockM, kBlockN>(p, g, note.program()), sums, 64 * group + warp_row, lane);
      fill(sums, 0.0f);
    }
  }
}

// Sums the gradients of logits over the tiles of one owner and split, for one or several programs. A block of threads
// has a loading thread, and two consumer warpgroups.
template <class T, int kHeadDim, int kValueDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kGradientThreads, 1)
    bias_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BiasGradientParams g,
                         const GPU_GRID_CONSTANT BackwardMaps maps) {
  using Plan = BiasGradientPlan<kHeadDim, kValueDim>;
  const uint32_t shared = shared_address(shared_memory());
  const BiasGradientRings<Plan> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<kGradientProducerRegisters>();
    if (thread_index() == 0) load_score_tiles<Plan>(p, g, maps, rings);
    return;
  }
  increase_registers<kGradientConsumerRegisters>();
  constexpr int kConsumerThreads = kGradientConsumers * kWarpgroup;
  const int group = warpgroup - 1;
  float sums[Plan::kTiles][4];
  sum_score_tiles<T, kHeadDim, kValueDim, Plan>(p, g, maps.bias, rings, group, sums);
  if (g.has_entry_of_each_score) return;

  // Epilogue. The slots are not needed any more when both consumers have come to the end, so the sums are written over
  // them.
  barrier_sync<1>(kConsumerThreads);
  const SumsTile<Plan::kBlockM, Plan::kBlockN> sums_tile{shared};
  sums_tile.store(sums, 64 * group + thread_index() % kWarpgroup / 32 * 16, this_lane());
  barrier_sync<1>(kConsumerThreads);
  store_sums<T, kConsumerThreads>(ScoreTiles<Plan::kBlockM, Plan::kBlockN>(p, g, block_index_x()), sums_tile,
                                  thread_index() - kWarpgroup);
}

}  // namespace fused_attn::gpu::sm90
