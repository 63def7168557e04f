// The forward kernel for few queries, as in decoding against a cache of keys. The other kernel (query_blocks.h) puts
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

#include "amx_products.h"
#include "decode_block.h"
#include "decode_plan.h"
#include "decode_tiles.h"
#include "denormals.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// The memory in which one thread processes its work items.
template <class Policy>
struct DecodeScratch {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  DecodeBlock<Storage> blocks[2];  // the current block of keys, and the next one
  Lane* query;                     // [row][lanes of head_dim, padded]
  Lane* scores;                    // [row of a turn][key of the block]: logits, which their exponentials overwrite
  Lane* rescale;                   // [row of a turn]: by what the sums of earlier blocks are multiplied
  Vec<Lane>* row_sum;              // [row]: the sum of exponentials; its lanes are added up at the end
  DecodePartials<Lane> partials;   // of the rows, if there is one split
  DecodeTiles<Policy> tiles;       // for groups of kLeastTileRows or more, on AMX

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, const DecodePlan& plan) {
    const int64_t rows = plan.item_groups * plan.heads * p.seqlen_q;
    for (DecodeBlock<Storage>& block : blocks) block.layout(arena);
    query = arena.take<Lane>(rows * round_up(Policy::lanes_for(static_cast<int>(p.head_dim)), kLanes<Lane>));
    const int64_t turn_rows = plan.turn_groups * plan.heads * p.seqlen_q;
    scores = arena.take<Lane>(turn_rows * kScoreRow<Lane>);
    rescale = arena.take<Lane>(turn_rows);
    row_sum = arena.take<Vec<Lane>>(rows);
    partials.layout(arena, plan, plan.splits == 1 ? rows : 0);
    tiles.layout(arena, p, plan.item_groups, plan.turn_groups, plan.heads * p.seqlen_q);
  }
};

// Computes the output of query i of head h from the partial results of all splits, and writes it, and lse if wanted.
template <class Policy>
void merge_splits(const AttentionParams& p, const DecodePlan& plan,
                  const DecodePartials<typename Policy::Lane>& partials, const Sequence& seq, int64_t b, int64_t h,
                  int64_t i) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const auto row_of_split = [&](int64_t split) { return plan.row(p, seq, split, b, h, i) - partials.first_row; };
  // The splits subtracted different maxima before their exponentials. Multiply each by a factor that refers it to the
  // largest of these maxima.
  Lane keys_max = FloatTraits<Lane>::kLowest;
  for (int64_t split = 0; split < plan.splits; ++split) {
    const Lane other = partials.row_max[row_of_split(split)];
    keys_max = other > keys_max ? other : keys_max;
  }
  Lane factors[kMaxSplits];
  Lane total = 0;
  for (int64_t split = 0; split < plan.splits; ++split) {
    const int64_t row = row_of_split(split);
    factors[split] = natural_exp(partials.row_max[row] - keys_max);
    total += partials.row_sum[row] * factors[split];
  }
  // A row that sees no key has the output 0, even if there is a sink. A total of NaN is not 0, so its row becomes NaN.
  const bool empty = total == 0;
  if (p.row_max.data != nullptr) {
    *row_of<Lane>(p.row_max, b, h, seq.q_offset + i) = empty ? -FloatTraits<Lane>::kInfinity : keys_max;
  }
  // The sink is added to the denominator only. The maximum, the sink included, is subtracted before each exponential.
  const Lane sink = sink_of<Lane>(p, h);
  const Lane reference = sink > keys_max ? sink : keys_max;
  const Lane keys_share = natural_exp(keys_max - reference);
  total = total * keys_share + natural_exp(sink - reference);
  for (int64_t split = 0; split < plan.splits; ++split) factors[split] *= keys_share / total;
  if (p.lse.data != nullptr) {
    *row_of<Lane>(p.lse, b, h, seq.q_offset + i) =
        empty ? -FloatTraits<Lane>::kInfinity : reference + natural_log(total);
  }
  Storage* out = row_of<Storage>(p.out, b, h, seq.q_offset + i);
  for (int64_t d = 0; d < p.value_dim; d += n) {
    Vec<Lane> sum = {};
    for (int64_t split = 0; split < plan.splits && !empty; ++split) {
      sum += load<Lane>(partials.acc + row_of_split(split) * plan.value_row + d) * factors[split];
    }
    store_as<Lane>(out + d, sum, static_cast<int>(p.value_dim - d));
  }
}

// Whether `count` numbers, whole vectors, are finite.
template <class Lane>
bool are_finite(const Lane* numbers, int64_t count) {
  Vec<Lane> sum = {};
  for (int64_t i = 0; i < count; i += kLanes<Lane>) sum += load<Lane>(numbers + i) * Lane(0);
  const Lane total = sum_lanes<Lane>(sum);
  return total == 0;
}

