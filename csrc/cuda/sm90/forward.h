// Forward for Hopper: out = softmax(logits) @ value, with TMA and wgmma. The kernel is persistent: a block of threads
// stays on its multiprocessor and computes one tile of queries after another. A tile has kBlockM queries of one head.
// The warps of the block have four roles:
//
//   planning warp   decides which tile of queries comes next, which blocks of keys the tile visits, and which of these
//                   blocks need no mask: forward_planning.h
//   loading warp    loads the queries of each tile, and its keys and values block by block, through rings of slots:
//                   forward_loading.h
//   bias warps      two warps, which load tiles of a dense bias for one consumer each (general kernels):
//                   forward_loading.h
//   consumers       two or three warpgroups, which multiply. Each of them has 64 queries of the tile: this file
//
// All roles share the sizes, the rings and the addresses of forward_plan.h. The planning warp writes its decisions to
// shared memory, as records that are called notes (forward_notes.h): a TileNote for each tile of queries, and a KeyNote
// for each block of keys. A consumer then reads one bit of a KeyNote to learn that a block needs no mask. Without
// notes, each consumer would load the padding and compare positions for every block.
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
#include "forward_loading.h"
#include "forward_plan.h"
#include "forward_planning.h"

namespace fused_attn::gpu::sm90 {

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
    if (p.sinks != nullptr) join_sink(load_global(p.sinks + head_slice.head), factor, lse);
    if constexpr (kIsGeneral) factor *= p.dropout_scale;
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

  // If sequences are packed, the rows of the tile behind the last query are queries of other sequences.
  GPU_DEVICE void init_softmax(TileNote tile) {
    softmax.init();
    const int rows = tile.query_slice().seqlen_q - tile.first_row() - thread_row;
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      if (8 * r >= rows) softmax.ignore(r);
    }
  }

  GPU_DEVICE void run() {
    while (true) {
      tile_position.wait_full(rings.tiles);
      const TileNote tile = rings.tile_note(tile_position);
      if (tile.first_row() == kNoMoreTiles) break;
      init_softmax(tile);
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
