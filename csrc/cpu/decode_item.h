// One work item of the kernel for few queries (decode_forward.h): the softmax of its rows over the keys of its split,
// and the sums of the values.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "amx_products.h"
#include "decode_block.h"
#include "decode_merge.h"
#include "decode_plan.h"
#include "decode_tiles.h"

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

// Whether `count` numbers, whole vectors, are finite.
template <class Lane>
bool are_finite(const Lane* numbers, int64_t count) {
  Vec<Lane> sum = {};
  for (int64_t i = 0; i < count; i += kLanes<Lane>) sum += load<Lane>(numbers + i) * Lane(0);
  const Lane total = sum_lanes<Lane>(sum);
  return total == 0;
}

// Computes one work item: attention of all queries of its groups over the keys of its split. Row r of the item is query
// r % seqlen_q of head first_head + r / seqlen_q.
template <class Policy>
class ItemDecoder {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  using Block = DecodeBlock<Storage>;
  using Rows = HeadRows<Storage>;

 public:
  // all_partials: for the rows of all items, if there are several splits
  ItemDecoder(const AttentionParams& params, const DecodePlan& plan, const DecodeItem& item,
              const DecodeScratch<Policy>& scratch, const DecodePartials<Lane>& all_partials)
      : p_(params),
        plan_(plan),
        item_(item),
        s_(scratch),
        seq_(sequence_of(params, item.b)),
        head_dim_(static_cast<int>(params.head_dim)),
        value_dim_(static_cast<int>(params.value_dim)),
        query_row_(round_up(Policy::lanes_for(head_dim_), kLanes<Lane>)),
        first_head_(item.first_group * plan.heads),
        group_rows_(plan.heads * seq_.seqlen_q),
        rows_(item.groups * group_rows_),
        uses_tiles_(Policy::kUsesAmx && group_rows_ >= kLeastTileRows),
        partials_(plan.splits == 1 ? scratch.partials : all_partials) {
    const int64_t first_row = plan.row(params, seq_, item.split, item.b, first_head_, 0);
    if (plan.splits == 1) partials_.first_row = first_row;
    acc_ = partials_.acc + (first_row - partials_.first_row) * plan.value_row;
    row_max_ = partials_.row_max + (first_row - partials_.first_row);
    row_sum_ = partials_.row_sum + (first_row - partials_.first_row);
  }

  // Writes the partial results of all rows, or, if there is one split, the output.
  void run(const ValidKeys* valid_keys) {
    if (rows_ == 0 || item_.split >= plan_.splits_of(seq_)) return;
    attend(valid_keys);
    // Tiles multiply an infinite value by both parts of a prob, one of which may be zero or negative. So the sum may be
    // NaN where vectors find infinity.
    if (uses_tiles_ && !are_finite<Lane>(acc_, rows_ * plan_.value_row)) {
      uses_tiles_ = false;
      attend(valid_keys);
    }
    for (int64_t r = 0; r < rows_; ++r) row_sum_[r] = sum_lanes<Lane>(s_.row_sum[r]);
    if (plan_.splits > 1) return;
    for (int64_t r = 0; r < rows_; ++r)
      merge_splits<Policy>(p_, plan_, partials_, seq_, item_.b, head_of(r), query_of(r));
  }

 private:
  // Some groups of the item, which read a block of keys part by part in turns; see groups_of_turn.
  struct Turn {
    const Block& block;
    const Block* next_block;  // null = this is the last block
    int64_t begin, end;       // the groups, counted within the item

    int64_t groups() const { return end - begin; }
  };

  int64_t head_of(int64_t row) const { return first_head_ + row / seq_.seqlen_q; }
  int64_t query_of(int64_t row) const { return row % seq_.seqlen_q; }

  // The rows of one group for the keys of a block from key k on.
  Rows keys_of(const Block& block, int k, int64_t group) const {
    return {block.key_rows + k, group * p_.key.stride_head};
  }
  Rows values_of(const Block& block, int k, int64_t group) const {
    return {block.value_rows + k, group * p_.value.stride_head};
  }

  // The scores of a row of the turn: one number for each key of the block.
  Lane* scores_of(int64_t row) const { return s_.scores + row * kScoreRow<Lane>; }

