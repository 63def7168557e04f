// From WorkspaceNeeds to Pieces: divides the workspace of a call, which holds intermediate results, into arrays.
#pragma once
#include <algorithm>
#include <cstdint>

#include "bias_gradient/plan.h"
#include "l2_groups.h"
#include "params.h"
#include "tiles.h"
#include "workspace_needs.h"

namespace fused_attn::gpu {

// Arrays of bits (valid keys, masks) reach to the end of the largest block of queries or keys. So kernels read whole
// blocks, without a test for the end of the array.
constexpr int64_t kLargestBlock = 256;

// Hands out pieces of the workspace one after another, each a multiple of 256 bytes behind its start. With a null
// pointer, a Workspace only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  // The next piece, with room for `count` entries of type T.
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// The pieces of the workspace that a call needs, in their order. The other ones are null. Params says what each piece
// holds. The numbers are sizes of pieces, or strides within one.
struct Pieces {
  SplitParams decode_splits{};  // see KeySplits
  SplitParams large_splits{};
  int32_t valid_words = 0;
  uint32_t* valid_keys = nullptr;

  // Backward only.
  float* dq_parts = nullptr;
  float* dk_parts = nullptr;
  float* dv_parts = nullptr;
  int32_t row_blocks = 0;
  float* lse_log2 = nullptr;
  float* delta = nullptr;

  // Fused backward only.
  int32_t dq_sums_log2 = 0;
  float* dq_sums = nullptr;
  int32_t* dq_turns = nullptr;
  KeyBlock* key_blocks = nullptr;
  int32_t* key_ranks = nullptr;
  StepInfo* mask_steps = nullptr;
  int32_t* mask_turns = nullptr;

