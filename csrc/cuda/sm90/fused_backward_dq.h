// The way of dq in the fused backward (fused_backward.h). Two warps take the parts from shared memory, in one of three
// ways:
//
//   add_dq     One thread of each warp adds the parts to sums in global memory. In the end, a small kernel rounds these
//              sums to dq. One thread works for even steps, the other for odd steps: to wait for a turn, and for an
//              addition to be complete, takes longer than a step.
//   store_dq   With one block of keys, no tile is a sum. The warps round the parts, and write them to dq.
//   drop_dq    Nobody wants dq.
#pragma once
#include "../fragments.h"
#include "../tile_scheduler.h"
#include "fused_backward_plan.h"
#include "key_blocks.h"

namespace fused_attn::gpu::sm90 {

// Adds the tiles of dq of every second step (step % 2 == parity) to the sums in global memory. One thread calls this.
// For each step, it waits for the turn of this block of keys at the tile, and for both warpgroups to have written their
// parts to shared memory. After the addition, it raises the counter of the tile, so that the next block of keys has its
// turn.
template <int kHeadDim, bool kIsGeneral>
GPU_DEVICE void add_dq(const Params& p, uint32_t shared, const FusedBackwardRings<kHeadDim, kIsGeneral>& rings,
                       uint32_t parity) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    Step<Plan::kBlockM, kIsGeneral> at(p, b);
    const auto is_left = [&](int left) { return kIsGeneral ? at.is_left(p, b) : left > 0; };  // fewest registers
    GPU_NO_UNROLL for (int left = b.steps(); is_left(left); --left, ++step, at.advance(p, b)) {
      if (step % 2 != parity) continue;
      const int64_t tile = b.row_block(p, at.head()) * Plan::kTilesPerRowBlock + at.tile();
      const DqTurn turn(p, tile, at.earlier(p, b));
      wait_until_equal(p.dq_turns + turn.sum, turn.number);
      fence_async_proxy_global();
      GPU_UNROLL for (int group = 0; group < Plan::kConsumers; ++group) {
        mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1);
        fence_async_proxy();
        const uint32_t source = shared + Plan::kDq + group * Plan::kOwnDqBytes;
        float* const sums = p.dq_sums + turn.sum * Plan::kDqFloats + group * Plan::kOwnDqFloats;
        if (turn.number == 0) {  // memory holds no sum yet, not even zeros
          bulk_store(sums, source, Plan::kOwnDqBytes);
        } else {
          bulk_reduce_add_f32(sums, source, Plan::kOwnDqBytes);
        }
        tma_store_commit();
      }
      // Wait until the copy engine has read the first part from shared memory, then the second part, and then until
      // both parts have been added in global memory.
      tma_store_wait_read<1>();
      mbarrier_arrive(rings.dq_empty);
      tma_store_wait_read<0>();
      mbarrier_arrive(rings.dq_empty + 8);
      tma_store_wait<0>();
      fence_async_proxy_global();
      add_release(p.dq_turns + turn.sum, 1);
    }
    reader.release_by_thread();
  }
}

// Takes the place of add_dq if the longest sequence has one block of keys, so that a part of dq is dq itself.
// Multiplies the part of consumer warpgroup `group` by the scale, rounds it, and writes it to dq. All lanes of a warp
// call this. The preparation kernel has set to zero the rows that no step visits.
//
// The plain kernel leaves 24 registers for a thread. So the pointer is carried from one row to the next, and a thread
// has one row at a time. With two rows at a time, registers spill.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_DEVICE void store_dq(const Params& p, uint32_t shared, const FusedBackwardRings<kHeadDim, kIsGeneral>& rings,
                         int group) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const int first_column = Plan::kSplitsRows ? 0 : group * Plan::kOwnColumns;
  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    const SharedKeyBlock b{shuffle(reader.wait().address, 0)};  // in a uniform register
    if (b.number() == kNoMoreKeys) return;
    Step<Plan::kBlockM, kIsGeneral> at(p, b);
    bool is_left = b.steps() > 0;  // a Step of the plain kernel does not know that a block has none
    GPU_NO_UNROLL while (is_left) {
      mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1);
      // A consumer warp has written 16 rows. Its thread (g, q) has two columns of the rows g and g + 8, in the halves
      // of its 16 bytes of each tile. A pass of the loop reads one of these halves, which are 8 rows.
      const Lane lane = this_lane();
      const int row = at.tile() * Plan::kBlockM + (Plan::kSplitsRows ? 64 * group : 0) + lane.g;
      uint32_t source = shared + Plan::kDq + group * Plan::kOwnDqBytes + lane.index * 16;
      int rows_left = b.seqlen_q() - row;
      T* to = b.query_row<T>(p.dq, at.head(), row) + first_column;
      GPU_NO_UNROLL for (int pass = 0; pass < 2 * kWarpsPerWarpgroup && warp_any(rows_left > 0); ++pass) {
        GPU_UNROLL for (int t = 0; t < Plan::kOwnColumns / 8; t += 4) {
          uint32_t words[4];
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const Float2 x = load_shared<Float2>(source + (t + i) * (kWarpgroup * 16));
            words[i] = pack<T>(x.x * p.scale, x.y * p.scale);
          }
          store_words(to, words, t, rows_left > 0, p.dq.columns - first_column, lane);
        }
        source += pass % 2 == 0 ? 8 : 32 * 16 - 8;
        rows_left -= 8;
        to += 8 * p.dq.stride_row;
      }
      sync_warp();
      if (lane.index == 0) mbarrier_arrive(rings.dq_empty + 8 * group);
      ++step;
      at.advance(p, b);
      is_left = at.is_left(p, b);
    }
    reader.release_by_warp();
  }
}