  // Computes all blocks of keys.
  void attend(const ValidKeys* valid_keys) {
    start_rows();
    const int64_t kv_head = kv_head_of(p_, first_head_);
    const RowSource<Storage> key_source = row_source<Storage>(p_, p_.key, seq_, item_.b, kv_head);
    const RowSource<Storage> value_source = row_source<Storage>(p_, p_.value, seq_, item_.b, kv_head);
    const int64_t split_keys = plan_.keys_per_split(seq_);
    const int64_t key_begin = item_.split * split_keys;
    const int64_t key_end = std::min(key_begin + split_keys, seq_.seqlen_k);
    // The masks of the first head are those of all heads of the item.
    const QueryBlock queries = {item_.b, first_head_, 0, static_cast<int>(seq_.seqlen_q)};
    KeyStream stream(p_, seq_, valid_keys, queries, key_begin, key_end, /*step=*/1);
    const Block* block = &s_.blocks[0];
    const Block* next_block = &s_.blocks[1];
    bool has_block = block->next(stream, key_source, value_source);
    while (has_block) {
      has_block = next_block->next(stream, key_source, value_source);
      for (int64_t group = 0; group < item_.groups; group += plan_.turn_groups) {
        const int64_t end = std::min(group + plan_.turn_groups, item_.groups);
        take_turn({*block, has_block ? next_block : nullptr, group, end});
      }
      std::swap(block, next_block);
    }
  }

  // Converts the queries to lanes, and starts the softmax of each row.
  void start_rows() {
    for (int64_t r = 0; r < rows_; ++r) {
      const Storage* source = row_of<const Storage>(p_.query, item_.b, head_of(r), seq_.q_offset + query_of(r));
      if constexpr (Policy::kUsesAmx) {
        if (uses_tiles_) s_.tiles.read_query(source, head_dim_, r / group_rows_, r % group_rows_);
      }
      if (!uses_tiles_) read_query<Policy>(source, head_dim_, s_.query + r * query_row_);
      memset(acc_ + r * plan_.value_row, 0, plan_.value_row * sizeof(Lane));
      row_max_[r] = FloatTraits<Lane>::kLowest;
      s_.row_sum[r] = Vec<Lane>{};
    }
  }

  void take_turn(const Turn& turn) {
    if constexpr (Policy::kUsesAmx) {
      if (uses_tiles_) return take_turn_by_tiles(turn);
    }
    take_turn_by_vectors(turn);
  }

  // Calls visit(k, count, group) for the `count` keys of the block from key k on, and each group of the turn.
  template <class Visit>
  void visit_groups(const Turn& turn, const Visit& visit) {
    const int keys = turn.block.keys->count;
    for (int k = 0; k < keys; k += plan_.part_keys) {
      const int count = std::min(plan_.part_keys, keys - k);
      for (int64_t group = turn.begin; group < turn.end; ++group) visit(k, count, group);
    }
  }

  // Makes a step of the softmax of each row of the turn: its scores become exponentials. Calls visit(row) behind each.
  template <class Visit>
  void step_softmax(const Turn& turn, const Visit& visit) {
    const KeyBlock& keys = *turn.block.keys;
    for (int64_t row = 0; row < turn.groups() * group_rows_; ++row) {
      const int64_t r = turn.begin * group_rows_ + row;
      make_logits<Policy>(p_, item_.b, head_of(r), query_of(r), keys, scores_of(row));
      s_.rescale[row] = decode_softmax<Policy>(keys.count, scores_of(row), row_max_[r], s_.row_sum[r]);
      visit(row);
    }
  }