// Processes one work item: attention of all queries of its groups over the keys of its split. Writes the result to
// `partials`, or, if there is one split, the output.
template <class Policy>
void decode_item(const AttentionParams& p, const DecodePlan& plan, const ValidKeys* valid_keys, const DecodeItem& item,
                 const DecodeScratch<Policy>& s, const DecodePartials<typename Policy::Lane>& all_partials,
                 bool may_use_tiles = true) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int64_t b = item.b;
  const int64_t first_head = item.first_group * plan.heads;
  const int64_t kv_head = first_head / (p.num_heads / p.num_kv_heads);
  const Sequence seq = sequence_of(p, b);
  const int64_t nq = seq.seqlen_q;
  if (nq == 0) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t query_row = round_up(Policy::lanes_for(head_dim), n);
  const int64_t group_rows = plan.heads * nq;
  const bool uses_tiles = Policy::kUsesAmx && may_use_tiles && group_rows >= kLeastTileRows;
  const int64_t rows = item.groups * group_rows;
  // Row r of the item is query r % nq of head first_head + r / nq.
  int64_t first_row = plan.row(p, seq, item.split, b, first_head, 0);
  DecodePartials<Lane> partials = all_partials;
  if (plan.splits == 1) {
    partials = s.partials;
    partials.first_row = first_row;
  }
  first_row -= partials.first_row;
  // Convert the queries to lanes, and start the softmax of each row.
  for (int64_t r = 0; r < rows; ++r) {
    const Storage* source = row_of<const Storage>(p.query, b, first_head + r / nq, seq.q_offset + r % nq);
    if constexpr (Policy::kUsesAmx) {
      if (uses_tiles) s.tiles.read_query(source, head_dim, r / group_rows, r % group_rows);
    }
    if (!uses_tiles) read_query<Policy>(source, head_dim, s.query + r * query_row);
    memset(partials.acc + (first_row + r) * plan.value_row, 0, plan.value_row * sizeof(Lane));
    partials.row_max[first_row + r] = FloatTraits<Lane>::kLowest;
    s.row_sum[r] = Vec<Lane>{};
  }

  const RowSource<Storage> key_source = row_source<Storage>(p, p.key, seq, b, kv_head);
  const RowSource<Storage> value_source = row_source<Storage>(p, p.value, seq, b, kv_head);
  const int64_t key_begin = item.split * plan.keys_per_split(seq);
  const int64_t key_stop = key_begin + plan.keys_per_split(seq);
  const int64_t key_end = key_stop < seq.seqlen_k ? key_stop : seq.seqlen_k;
  KeyStream stream(p, seq, valid_keys, b, first_head, 0, static_cast<int>(nq), key_begin, key_end);
  const DecodeBlock<Storage>* block = &s.blocks[0];
  const DecodeBlock<Storage>* next_block = &s.blocks[1];
  bool has_block = block->next(stream, key_source, value_source);
  while (has_block) {
    has_block = next_block->next(stream, key_source, value_source);
    const KeyBlock& keys = *block->keys;
    for (int64_t turn = 0; turn < item.groups; turn += plan.turn_groups) {
      const int64_t turn_end = turn + plan.turn_groups < item.groups ? turn + plan.turn_groups : item.groups;
      const int64_t turn_rows = (turn_end - turn) * group_rows;
      const int64_t turn_row = turn * group_rows;  // the first row of the turn, counted within the item
      // Calls visit(k, count, group) for the `count` keys of the block from key k on, and each group of the turn.
      const auto visit_groups = [&](const auto& visit) {
        for (int k = 0; k < keys.count; k += plan.part_keys) {
          const int count = k + plan.part_keys < keys.count ? plan.part_keys : keys.count - k;
          for (int64_t group = turn; group < turn_end; ++group) visit(k, count, group);
        }
      };
      const auto values_of = [&](int k, int64_t group) {
        return HeadRows<Storage>{block->value_rows + k, group * p.value.stride_head};
      };
      if constexpr (Policy::kUsesAmx) {
        if (uses_tiles) {
          using Prefetcher = TurnPrefetcher<Storage>;
          const auto prefetcher = [&](HeadRows<Storage> rows, int64_t stride_head, int64_t groups, int dim,
                                      int64_t calls) {
            if (!plan.exceeds_cache || rows.rows == nullptr || calls == 0) return Prefetcher();
            return Prefetcher(rows, stride_head, groups, keys.count, plan.part_keys, dim, calls);
          };
          // Beside the keys, the values of the turn are brought into the cache.
          const int64_t groups = turn_end - turn;
          Prefetcher values = prefetcher(values_of(0, turn), p.value.stride_head, groups, static_cast<int>(p.value_dim),
                                         groups * s.tiles.multiply_calls(keys.count, group_rows) + turn_rows);
          visit_groups([&](int k, int count, int64_t group) {
            s.tiles.multiply(group, group_rows, {block->key_rows + k, group * p.key.stride_head}, count, head_dim,
                             static_cast<Lane>(p.scale), s.scores + (group - turn) * group_rows * kScoreRow<Lane> + k,
                             values);
          });
          for (int64_t row = 0; row < turn_rows; ++row) {
            const int64_t r = turn_row + row;
            Lane* scores = s.scores + row * kScoreRow<Lane>;
            make_logits<Policy>(p, b, first_head + r / nq, r % nq, keys, scores);
            s.rescale[row] = decode_softmax<Policy>(keys.count, scores, partials.row_max[first_row + r], s.row_sum[r]);
            s.tiles.split_probs(keys.count, scores, row / group_rows, row % group_rows);
            values.next();
          }
          // Beside the values, the keys of the next turn are, which may be the first one of the next block.
          const bool is_last = turn_end == item.groups;
          const int64_t next = is_last ? 0 : turn_end;
          const Storage* const* next_rows = !is_last ? block->key_rows : has_block ? next_block->key_rows : nullptr;
          Prefetcher following = prefetcher({next_rows, next * p.key.stride_head}, p.key.stride_head,
                                            std::min(plan.turn_groups, item.groups - next), head_dim,
                                            groups * s.tiles.sum_calls(keys.count, group_rows));
          visit_groups([&](int k, int count, int64_t group) {
            s.tiles.sum_values(values_of(k, group), group - turn, group_rows, k, count, static_cast<int>(p.value_dim),
                               following);
          });
          for (int64_t group = turn; group < turn_end; ++group) {
            const int64_t row = (group - turn) * group_rows;
            s.tiles.add_sums(group - turn, group_rows, s.rescale + row,
                             partials.acc + (first_row + turn_row + row) * plan.value_row, plan.value_row);
          }
          continue;
        }
      }
      // Calls visit(k, count, group, row, queries) for the `queries` rows of the turn from `row` on, which belong to
      // one group.
      const auto visit_parts = [&](const auto& visit) {
        visit_groups([&](int k, int count, int64_t group) {
          visit_in_passes<Lane>(group_rows, [&](int64_t first, auto queries) {
            visit(k, count, group, (group - turn) * group_rows + first, queries);
          });
        });
      };
      // The first pass of a group brings what is read next into the cache: beside the keys their values, and beside the
      // values the keys of the next turn. Where the next turn has no such group, the group of the first turn is
      // brought, of the next block. So after the last turn all groups of the first one have been brought.
      const auto next_keys = [&](int k, int64_t group) -> HeadRows<Storage> {
        const int64_t next = group + plan.turn_groups;
        if (next < item.groups) return {block->key_rows + k, next * p.key.stride_head};
        if (has_block) return {next_block->key_rows + k, (group - turn) * p.key.stride_head};
        return {};
      };
      const auto prefetches = [&](int64_t row) { return plan.exceeds_cache && row % group_rows == 0; };
      visit_parts([&](int k, int count, int64_t group, int64_t row, auto queries) {
        const HeadRows<Storage> key_rows = {block->key_rows + k, group * p.key.stride_head};
        multiply_keys<Policy, decltype(queries)::value>(
            s.query + (turn_row + row) * query_row, query_row, key_rows, count, head_dim,
            prefetches(row) ? values_of(k, group) : HeadRows<Storage>{}, static_cast<Lane>(p.scale),
            s.scores + row * kScoreRow<Lane> + k);
      });
      for (int64_t row = 0; row < turn_rows; ++row) {
        const int64_t r = turn_row + row;
        Lane* scores = s.scores + row * kScoreRow<Lane>;
        make_logits<Policy>(p, b, first_head + r / nq, r % nq, keys, scores);
        s.rescale[row] = decode_softmax<Policy>(keys.count, scores, partials.row_max[first_row + r], s.row_sum[r]);
      }
      visit_parts([&](int k, int count, int64_t group, int64_t row, auto queries) {
        const HeadRows<Storage> next_rows = prefetches(row) ? next_keys(k, group) : HeadRows<Storage>{};
        sum_values<Policy, decltype(queries)::value>(
            values_of(k, group), next_rows, s.scores + row * kScoreRow<Lane> + k, count, static_cast<int>(p.value_dim),
            k == 0 ? s.rescale + row : nullptr, partials.acc + (first_row + turn_row + row) * plan.value_row,
            plan.value_row);
      });
    }
    std::swap(block, next_block);
  }
  // Tiles multiply an infinite value by both parts of a prob, one of which may be zero or negative. So the sum may be
  // NaN where vectors find infinity.
  if (uses_tiles && !are_finite<Lane>(partials.acc + first_row * plan.value_row, rows * plan.value_row)) {
    return decode_item<Policy>(p, plan, valid_keys, item, s, all_partials, /*may_use_tiles=*/false);
  }
  for (int64_t r = 0; r < rows; ++r) partials.row_sum[first_row + r] = sum_lanes<Lane>(s.row_sum[r]);
  if (plan.splits > 1) return;
  for (int64_t h = first_head; h < first_head + item.groups * plan.heads; ++h) {
    for (int64_t i = 0; i < nq; ++i) merge_splits<Policy>(p, plan, partials, seq, b, h, i);
  }
}

// Forward for few queries: processes all work items, then merges the splits of each row.
template <class Policy>
void forward_split_keys(const AttentionParams& p) {
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
    decode_item<Policy>(p, plan, valid_keys, plan.item(item), scratch[thread], partials);
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
