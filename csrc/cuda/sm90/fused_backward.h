// Backward for Hopper in one kernel, which computes five products for each pair of a tile of queries and a block of
// keys. A block of threads takes kKeyBlock keys of one head, and visits the queries that see these keys, kBlockM at a
// time. Scores and probs are transposed: their rows are keys.
//
//   scores^T = k @ q^T        dprobs^T = v @ dout^T
//   dv += probs^T @ dout      dk += dscores^T @ q        dq = dscores @ k
//
// Probs and dscores stay in registers, as left factors of the products for dv and dk. For dq, dscores also go through
// shared memory, once. A tile of dq is a sum over all blocks of keys: bulk copies add each part to float sums in global
// memory (dq_sums). In the end, a small kernel rounds these sums to dq (fused_backward_dq.h). If there is one block of
// keys only, there are no sums: this kernel itself writes dq.
//
// A call may want some of the gradients only. The others are computed all the same, but not stored: a branch around a
// product would cost the steps of all calls time.
//
// Parts are added to a tile of dq in a fixed order, so the result does not depend on timing. The last block of keys
// that sees the tile adds first, then the block of keys before it, and so on. Each sum has a counter (dq_turns), and a
// block of keys waits until the counter shows the block's own number in this order. A tile has one sum, or with few
// queries and many keys several ones (DqTurn). Blocks of keys are taken in the same order, from the last one to the
// first, and each visits its tiles of queries upwards. This order has two consequences:
//
//   - Neighbouring blocks of keys are at different tiles at the same time, and hardly ever wait for each other.
//   - A block of keys waits only for blocks of the same head that were taken earlier. Of all unfinished blocks, the one
//     that was taken first never waits, whatever else runs on the GPU. So there is no deadlock.
//
// Blocks of keys that do not see the tile add nothing, and have no number. Which ones see it follows from the band and
// the padding. A dense mask has to be read for it, so a small kernel lists all steps and turns: mask_steps.h.
//
// The warps of a block of threads have these roles:
//
//   warp 0             loads keys, queries and lse: fused_backward_loading.h
//   warp 1             loads values, dout and delta: fused_backward_loading.h
//   warps 2, 3         add tiles of dq to the sums, or write them to dq: fused_backward_dq.h
//   warpgroups 1, 2    multiply; each has 64 of the keys: this file
//
// All roles share the sizes and the rings of fused_backward_plan.h.
//
// A step is the work for one tile of queries. If there are few blocks of keys, several blocks of threads take a part of
// the steps of each (gradient_splits.h). Each part is a KeyBlock of its own.
//
// Two ideas do not go with this order. A cluster of two blocks of threads could share each tile of queries (multicast),
// but two blocks of keys that visit the same tile at the same time would wait for each other's turn. Sums of integers
// would need no order, but each thread would convert 32 numbers more in a step, and would need a scale for each row.
//
// The general kernel (kIsGeneral) also supports dropout, softcap, biases, dense masks and any scale, as branches that
// all threads take alike. All of it is done between the products for scores and dprobs and those that use them.
#pragma once
#include <type_traits>

#include "../dropout.h"
#include "../gradient_splits.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../row_statistics.h"
#include "backward.h"
#include "fused_backward_dq.h"
#include "fused_backward_loading.h"
#include "fused_backward_plan.h"
#include "key_blocks.h"

namespace fused_attn::gpu::sm90 {

// All lanes of a warp call this when they have written or read what the barrier stands for. The barrier counts one
// arrival for the warp.
GPU_DEVICE void arrive_once_a_warp(uint32_t barrier) {
  sync_warp();
  if (thread_index() % 32 == 0) mbarrier_arrive(barrier);
}

// The tile of the bias of a step, as to_logits takes it. The warp has the 16 keys from first_key of the block on.
template <class T, class Plan>
struct StepBias {
  const BiasMap& bias;
  uint32_t tile;
  int first_key;
  Lane lane;