// Takes the place of add_dq if dq is not wanted: marks the memory of each part of dq as empty again. A branch in add_dq
// would need a register more than there are.
template <int kHeadDim, bool kIsGeneral>
GPU_DEVICE void drop_dq(uint32_t shared, const FusedBackwardRings<kHeadDim, kIsGeneral>& rings, uint32_t parity) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    GPU_NO_UNROLL for (int left = b.steps(); left > 0; --left, ++step) {
      if (step % 2 != parity) continue;
      GPU_UNROLL for (int group = 0; group < Plan::kConsumers; ++group) {
        mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1);
        mbarrier_arrive(rings.dq_empty + 8 * group);
      }
    }
    reader.release_by_thread();
  }
}

constexpr int kRoundingThreads = 256;

// Runs after a fused backward that adds parts of dq: adds the sums of one tile of dq, multiplies the result by the
// scale, rounds it, and writes it to dq. Thread i of a block reads the sums that thread i of the two consumer
// warpgroups computed.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kRoundingThreads, 1) round_dq_kernel(const GPU_GRID_CONSTANT Params p) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const WorkTile work = query_gradient_tile<Plan::kBlockM>(p, block_index_x(), p.seqlen_q);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * Plan::kBlockM;
  if (first_row >= head_slice.seqlen_q) return;
  const int64_t first_sum = (head_slice.first_row_block(p) * Plan::kTilesPerRowBlock + work.block) << p.dq_sums_log2;
  int num_sums = 0;  // the first ones, to which a block of keys has added. The others are not even zeros
  while (num_sums < 1 << p.dq_sums_log2 && load_global(p.dq_turns + first_sum + num_sums) != 0) ++num_sums;
  const int group = thread_index() / kWarpgroup;
  const Lane lane = this_lane();
  const int own_row = first_row + (Plan::kSplitsRows ? 64 * group : 0) + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  const int first_column = Plan::kSplitsRows ? 0 : group * Plan::kOwnColumns;
  const float* sums =
      p.dq_sums + first_sum * Plan::kDqFloats + group * Plan::kOwnDqFloats + thread_index() % kWarpgroup * 4;
  const auto load_sum = [&](int n, int t) {
    return load_global(reinterpret_cast<const Float4*>(sums + int64_t{n} * Plan::kDqFloats + t * (kWarpgroup * 4)));
  };
  constexpr int kTiles = Plan::kOwnColumns / 8;
  float dq[kTiles][4];
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    const Float4 sum = num_sums > 0 ? load_sum(0, t) : Float4{0.0f, 0.0f, 0.0f, 0.0f};
    dq[t][0] = sum.x;
    dq[t][1] = sum.y;
    dq[t][2] = sum.z;
    dq[t][3] = sum.w;
  }
  GPU_NO_UNROLL for (int n = 1; n < num_sums; ++n) {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      const Float4 sum = load_sum(n, t);
      dq[t][0] += sum.x;
      dq[t][1] += sum.y;
      dq[t][2] += sum.z;
      dq[t][3] += sum.w;
    }
  }
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = own_row + 8 * r;
    store_row<T>(head_slice.query_row<T>(p.dq, row) + first_column, dq, r, p.scale, row < head_slice.seqlen_q,
                 p.dq.columns - first_column, lane);
  }
}

}  // namespace fused_attn::gpu::sm90
