// The forward kernel for few queries, as in decoding against a cache of keys. The other kernel (forward_blocks.h) puts
// one query into each lane, so with few queries most lanes would be empty. Here the lanes of a vector are columns of a
// row of key or value, so each row is loaded as whole vectors:
//
//   scores[key] = sum over d of key[key][d] * query[d]     a vector of sums at a time, each in a vector of its own
//   out[d]      = sum over keys of exp(scores[key] - row_max) * value[key][d]
//
// Up to four queries of a head group are processed together, because they read the same keys. With AMX, tiles process
// all queries of larger groups together (decode_tiles.h).
//
// A work item is one split of the keys of one or several kv heads, together with all queries that attend to these
// heads. groups_of_item (decode_plan.h) chooses how many. Each head computes a block of keys before the next block
// begins. So a page of the keys is read whole, and so are the rows of all heads of a token where these follow one
// another in memory. One query over 64k keys of 8 heads (bfloat16, one thread of a Xeon with AVX-512) took, compared
// with head by head and without the prefetches of sum_values, 0.65 of the time in a cache token by token, and 0.78 in
// pages of 64 or 16 rows.
//
// Within a block, the heads of an item take turns: some heads at a time, see groups_of_turn. The heads of a turn read
// the keys of the block part by part, and then the values.
//
// If there are several splits, a second pass merges their results. The number of splits depends on the shapes alone,
// and so does the order of the keys of a query. So results do not depend on the number of threads.
#pragma once
#include <memory>

#include "decode_item.h"
#include "denormals.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// Forward for few queries: processes all work items, then merges the splits of each row.
template <class Policy>
void decode_forward(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  if (p.batch * p.num_heads * p.seqlen_q == 0) return;
  const DecodePlan plan = plan_decode<Policy>(p);
  const int64_t items = plan.items(p);
  const int64_t rows = p.batch * p.num_heads * p.seqlen_q;
  const double flops =
      2.0 * static_cast<double>(rows) * static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim + p.value_dim);
  const int threads = choose_threads(p.num_threads, items, flops);

  const Buffer valid_keys_memory(valid_keys_bytes(p));
  DecodePartials<Lane> partials;
  const Buffer partials_memory(
      [&](Arena& arena) { partials.layout(arena, plan, plan.splits > 1 ? plan.splits * rows : 0); });
  const std::unique_ptr<DecodeScratch<Policy>[]> scratch(new DecodeScratch<Policy>[threads]);
  const Buffer memory([&](Arena& arena) {
    for (int thread = 0; thread < threads; ++thread) scratch[thread].layout(arena, p, plan);
  });
  const ValidKeys* valid_keys = make_valid_keys(p, valid_keys_memory.data());

  parallel_for(threads, items, [&](int64_t item, int thread) {
    const FlushDenormalResults flush;
    [[maybe_unused]] const MatrixRegisters<Policy> registers;
    ItemDecoder<Policy>(p, plan, plan.item(item), scratch[thread], partials).run(valid_keys);
  });
  if (plan.splits == 1) return;
  const double merge_flops = 2.0 * static_cast<double>(rows * plan.splits * p.value_dim);
  parallel_for(choose_threads(p.num_threads, rows, merge_flops), p.batch * p.num_heads, [&](int64_t head, int) {
    const FlushDenormalResults flush;
    const int64_t b = head / p.num_heads;
    const Sequence seq = sequence_of(p, b);
    for (int64_t i = 0; i < seq.seqlen_q; ++i) merge_splits<Policy>(p, plan, partials, seq, b, head % p.num_heads, i);
  });
}

}  // namespace
}  // namespace fused_attn::cpu
