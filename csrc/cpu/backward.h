// Backward: plans the work of a call, and runs it on threads, in two passes.
//
// The first pass computes the statistics of every row: delta = rowsum(dout * out), and a correction of the rounded lse.
// If the second pass visits each row only once (BackwardPlan::is_single_pass), there is no first pass, and the second
// pass computes the statistics of a row when it visits the row.
//
// In the second pass, a work item is a group of (batch, kv head) pairs together with a chunk of keys. One of two
// kernels computes the pairs: backward_blocks.h for many queries, and decode_backward.h for few queries
// (BackwardPlan::is_decode), which needs no first pass.
//
// Two items write to the same rows only in dquery, and there each chunk writes a partial dquery of its own. So results
// do not depend on the order of the items, and the kernels need no atomic operations.
#pragma once
#include <memory>

#include "backward_blocks.h"
#include "decode_backward.h"
#include "denormals.h"
#include "kernels.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// Processes one work item: all (batch, kv head) pairs of a group, in order, with one chunk of keys. First sets the
// gradients of the biases to zero, unless dscores are stored in all of their entries. Returns false if floats are
// multiplied in parts, and a dscore is NaN or infinite. Then vectors have to process the item: an infinite float has no
// parts.
template <class Policy>
bool backward_item(const BackwardItem<Policy>& item, const DecodeBackwardScratch<LanePolicy<Policy>>& decode_scratch,
                   int64_t group) {
  using Lane = typename Policy::Lane;
  const AttentionParams& p = item.p;
  const BackwardPlan& plan = item.plan;
  const int64_t head_groups = plan.join_heads ? 1 : p.num_kv_heads;
  const int64_t b_begin = plan.join_batches ? 0 : group / head_groups;
  const int64_t b_end = plan.join_batches ? p.batch : b_begin + 1;
  const int64_t kv_begin = plan.join_heads ? 0 : group % head_groups;
  const int64_t kv_end = plan.join_heads ? p.num_kv_heads : kv_begin + 1;
  const int64_t group_size = group_size_of(p);

  // Where batch entries or heads share a gradient, the first one of the group stands for all of them.
  const int64_t key_stop = item.key_begin() + plan.chunk_keys;
  const int64_t key_end = key_stop < p.seqlen_k ? key_stop : p.seqlen_k;
  with_bias_gradients<Policy>(p, b_begin, kv_begin * group_size, [&](const auto& gradient) {
    if (gradient.is_first && plan.visits_all_keys) return;  // dscores are stored in all entries
    const int64_t own_batches = gradient.view.stride_batch == 0 ? b_begin + 1 : b_end;
    const int64_t own_heads = gradient.view.stride_head == 0 ? kv_begin * group_size + 1 : kv_end * group_size;
    for (int64_t b = b_begin; b < own_batches; ++b) {
      for (int64_t h = kv_begin * group_size; h < own_heads; ++h) {
        clear_dbias(gradient, b, h, p.seqlen_q, item.key_begin(), key_end);
      }
    }
  });
  bool is_exact = true;
  for (int64_t b = b_begin; b < b_end; ++b) {
    for (int64_t h = kv_begin * group_size; p.drelative_bias.data != nullptr && h < kv_end * group_size; ++h) {
      memset(item.partials.drelative_bias + head_index(p, item.chunk, b, h) * item.partials.row_relative, 0,
             item.partials.row_relative * sizeof(Lane));
    }
    for (int64_t kv_head = kv_begin; kv_head < kv_end; ++kv_head) {
      if (plan.is_decode) {
        decode_backward<LanePolicy<Policy>>(p, plan.visits_all_keys, item.valid_keys, b, kv_head, item.statistics,
                                            item.partials, decode_scratch);
      } else {
        if constexpr (Policy::kParts > 1) {
          if (!multiplies_parts<Policy>(p, sequence_of(p, b))) {
            backward_kv_head<LanePolicy<Policy>>(item.for_lanes(), b, kv_head);
            continue;
          }
        }
        is_exact &= backward_kv_head<Policy>(item, b, kv_head);
      }
    }
  }
  return is_exact;
}