  GPU_DEVICE bool is_used() const { return bias.is_used; }
  GPU_DEVICE void add(float (&scores)[Plan::kTiles][4], float factor) const {
    Plan::BiasTile::template add_transposed<T>(scores, factor, tile, bias, first_key, lane);
  }
};

// The role of a consumer warpgroup: sums dk and dv of 64 keys over all steps of a block of keys, and computes this
// warpgroup's part of a tile of dq in each step. All 128 threads call this, and return when no block of keys is left.
// `group` is 0 or 1.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_DEVICE void sum_gradients(const Params& p, const BiasMap& bias, uint32_t shared,
                              const FusedBackwardRings<kHeadDim, kIsGeneral>& rings, int group) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  using DscoresTile = typename Plan::DscoresTile;
  constexpr int kTiles = Plan::kTiles, kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  constexpr int kDqTiles = Plan::kOwnColumns / 8;
  const Lane lane = this_lane();
  const int warp_row = 64 * group + thread_index() % kWarpgroup / 32 * 16;  // of the keys
  // The row of dscores^T whose address this thread gives to stmatrix.
  const uint32_t dscores_row = DscoresTile::matrix_row(shared + Plan::kDscores, warp_row, lane);
  const uint32_t thread = thread_index() % kWarpgroup;
  // Where this thread's lse and delta lie in a tile without its offset. keep_computed makes the compiler add constants
  // to one register. Otherwise it would hold an address for each load below in a register of its own.
  const uint32_t own_statistics = keep_computed(shared + 8 * lane.q);
  float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
  // When a step begins, its products for scores and dprobs are already running on the tensor cores.
  float scores[kTiles][4], dprobs[kTiles][4], dq[kDqTiles][4];
  uint32_t rounded_probs[kTiles / 2][4], rounded_dscores[kTiles / 2][4];
  Float2 lse[kTiles];

  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    // Wait for the next block of keys. For head dim 64, registers spill unless its address is in a uniform register,
    // which shuffle achieves. For head dim 128, registers spill if the address is in a uniform register.
    const SharedKeyBlock b{Plan::kSplitsRows ? shuffle(reader.wait().address, 0) : reader.wait().address};
    if (b.number() == kNoMoreKeys) return;
    const RingPosition<1> key_position{reader.position.uses};
    const uint32_t first = step, end = step + shuffle(b.steps(), 0);
    // Calls `store` for this thread's two rows of dk and of dv, as far as these gradients are wanted.
    const auto store_gradients = [&](auto store) {
      const int split = SplitOfBlock(b.program(), p.dk_splits).split;
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        const int row = b.number() * kKeyBlock + warp_row + lane.g + 8 * r;
        const bool is_row = row < b.seqlen_k();
        const auto row_of = [&](auto type, const Rows& x) { return b.template key_row<decltype(type)>(x, row); };
        if (p.dk.data != nullptr) store(p.dk, p.dk_parts, split, row_of, dk, r, p.scale, is_row);
        const float factor = kIsGeneral ? p.dropout_scale : 1.0f;
        if (p.dv.data != nullptr) store(p.dv, p.dv_parts, split, row_of, dv, r, factor, is_row);
      }
    };
    // No query sees these keys: their gradients are zeros. The loading warps have marked the slots as full, without a
    // tile.
    if (first == end) {
      key_position.wait_full(rings.k);
      key_position.release(rings.k);
      key_position.wait_full(rings.v);
      key_position.release(rings.v);
      store_gradients([&](const Rows& gradient, const GradientParts& parts, int split, auto row_of, const auto&, int,
                          float, bool is_row) { store_zero_row<T>(gradient, parts, split, row_of, is_row, lane); });
      reader.release_by_warp();
      continue;
    }

    // Addresses of the tiles of queries and of dout of step i.
    const auto q_tile = [&](uint32_t i) { return shared + Plan::kQ + i % Plan::kQStages * QTile::kBytes; };
    const auto dout_tile = [&](uint32_t i) { return shared + Plan::kDout + i % Plan::kDoutStages * QTile::kBytes; };
    // Waits for the queries of step i, and starts scores^T = k @ q^T on the tensor cores.
    const auto start_scores = [&](uint32_t i) {
      mbarrier_wait(rings.q.full(i % Plan::kQStages), i / Plan::kQStages & 1);
      forget_registers(flat(scores));
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN, Plan::kKeyPanelColumns>(scores, shared + Plan::kK, 64 * group,
                                                                              q_tile(i));
      wgmma_commit();
    };
    // Waits for dout of step i, and starts dprobs^T = v @ dout^T on the tensor cores.
    const auto start_dprobs = [&](uint32_t i) {
      mbarrier_wait(rings.dout.full(i % Plan::kDoutStages), i / Plan::kDoutStages & 1);
      forget_registers(flat(dprobs));
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN, Plan::kKeyPanelColumns>(dprobs, shared + Plan::kV, 64 * group,
                                                                              dout_tile(i));
      wgmma_commit();
    };
    // Each thread computes with two of the 8 queries of tile t in step i. lse_at and delta_at load the lse and the
    // delta of these two queries from shared memory.
    const auto lse_at = [&](uint32_t i, int t) {
      return load_shared<Float2>(own_statistics + Plan::kLse + i % Plan::kQStages * Plan::kStatisticsBytes + t * 32);
    };
    const auto delta_at = [&](uint32_t i, int t) {
      return load_shared<Float2>(own_statistics + Plan::kDelta + i % Plan::kDoutStages * Plan::kStatisticsBytes +
                                 t * 32);
    };
    // Loads what step i needs besides products: StepInfo, dropout, and the first kLseAhead pairs of lse. begin_step
    // comes before start_dprobs, because the accumulators of dprobs are free registers until then.
    StepInfo info;
    DropoutKeep<kTiles> dropout_keep;
    const auto begin_step = [&](uint32_t i) {
      info = load_shared<StepInfo>(shared + Plan::kStepInfos + i % Plan::kQStages * uint32_t{sizeof(StepInfo)});
      if constexpr (kIsGeneral) {
        if (p.dropout_seed != nullptr)
          dropout_keep =
              dropout_keep_of_key_rows<kTiles>(Dropout(p, b.batch(), info.head), (info.tile & kTileNumber) * kBlockM,
                                               b.number() * kKeyBlock + warp_row, lane);
      } else {
        GPU_UNROLL for (int t = 0; t < Plan::kLseAhead; ++t) lse[t] = lse_at(i, t);
      }
    };

    // Sets the scores of the current step to -inf where a query does not see a key. Loops over tiles without a mask
    // leave no registers for masks. So everything about the mask is computed here, one word of 32 queries at a time.
    const auto hide_scores = [&] {
      const int own = keep_computed(thread), own_row = 64 * group + own / 32 * 16 + own % 32 / 4;
      const int tile = info.tile & kTileNumber;
      const Diagonals band(p, b.score_slice(info.head));
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        const bool is_valid = b.is_valid(own_row + 8 * r);
        const int key = b.number() * kKeyBlock + own_row + 8 * r;
        const int first = band.first_query(key) - tile * kBlockM, end = band.last_query(key) + 1 - tile * kBlockM;
        const uint32_t* masked = nullptr;
        if constexpr (kIsGeneral) {
          if (p.mask.map != nullptr) masked = queries_of_key(p, b.score_slice(info.head), key) + tile * (kBlockM / 32);
        }
        GPU_UNROLL for (int w = 0; w < kBlockM / 32; ++w) {
          uint32_t visible = is_valid ? column_bits(first, end, w) : 0;
          if constexpr (kIsGeneral) {
            if (masked != nullptr) visible &= load_global(masked + w);
          }
          hide_word(scores, r, w, visible, lane);
        }
      }
    };

    // Waits for the products of step i. Turns scores into probs and dprobs into dscores, both in place. With dropout,
    // probs become those after dropout.
    const auto compute_dscores = [&](uint32_t i) {
      wgmma_wait<kIsGeneral ? 0 : 1>();
      keep_registers(flat(scores));
      if constexpr (kIsGeneral) {
        // dprobs are needed first: the derivative of the softcap multiplies them.
        keep_registers(flat(dprobs));
        if (p.dropout_seed != nullptr) drop(dprobs, dropout_keep, p.dropout_scale);
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float2 delta = delta_at(i, t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) dprobs[t][j] -= j % 2 == 0 ? delta.x : delta.y;
        }
        const int own = keep_computed(thread), first_key = 64 * group + own / 32 * 16;
        const Lane own_lane{own % 32, own % 32 / 4, own % 4};
        const KeyRows at{(info.tile & kTileNumber) * kBlockM + 2 * own_lane.q,
                         b.number() * kKeyBlock + first_key + own_lane.g};
        const uint32_t tile = shared + Plan::kBias + i % Plan::kDoutStages * Plan::BiasTile::kBytes;
        to_logits<T>(p, b.score_slice(info.head), scores, at, LogitGradients<kTiles>{dprobs},
                     StepBias<T, Plan>{bias, tile, first_key, own_lane});
        if (info.tile & kHasMask) hide_scores();
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float2 lse_pair = lse_at(i, t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) {
            scores[t][j] = prob_of(scores[t][j], p.softmax_scale_log2, j % 2 == 0 ? lse_pair.x : lse_pair.y);
            dprobs[t][j] *= scores[t][j];
          }
        }
        if (p.dropout_seed != nullptr) drop(scores, dropout_keep, 1.0f);
        return;
      }
      if (info.tile & kHasMask) hide_scores();
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        if (t + Plan::kLseAhead < kTiles) lse[t + Plan::kLseAhead] = lse_at(i, t + Plan::kLseAhead);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          scores[t][j] = prob_of(scores[t][j], p.scale_log2, j % 2 == 0 ? lse[t].x : lse[t].y);
        }
      }
      Float2 delta[kTiles];
      GPU_UNROLL for (int t = 0; t < Plan::kDeltaAhead; ++t) delta[t] = delta_at(i, t);
      wgmma_wait<0>();
      keep_registers(flat(dprobs));
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        if (t + Plan::kDeltaAhead < kTiles) delta[t + Plan::kDeltaAhead] = delta_at(i, t + Plan::kDeltaAhead);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          dprobs[t][j] = scores[t][j] * (dprobs[t][j] - (j % 2 == 0 ? delta[t].x : delta[t].y));
        }
      }
    };

    // Adds the products of step i to dv and dk, writes this warpgroup's part of dq to shared memory, and starts the
    // products of step i + 1. The last step of a block of keys releases keys and values instead.
    const auto propagate = [&](uint32_t i, auto is_last) {
      constexpr bool kIsLast = decltype(is_last)::value;  // the last step of a block of keys
      const uint32_t buffer = i % 2 * DscoresTile::kBytes;
      round_fragment<T>(rounded_probs, scores);
      wgmma_fence();
      start_multiply<T, kHeadDim>(dv, rounded_probs, dout_tile(i), i != first);
      wgmma_commit();
      round_fragment<T>(rounded_dscores, dprobs);
      GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
        store_matrix_x4(DscoresTile::matrix_chunk(dscores_row + buffer, k), rounded_dscores[k]);
      }
      arrive_once_a_warp(rings.dscores + i % 2 * 8);
      wgmma_fence();
      start_multiply<T, kHeadDim>(dk, rounded_dscores, q_tile(i), i != first);
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(flat(dv));
      arrive_once_a_warp(rings.dout.empty(i % Plan::kDoutStages));
      if constexpr (kIsLast) key_position.release(rings.v);

      // dq = dscores @ k needs the dscores of both warpgroups. Each reading thread executes the fence that makes them
      // visible to wgmma. If the writing threads did, each would have to wait for all its stores.
      mbarrier_wait(rings.dscores + i % 2 * 8, i / 2 & 1);
      fence_async_proxy();
      forget_registers(flat(dq));
      wgmma_fence();
      const uint64_t left = matrix_descriptor(
          shared + Plan::kDscores + buffer + (Plan::kSplitsRows ? group * DscoresTile::kPanelBytes : 0), 16,
          kSwizzleBytes);
      const uint32_t right = shared + Plan::kK + (Plan::kSplitsRows ? 0 : group * KeyTile::kPanelBytes);
      GPU_UNROLL for (int k = 0; k < kBlockN / 16; ++k) {
        wgmma_ss<T, Plan::kOwnColumns, 1, 1>(flat(dq), left + matrix_descriptor_step(16 * k * kPanelRowBytes),
                                             KeyTile::rows(right, k), k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(flat(dk));
      if constexpr (!kIsLast) start_scores(i + 1);
      arrive_once_a_warp(rings.q.empty(i % Plan::kQStages));
      wgmma_wait<kIsLast ? 0 : 1>();
      keep_registers(flat(dq));
      if constexpr (kIsLast) key_position.release(rings.k);
      mbarrier_wait(rings.dq_empty + 8 * group, (i & 1) ^ 1);
      const uint32_t own_dq = shared + Plan::kDq + group * Plan::kOwnDqBytes + keep_computed(thread) * 16;
      GPU_UNROLL for (int t = 0; t < kDqTiles; ++t) {
        store_shared(own_dq + t * (kWarpgroup * 16), Float4{dq[t][0], dq[t][1], dq[t][2], dq[t][3]});
      }
      arrive_once_a_warp(rings.dq_full_of(group, i));
      if constexpr (!kIsLast) {
        begin_step(i + 1);
        start_dprobs(i + 1);
      }
    };

    key_position.wait_full(rings.k);
    start_scores(step);
    begin_step(step);
    key_position.wait_full(rings.v);
    start_dprobs(step);
    if constexpr (kIsGeneral) {  // with one copy of the long code of compute_dscores
      forget_registers(flat(dk));
      forget_registers(flat(dv));
      bool is_last;
      GPU_NO_UNROLL do {
        compute_dscores(step);
        is_last = shuffle(static_cast<uint32_t>(step == end - 1), 0);
        if (!is_last) propagate(step++, std::false_type{});
      }
      while (!is_last);
    } else {
      compute_dscores(step);
      forget_registers(flat(dk));
      forget_registers(flat(dv));
      GPU_NO_UNROLL for (; step != end - 1; ++step) {
        propagate(step, std::false_type{});
        compute_dscores(step + 1);
      }
    }
    propagate(step, std::true_type{});
    ++step;
    store_gradients([&](const Rows& gradient, const GradientParts& parts, int split, auto row_of, const auto& x, int r,
                        float factor, bool is_row) {
      store_gradient_row<T>(gradient, parts, split, row_of, x, r, factor, is_row, lane);
    });
    reader.release_by_warp();
  }
}