  void take_turn_by_vectors(const Turn& turn) {
    const int64_t turn_row = turn.begin * group_rows_;  // the first row of the turn, counted within the item
    // Calls visit(k, count, group, row, queries) for the `queries` rows of the turn from `row` on, which belong to one
    // group.
    const auto visit_parts = [&](const auto& visit) {
      visit_groups(turn, [&](int k, int count, int64_t group) {
        visit_in_passes<Lane>(group_rows_, [&](int64_t first, auto queries) {
          visit(k, count, group, (group - turn.begin) * group_rows_ + first, queries);
        });
      });
    };
    // The first pass of a group brings what is read next into the cache: beside the keys their values, and beside the
    // values the keys of the next turn. Where the next turn has no such group, the group of the first turn is brought,
    // of the next block. So after the last turn all groups of the first one have been brought.
    const auto next_keys = [&](int k, int64_t group) -> Rows {
      const int64_t next = group + plan_.turn_groups;
      if (next < item_.groups) return keys_of(turn.block, k, next);
      if (turn.next_block != nullptr) return keys_of(*turn.next_block, k, group - turn.begin);
      return {};
    };
    const auto prefetches = [&](int64_t row) { return plan_.exceeds_cache && row % group_rows_ == 0; };
    visit_parts([&](int k, int count, int64_t group, int64_t row, auto queries) {
      multiply_keys<Policy, decltype(queries)::value>(
          s_.query + (turn_row + row) * query_row_, query_row_, keys_of(turn.block, k, group), count, head_dim_,
          prefetches(row) ? values_of(turn.block, k, group) : Rows{}, static_cast<Lane>(p_.scale), scores_of(row) + k);
    });
    step_softmax(turn, [](int64_t) {});
    visit_parts([&](int k, int count, int64_t group, int64_t row, auto queries) {
      sum_values<Policy, decltype(queries)::value>(
          values_of(turn.block, k, group), prefetches(row) ? next_keys(k, group) : Rows{}, scores_of(row) + k, count,
          value_dim_, k == 0 ? s_.rescale + row : nullptr, acc_ + (turn_row + row) * plan_.value_row, plan_.value_row);
    });
  }

  void take_turn_by_tiles(const Turn& turn) {
    using Prefetcher = TurnPrefetcher<Storage>;
    const int keys = turn.block.keys->count;
    const int64_t groups = turn.groups();
    const auto prefetcher = [&](Rows rows, int64_t stride_head, int64_t groups, int dim, int64_t calls) {
      if (!plan_.exceeds_cache || rows.rows == nullptr || calls == 0) return Prefetcher();
      return Prefetcher(rows, stride_head, groups, keys, plan_.part_keys, dim, calls);
    };
    // Beside the keys, the values of the turn are brought into the cache.
    Prefetcher values = prefetcher(values_of(turn.block, 0, turn.begin), p_.value.stride_head, groups, value_dim_,
                                   groups * s_.tiles.multiply_calls(keys, group_rows_) + groups * group_rows_);
    visit_groups(turn, [&](int k, int count, int64_t group) {
      s_.tiles.multiply(group, group_rows_, keys_of(turn.block, k, group), count, head_dim_,
                        static_cast<Lane>(p_.scale), scores_of((group - turn.begin) * group_rows_) + k, values);
    });
    step_softmax(turn, [&](int64_t row) {
      s_.tiles.split_probs(keys, scores_of(row), row / group_rows_, row % group_rows_);
      values.next();
    });
    // Beside the values, the keys of the next turn are, which may be the first one of the next block.
    const bool is_last = turn.end == item_.groups;
    const int64_t next = is_last ? 0 : turn.end;
    const Block* next_block = is_last ? turn.next_block : &turn.block;
    Prefetcher following = prefetcher(next_block == nullptr ? Rows{} : keys_of(*next_block, 0, next),
                                      p_.key.stride_head, std::min(plan_.turn_groups, item_.groups - next), head_dim_,
                                      groups * s_.tiles.sum_calls(keys, group_rows_));
    visit_groups(turn, [&](int k, int count, int64_t group) {
      s_.tiles.sum_values(values_of(turn.block, k, group), group - turn.begin, group_rows_, k, count, value_dim_,
                          following);
    });
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * group_rows_;
      s_.tiles.add_sums(group, group_rows_, s_.rescale + row, acc_ + (turn.begin * group_rows_ + row) * plan_.value_row,
                        plan_.value_row);
    }
  }

  const AttentionParams& p_;
  const DecodePlan& plan_;
  const DecodeItem item_;
  const DecodeScratch<Policy>& s_;
  const Sequence seq_;
  const int head_dim_, value_dim_;
  const int64_t query_row_;  // lanes of a row of s_.query
  const int64_t first_head_, group_rows_, rows_;
  bool uses_tiles_;
  DecodePartials<Lane> partials_;
  Lane *acc_, *row_max_, *row_sum_;  // those of the first row of the item, in partials_
};

}  // namespace
}  // namespace fused_attn::cpu