// Computes dquery of one head: the sum of the partial dquery of all chunks. The order of the sum is fixed, so that a
// second call gives the same bits.
template <class Policy>
void reduce_dquery(const AttentionParams& p, const BackwardPlan& plan,
                   const BackwardPartials<typename Policy::Lane>& partials, int64_t b, int64_t h) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const Sequence seq = sequence_of(p, b);
  const int dim = static_cast<int>(p.head_dim);
  for (int64_t i = 0; i < seq.seqlen_q; ++i) {
    Storage* target = row_of<Storage>(p.dquery, b, h, seq.q_offset + i);
    for (int d = 0; d < dim; d += kLanes<Lane>) {
      Vec<Lane> sum = {};
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t row = head_index(p, chunk, b, h) * p.seqlen_q + i;
        sum += load_as<Lane>(partials.dquery + row * partials.row_dquery + d, dim - d);
      }
      store_as<Lane>(target + d, sum, dim - d);
    }
  }
}

// dsinks[h] = sum over the rows of head h of exp(sink - lse) * (dlse - delta). Here exp(sink - lse) is the probability
// of the sink in the row.
template <class Lane>
void compute_dsinks(const AttentionParams& p, const RowStatistics<Lane>& statistics, int64_t h) {
  const Vec<Lane> sink = broadcast<Lane>(sink_of<Lane>(p, h));
  Vec<Lane> total = {};
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = round_up(sequence_of(p, b).seqlen_q, kLanes<Lane>);
    const RowStatistics<Lane> rows = statistics.at(p, b, h, 0);
    for (int64_t i = 0; i < length; i += kLanes<Lane>) {
      const Vec<Lane> log_share = sink - load<Lane>(rows.lse + i) + load<Lane>(rows.correction + i);
      const Vec<Lane> share = exp2<Lane>(log_share * Lane(kLog2E));
      total += share * (load<Lane>(rows.dlse + i) - load<Lane>(rows.delta + i));
    }
  }
  *row_of<Lane>(p.dsinks, 0, h, 0) = sum_lanes<Lane>(total);
}