// The fused backward, launched by launch_fused (launchers.h) with one block of threads for each multiprocessor.
// num_programs is the number of blocks of keys of all heads.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kFusedBackwardThreads, 1)
    fused_backward_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps,
                          int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const uint32_t shared = shared_address(shared_memory());
  const FusedBackwardRings<kHeadDim, kIsGeneral> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<Plan::kProducerRegisters>();
    const int warp = shuffle(thread_index() / 32, 0);
    if (warp == 0) {
      load_tiles<kHeadDim, kIsGeneral, true>(p, maps, shared, rings, num_programs);
    } else if (warp == 1) {
      load_tiles<kHeadDim, kIsGeneral, false>(p, maps, shared, rings, num_programs);
    } else if (p.dq_sums == nullptr && p.dq.data != nullptr) {
      store_dq<T, kHeadDim, kIsGeneral>(p, shared, rings, warp % 2);
    } else if (thread_index() % 32 == 0) {
      if (p.dq_sums != nullptr) {
        add_dq<kHeadDim, kIsGeneral>(p, shared, rings, warp % 2);
      } else {
        drop_dq<kHeadDim, kIsGeneral>(shared, rings, warp % 2);
      }
    }
  } else {
    increase_registers<Plan::kConsumerRegisters>();
    sum_gradients<T, kHeadDim, kIsGeneral>(p, maps.bias, shared, rings, warpgroup - 1);
  }
}

}  // namespace fused_attn::gpu::sm90