  MaskParams mask{};
  int32_t most_query_tiles = 0;
  QueryTile* query_tiles = nullptr;
  int32_t* num_query_tiles = nullptr;
  float* dbias_sums = nullptr;
  float* dkey_bias_sums = nullptr;
  float* drelative_bias_sums = nullptr;
  float* relative_bias = nullptr;
  int32_t* tile_counter = nullptr;
  int32_t* program_counter = nullptr;
};

// How many sums a tile of dq has in the fused backward, as a power of 2 (Params::dq_sums_log2): so many that the blocks
// of keys of a head that run at the same time need not wait for one another. An estimate for an H100 with 512 queries,
// 16384 keys and head dim 128: a step takes 2 us, and so does a turn. With one sum, 8 of the 128 blocks of keys work,
// and the others wait.
inline int32_t dq_sums_log2(const WorkspaceNeeds& needs) {
  constexpr int64_t kMultiprocessors = 132;
  constexpr int32_t kMost = 5;  // one block of threads adds all sums of a tile in the end
  const int64_t splits = needs.gradient_splits.dk;
  const int64_t heads = std::min<int64_t>(heads_per_l2_group(needs, needs.head_dim), needs.batch * needs.num_kv_heads);
  const int64_t blocks = std::min(ceil_div(kMultiprocessors, heads * splits), ceil_div(needs.seqlen_k, kKeyBlock));
  const int64_t tiles_of_head =
      ceil_div(needs.seqlen_q, fused_backward_rows(static_cast<int>(needs.head_dim), false) * splits);
  const int64_t tiles = tiles_of_head * (needs.num_heads / needs.num_kv_heads);
  int32_t log2 = 0;
  while (log2 < kMost && 2 * (tiles << log2) <= blocks) ++log2;
  return log2;
}

// Takes the arrays for the sums of `count` splits of the keys, for sequences with fewest_queries ... most_queries
// queries. The longest one has needs.seqlen_q.
inline SplitParams take_splits(const WorkspaceNeeds& needs, int32_t count, int64_t fewest_queries, int64_t most_queries,
                               Workspace& workspace) {
  const int64_t rows = count > 1 ? count * needs.batch * needs.num_heads * std::min(most_queries, needs.seqlen_q) : 0;
  SplitParams splits{};
  splits.count = std::max(count, 1);
  splits.acc = workspace.take<float>(rows * needs.value_dim);
  splits.sums = workspace.take<SplitSum>(rows);
  splits.fewest_queries = static_cast<int32_t>(fewest_queries);
  splits.most_queries = static_cast<int32_t>(most_queries);
  return splits;
}

// Whether packed sequences differ so much in length that together they have fewer blocks of keys than `batch` times the
// longest: see gradient_tile in tile_scheduler.h. A sequence may end within a block.
inline bool finds_keys_by_offset(const WorkspaceNeeds& needs) {
  const int64_t of_all = needs.rows_k / kKeyBlock + needs.batch;
  return needs.is_packed && !needs.has_key_padding && of_all < needs.batch * ceil_div(needs.seqlen_k, kKeyBlock);
}

// How many entries the list of blocks of keys has (Params::num_listed_key_blocks).
inline int64_t listed_key_blocks(const WorkspaceNeeds& needs) {
  const int64_t blocks = finds_keys_by_offset(needs) ? needs.rows_k / kKeyBlock + needs.batch
                                                     : needs.batch * ceil_div(needs.seqlen_k, kKeyBlock);
  return blocks * needs.num_kv_heads * needs.gradient_splits.dk;
}

// Takes the pieces of the fused backward. Lists of masks and key ranks have as much room for each sequence as for the
// longest one. padded_rows: the rows of all row blocks of all heads
inline void take_fused_backward(const WorkspaceNeeds& needs, int64_t padded_rows, Workspace& workspace,
                                Pieces& pieces) {
  constexpr int64_t kPanel = 64, kSmallestTile = 64;
  if (sums_dq(needs)) {
    pieces.dq_sums_log2 = dq_sums_log2(needs);
    const int64_t rows = padded_rows << pieces.dq_sums_log2;
    pieces.dq_sums = workspace.take<float>(rows * ceil_div(needs.head_dim, kPanel) * kPanel);
    pieces.dq_turns = workspace.take<int32_t>(rows / kSmallestTile);
  }
  const int64_t key_blocks = ceil_div(needs.seqlen_k, kKeyBlock), splits = needs.gradient_splits.dk;
  pieces.key_blocks = workspace.take<KeyBlock>(listed_key_blocks(needs));
  if (needs.has_key_padding) pieces.key_ranks = workspace.take<int32_t>(needs.batch * (key_blocks + 1));
  if (needs.mask_entries == 0) return;
  const int64_t heads = needs.batch * needs.num_heads, tiles = ceil_div(needs.seqlen_q, kSmallestTile);
  pieces.mask_steps = workspace.take<StepInfo>(heads * key_blocks * splits * ceil_div(tiles, splits));
  if (sums_dq(needs)) pieces.mask_turns = workspace.take<int32_t>(heads * tiles * key_blocks);
}

// Takes the pieces that only backward has, except those for gradients of biases: parts of gradients, row statistics,
// and what the fused backward needs besides.
inline void take_backward(const WorkspaceNeeds& needs, Workspace& workspace, Pieces& pieces) {
  const GradientSplits& splits = needs.gradient_splits;
  const int64_t query_rows = splits.dq > 1 ? splits.dq * needs.batch_entries * needs.num_heads * needs.rows_q : 0;
  const int64_t key_rows = splits.dk > 1 ? splits.dk * needs.batch_entries * needs.num_kv_heads * needs.rows_k : 0;
  if (needs.wants_dquery) pieces.dq_parts = workspace.take<float>(query_rows * needs.head_dim);
  if (needs.wants_dkey) pieces.dk_parts = workspace.take<float>(key_rows * needs.head_dim);
  if (needs.wants_dvalue) pieces.dv_parts = workspace.take<float>(key_rows * needs.value_dim);
  // A sequence may end within a row block: see HeadSlice::padded_q_offset.
  pieces.row_blocks = static_cast<int32_t>(needs.is_packed ? needs.rows_q / kRowBlock + needs.batch
                                                           : ceil_div(needs.rows_q, kRowBlock));
  const int64_t padded_rows = needs.batch_entries * needs.num_heads * pieces.row_blocks * kRowBlock;
  pieces.lse_log2 = workspace.take<float>(padded_rows);
  pieces.delta = workspace.take<float>(padded_rows);
  if (is_fused_backward(needs)) take_fused_backward(needs, padded_rows, workspace, pieces);
}

// Divides a workspace into the pieces that a call needs. With a workspace that only counts, this gives the size. `tile`
// is that of the kernel for the gradient of a bias.
inline Pieces take_pieces(const WorkspaceNeeds& needs, BiasGradientTile tile, Workspace& workspace) {
  Pieces pieces;
  const bool runs_both = needs.splits.decode > 0 && needs.splits.large > 0;
  if (needs.splits.decode > 0)
    pieces.decode_splits =
        take_splits(needs, needs.splits.decode, 0, runs_both ? few_queries(needs) : kMaxRows, workspace);
  if (needs.splits.large == 0) return pieces;
  pieces.large_splits = take_splits(needs, needs.splits.large, few_queries(needs) + 1, kMaxRows, workspace);
  if (needs.has_key_padding) {
    pieces.valid_words = static_cast<int32_t>(ceil_div(needs.seqlen_k, kLargestBlock) * (kLargestBlock / 32));
    pieces.valid_keys = workspace.take<uint32_t>(needs.batch * pieces.valid_words);
  }
  if (needs.is_backward) take_backward(needs, workspace, pieces);
  if (needs.mask_entries != 0) {
    MaskParams& mask = pieces.mask;
    mask.query_words = static_cast<int32_t>(ceil_div(needs.seqlen_q, kLargestBlock) * (kLargestBlock / 32));
    mask.key_words = static_cast<int32_t>(ceil_div(needs.seqlen_k, kLargestBlock) * (kLargestBlock / 32));
    mask.map = workspace.take<uint8_t>(needs.mask_entries * mask.query_words * mask.key_words);
    mask.keys_of_query = workspace.take<uint32_t>(needs.mask_entries * needs.seqlen_q * mask.key_words);
    if (needs.is_backward)
      mask.queries_of_key = workspace.take<uint32_t>(needs.mask_entries * needs.seqlen_k * mask.query_words);
  }
  // If all sequences are about as long as the longest one, a list of their tiles would not pay for its launch.
  constexpr int64_t kLeastTileRows = 64;  // of all forward kernels
  const int64_t most_query_tiles = needs.rows_q / kLeastTileRows + needs.batch;
  const bool is_sparse = needs.batch * ceil_div(needs.seqlen_q, kLeastTileRows) > most_query_tiles;
  if (needs.is_packed && !needs.is_backward && (is_sparse || runs_both)) {
    pieces.most_query_tiles = static_cast<int32_t>(most_query_tiles);
    pieces.query_tiles = workspace.take<QueryTile>(most_query_tiles);
    pieces.num_query_tiles = workspace.take<int32_t>(1);
  }
  const BiasGradientSizes sizes = bias_gradient_sizes(needs, tile);
  if (needs.dbias_shape)
    pieces.dbias_sums = workspace.take<float>(sum_floats(plan_dense(sizes, needs.dbias_shape.value())));
  if (needs.wants_dkey_bias)
    pieces.dkey_bias_sums = workspace.take<float>(sum_floats(plan_dense(sizes, dkey_bias_shape(needs))));
  if (needs.wants_drelative_bias) pieces.drelative_bias_sums = workspace.take<float>(sum_floats(plan_relative(sizes)));
  if (needs.relative_bias_heads != 0)
    pieces.relative_bias = workspace.take<float>(needs.relative_bias_heads *
                                                 (needs.seqlen_q + needs.seqlen_k - 1 + 2 * kRelativeBiasMargin));
  if (needs.architecture == 90 && (is_fused_backward(needs) || !needs.is_backward))
    pieces.tile_counter = workspace.take<int32_t>(1);
  if (needs.architecture == 90 && needs.dbias_shape) pieces.program_counter = workspace.take<int32_t>(1);
  return pieces;
}

}  // namespace fused_attn::gpu