// Computes all gradients of one call: plans the work, allocates the scratch, and runs the two passes on threads.
template <class Policy>
void backward_with_policy(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  if (p.num_kv_heads == 0) return;  // without heads, there is no head group whose size could be computed
  const BackwardPlan plan = plan_backward<Policy>(p);
  const double flops = 4.0 * static_cast<double>(p.batch * p.num_heads) * static_cast<double>(p.seqlen_q) *
                       static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim + p.value_dim);
  // Each group has at least one item. Without keys, this item writes zeros to dquery.
  const int64_t chunks = plan.chunks < 1 ? 1 : plan.chunks;
  const int64_t items = plan.groups * chunks;
  const int threads = choose_threads(p.num_threads, items, flops);

  const Buffer valid_keys_memory(valid_keys_bytes(p));
  const Buffer relative_memory(relative_bias_bytes<Lane>(p));
  BackwardPartials<Lane> partials;
  const Buffer partials_memory([&](Arena& arena) { partials.layout(arena, p, plan); });
  const int64_t rows = plan.is_single_pass ? 0 : RowStatistics<Lane>::rows(p);
  RowStatistics<Lane> statistics;
  const Buffer statistics_memory([&](Arena& arena) { statistics.layout(arena, rows); });
  const std::unique_ptr<BackwardScratch<Policy>[]> scratch(new BackwardScratch<Policy>[threads]);
  const std::unique_ptr<DecodeBackwardScratch<LanePolicy<Policy>>[]> decode_scratch(
      new DecodeBackwardScratch<LanePolicy<Policy>>[threads]);
  // For what vectors multiply. Without parts nobody uses it, but an item refers to one.
  constexpr bool kHasParts = Policy::kParts > 1;
  const std::unique_ptr<BackwardScratch<LanePolicy<Policy>>[]> lane_scratch(
      new BackwardScratch<LanePolicy<Policy>>[kHasParts ? threads : 1]);
  const Buffer memory([&](Arena& arena) {
    for (int thread = 0; thread < threads; ++thread) {
      plan.is_decode ? decode_scratch[thread].layout(arena, p) : scratch[thread].layout(arena, p, plan);
      if (kHasParts && !plan.is_decode) lane_scratch[thread].layout(arena, p, plan);
    }
  });

  if (p.dbias.data != nullptr && has_entries_of_scores(p.dbias))
    advise_huge_pages(p.dbias.data, extent_of_scores(p, p.dbias) * bias_element_bytes<Policy>(p, p.dbias_dtype));
  const ValidKeys* valid_keys = make_valid_keys(p, valid_keys_memory.data());
  const RelativeBias<Lane> relative = make_relative_bias<Lane>(p, relative_memory.data());

  const bool can_flush = can_flush_gradients<Lane, typename Policy::Storage>(p);

  // The first pass: the statistics of all rows.
  const int64_t heads = p.batch * p.num_heads;
  const int64_t blocks = (p.seqlen_q + kBlockQ - 1) / kBlockQ;
  parallel_for(threads, plan.is_single_pass || plan.is_decode ? 0 : heads * blocks, [&](int64_t index, int thread) {
    const int64_t b = index / blocks / p.num_heads;
    const int64_t h = index / blocks % p.num_heads;
    const int64_t q_begin = index % blocks * kBlockQ;
    const Sequence seq = sequence_of(p, b);
    if (q_begin >= seq.seqlen_q) return;
    const QueryBlock queries = query_block_of(seq, b, h, q_begin);
    const RowStatistics<Lane> block_rows = statistics.at(p, b, h, q_begin);
    const FlushDenormalResults flush(can_flush);
    [[maybe_unused]] const MatrixRegisters<Policy> registers;
    const auto measure = [&](auto policy, const auto& own_scratch) {
      using Own = decltype(policy);
      return measure_rows<Own>(p, seq, relative, valid_keys, queries, own_scratch, block_rows);
    };
    if constexpr (kHasParts) {
      if (!multiplies_parts<Policy>(p, seq) || !measure(Policy{}, scratch[thread]))
        measure(LanePolicy<Policy>{}, lane_scratch[thread]);
    } else {
      measure(Policy{}, scratch[thread]);
    }
  });
  // The second pass: the gradients. Under a causal mask, more queries see the first keys than the last ones. So the
  // first chunks take longest, and the threads start with the first chunks.
  const Items order = plan.chunks > 1 ? Items::kInOrder : Items::kShared;
  const auto backward_of = [&](int64_t index, int thread) {
    const int64_t chunk = index / plan.groups;
    const int64_t group = index % plan.groups;
    const FlushDenormalResults flush(can_flush);
    [[maybe_unused]] const MatrixRegisters<Policy> registers;
    const auto& lanes = lane_scratch[kHasParts ? thread : 0];
    const BackwardItem<Policy> item = {p,     plan, relative, valid_keys, statistics, partials, scratch[thread],
                                       lanes, chunk};
    const bool is_exact = backward_item<Policy>(item, decode_scratch[thread], group);
    if constexpr (kHasParts) {
      if (!is_exact) backward_item<LanePolicy<Policy>>(item.for_lanes(), decode_scratch[thread], group);
    }
  };
  parallel_for(threads, items, backward_of, order);

  if (plan.chunks > 1 && p.dquery.data != nullptr) {
    parallel_for(threads, heads, [&](int64_t index, int) {
      const FlushDenormalResults flush(can_flush);
      reduce_dquery<Policy>(p, plan, partials, index / p.num_heads, index % p.num_heads);
    });
  }
  if (p.drelative_bias.data != nullptr) reduce_drelative<Lane>(p, plan, partials);
  if (p.dsinks.data != nullptr) {
    for (int64_t h = 0; h < p.num_heads; ++h) compute_dsinks<Lane>(p, statistics, h);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
