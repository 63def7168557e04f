// How backward divides its work among threads.
#pragma once
#include "scores.h"

namespace fused_attn::cpu {
namespace {

// How the (batch, kv head) pairs and the keys of a call are divided into work items. An item is one group of pairs and
// one chunk of keys. Pairs that add to the same entries of the gradient of the bias form one group, because one thread
// must add them up in order. Where there are fewer groups than threads, the keys are divided into chunks as well.
struct BackwardPlan {
  bool join_batches;     // a group consists of all batch entries, because they share the gradient of the bias
  bool join_heads;       // a group consists of all kv heads, because they share the gradient of the bias
  int64_t groups;        // the number of groups
  int64_t chunks;        // the number of chunks, at least 1
  int64_t chunk_keys;    // the number of keys of a chunk; the last chunk may have fewer
  int64_t slab_keys;     // the number of keys of a slab; a chunk is processed slab by slab
  bool sums_dquery;      // dquery is summed over the slabs in the scratch, because the output has fewer bits than lanes
  bool visits_all_keys;  // every query sees every key
  bool is_single_pass;   // the second pass visits each row once, so it computes the row statistics itself
  bool is_decode;        // decode_backward.h computes the gradients
};

// Whether each score of a head has an entry of its own in the gradient of the dense bias.
FA_INLINE bool has_entries_of_scores(const TensorView& dbias) { return dbias.stride_row != 0 && dbias.stride_col != 0; }

// Whether the gradient of the dense bias is stored from pairs of dscores, which are rounded to bfloat16 for the product
// that gives dquery. Then no tile of dscores is needed.
template <class Policy>
FA_INLINE bool stores_dbias_pairs(const AttentionParams& p) {
  if (Policy::kPerLane != 2 || p.dbias.data == nullptr || p.dbias_dtype != p.dtype) return false;
  return !(p.softcap > 0) && p.dkey_bias.data == nullptr && p.drelative_bias.data == nullptr;
}

// Whether every query sees every key.
FA_INLINE bool sees_all_keys(const AttentionParams& p) {
  const bool has_masks = has_score_mask(p) || p.key_padding.data != nullptr;
  const bool has_lengths = p.cu_seqlens_q != nullptr || p.key_lengths != nullptr;
  if (has_masks || has_lengths) return false;
  return band_of(p, sequence_of(p, 0)).all_visible(0, p.seqlen_q - 1, 0, p.seqlen_k - 1);
}

// Whether decode_backward.h computes this call, if no head has to be shared among threads. With AVX-512, calls of 64
// heads take 0.5 (4 x 4) and 0.64 (8 x 8) of the time of backward_blocks.h (float32, head dim 64), with 8 queries and
// 1024 keys 0.93 (float32) and 0.82 (bfloat16).
template <class Policy>
bool has_few_queries(const AttentionParams& p) {
  // A softmax over more keys, dropout, and masks that differ among the heads of a group are left to backward_blocks.h.
  const bool own_masks = has_score_mask_of_heads(p) && p.num_heads != p.num_kv_heads;
  if (p.is_part || p.has_dropout || own_masks) return false;
  // A KeyBlock tells in the bits of a word which queries see a key.
  if (p.seqlen_q > kBlockQ) return false;
  // The probs and dscores of a head group must not take more memory than its keys and values.
  if (2 * p.num_heads * p.seqlen_q > p.num_kv_heads * (p.head_dim + p.value_dim)) return false;
  // Compares the instructions for one key. backward_blocks.h needs a multiply-add for each lane of the row in three
  // products, and as much for the transposition of queries and gradients as for 8 keys. decode_backward.h needs about
  // two instructions for each query and each vector of the row.
  constexpr int64_t n = kLanes<typename Policy::Lane>;
  const int64_t vectors = 2 * (round_up(p.head_dim, n) / n) + round_up(p.value_dim, n) / n;
  // Beside AMX, backward_blocks.h is faster, but less exact for few queries: its delta is that of the rounded output.
  int64_t lanes = (2 * p.head_dim + p.value_dim) / (Policy::kUsesAmx ? 1 : Policy::kPerLane);
  // decode_backward.h reads the keys of a head a second time. If they are no longer in the cache, 8 queries and 4096
  // keys (float32, head dim 64) take 1.1 of the time. backward_blocks.h converts 16-bit rows, which takes longer.
  const int64_t head_bytes =
      p.seqlen_k * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(typename Policy::Lane));
  if (kSame<typename Policy::Storage, typename Policy::Lane> && head_bytes > kCachedBytes) lanes -= p.head_dim / 2;
  return 2 * p.seqlen_q * vectors * p.seqlen_k <= lanes * (p.seqlen_k + 8);
}

// Chooses the numbers of groups, chunks and slabs for one call.
template <class Policy>
BackwardPlan plan_backward(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  BackwardPlan plan;
  const bool has_dbias = p.dbias.data != nullptr;
  plan.join_batches = has_dbias && p.dbias.stride_batch == 0 && p.batch > 1;
  plan.join_heads = ((has_dbias && p.dbias.stride_head == 0) || p.dkey_bias.data != nullptr) && p.num_heads > 1;
  plan.groups = (plan.join_batches ? 1 : p.batch) * (plan.join_heads ? 1 : p.num_kv_heads);
  // The plan aims at two items for each thread, because the chunks of a causal problem take unequal time. A chunk has
  // at least 128 keys. So the order in which dquery is summed depends on the number of threads. With as many chunks as
  // 16 threads need, one thread took 1.04 to 1.13 of the time for 8 heads with 256 to 1024 queries and keys.
  const int64_t wanted = plan.groups > 0 ? (2 * p.num_threads + plan.groups - 1) / plan.groups : 1;
  const int64_t possible = (p.seqlen_k + 127) / 128;
  // Every chunk has a partial dquery of its own. Without a bound on their size, a large problem would need several
  // times the memory of its tensors.
  constexpr int64_t kPartialBytes = int64_t{256} << 20;
  const int64_t dquery_bytes = p.batch * p.num_heads * p.seqlen_q * p.head_dim * static_cast<int64_t>(sizeof(double));
  const int64_t affordable = dquery_bytes > 0 ? kPartialBytes / dquery_bytes : possible;
  plan.chunks = wanted < possible ? wanted : possible;
  if (plan.chunks > affordable) plan.chunks = affordable;
  // If all keys share an entry of the bias (stride 0), all chunks would add to that entry.
  if (plan.chunks < 1 || (has_dbias && p.dbias.stride_col == 0)) plan.chunks = 1;
  plan.chunk_keys = round_up((p.seqlen_k + plan.chunks - 1) / plan.chunks, 64);
  if (plan.chunk_keys > 0) plan.chunks = (p.seqlen_k + plan.chunk_keys - 1) / plan.chunk_keys;

  // dkey and dvalue of a slab fill 512 KiB, half of the second-level cache of most cores. With 1 MiB, calls of head dim
  // 512 took 0.98 of the time on a Xeon whose cores have 2 MiB.
  constexpr int64_t kSlabBytes = int64_t{512} << 10;
  const int64_t head_row = round_up(p.head_dim, kLanes<Lane>);
  const int64_t key_bytes = (head_row + round_up(p.value_dim, kLanes<Lane>)) * static_cast<int64_t>(sizeof(Lane));
  plan.slab_keys = key_bytes > 0 ? kSlabBytes / key_bytes / 64 * 64 : plan.chunk_keys;
  // The sum of dquery over slabs needs the precision of lanes. If the output has a smaller type, the sum needs scratch
  // memory. In return, slabs save scratch memory: it holds dkey and dvalue of one slab only, not of the whole chunk.
  // The plan uses slabs only if they save at least as much as they need.
  plan.sums_dquery = !kSame<typename Policy::Storage, Lane> && plan.chunks == 1 && p.dquery.data != nullptr;
  const int64_t sums_bytes = group_size_of(p) * p.seqlen_q * head_row * static_cast<int64_t>(sizeof(Lane));
  const bool is_worth_it = !plan.sums_dquery || sums_bytes <= (plan.chunk_keys - plan.slab_keys) * key_bytes;
  if (plan.slab_keys >= plan.chunk_keys || !is_worth_it) {
    plan.slab_keys = plan.chunk_keys;
    plan.sums_dquery = false;
  }
  plan.visits_all_keys = sees_all_keys(p);
  plan.is_single_pass = plan.chunks <= 1 && plan.slab_keys == plan.chunk_keys && p.dsinks.data == nullptr;
  plan.is_decode = has_few_queries<Policy>(p) && (plan.chunks <= 1 || plan.groups >= p.num_threads);
  if (plan.is_decode) {
    plan.chunks = 1;
    plan.chunk_keys = p.seqlen_k;
    plan.is_single_pass = p.dsinks.data == nullptr;
  }
  return plan;
}

}  // namespace
}  // namespace fused_attn::cpu
