// From AttentionParams to Params: converts sizes, divides the workspace into pieces, chooses the kernels, and launches
// them.
#include "attention.h"

#include <algorithm>
#include <string>
#include <utility>

#include "../common/philox.h"
#include "bias_gradient/plan.h"
#include "decode.h"
#include "kernels.h"
#include "mask_bits.h"
#include "merge_gradients.h"
#include "merge_splits.h"
#include "preparation.h"
#include "tiles.h"

namespace fused_attn::gpu {
namespace {

// The keys and values of all heads of an L2 group have about this many bytes (forward). With four times as many, all
// would fit into the L2 cache, but programs that share keys then start further apart. Measured on an H100, (32, 16,
// 512, 128): 8 MiB 491 TFLOP/s, 32 MiB 380. From 2048 keys on, both are equal.
constexpr int64_t kL2Bytes = 8 << 20;
// The same for backward: bytes of queries, keys, values and dout. The sums of dq take as many bytes again. Measured on
// an H100, (8, 16, 2048, 128): 20 MiB 490 TFLOP/s, 128 MiB 313. The fused backward reads keys and values once, so they
// count like those of as many keys as queries at most.
constexpr int64_t kBackwardL2Bytes = 12 << 20;

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

// The pieces of the workspace that a call needs. The other ones are null. Params says what each piece holds.
struct Pieces {
  uint32_t* valid_keys = nullptr;
  int32_t valid_words = 0;
  int32_t row_blocks = 0;
  float* lse_log2 = nullptr;
  float* delta = nullptr;
  int32_t dq_sums_log2 = 0;
  float* dq_sums = nullptr;
  float* dq_parts = nullptr;
  float* dk_parts = nullptr;
  float* dv_parts = nullptr;
  int32_t* dq_turns = nullptr;
  int32_t* key_ranks = nullptr;
  KeyBlock* key_blocks = nullptr;
  StepInfo* mask_steps = nullptr;
  int32_t* mask_turns = nullptr;
  int32_t* tile_counter = nullptr;
  int32_t* program_counter = nullptr;
  MaskParams mask{};
  QueryTile* query_tiles = nullptr;
  int32_t* num_query_tiles = nullptr;
  int32_t most_query_tiles = 0;
  float* relative_bias = nullptr;
  float* dbias_sums = nullptr;
  float* dkey_bias_sums = nullptr;
  float* drelative_bias_sums = nullptr;
  SplitParams decode_splits{};  // see KeySplits
  SplitParams large_splits{};
};

constexpr double kLog2EExact = 1.44269504088896340736;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether backward runs the fused kernel of sm_90a (sm90/fused_backward.h). A call may want none of the gradients that
// this kernel computes, for example only the gradient of a bias.
bool is_fused_backward(const WorkspaceNeeds& needs) {
  return needs.is_backward && (needs.wants_dquery || needs.wants_dkey || needs.wants_dvalue) &&
         needs.architecture == 90 && has_fused_backward(needs.head_dim);
}

// The heads that run side by side (Params::heads_per_l2_group). head_dim: that of the tensors
int32_t heads_per_l2_group(const WorkspaceNeeds& needs, int64_t head_dim) {
  const int64_t group_size = needs.num_heads / needs.num_kv_heads;
  const int64_t row_bytes = head_dim * 2 * 2, kv_bytes = std::max<int64_t>(needs.seqlen_k, 1) * row_bytes;
  const int64_t q_bytes = needs.seqlen_q * row_bytes;
  const int64_t once_read = is_fused_backward(needs) ? std::min(kv_bytes, q_bytes) : kv_bytes;
  const int64_t heads = needs.is_backward ? kBackwardL2Bytes / std::max<int64_t>(once_read + group_size * q_bytes, 1)
                                          : kL2Bytes * group_size / kv_bytes;
  return static_cast<int32_t>(std::clamp<int64_t>(heads, 1, needs.num_heads * needs.batch));
}

// How many sums a tile of dq has in the fused backward, as a power of 2 (Params::dq_sums_log2): so many that the blocks
// of keys of a head that run at the same time need not wait for one another. An estimate for an H100 with 512 queries,
// 16384 keys and head dim 128: a step takes 2 us, and so does a turn. With one sum, 8 of the 128 blocks of keys work,
// and the others wait.
int32_t dq_sums_log2(const WorkspaceNeeds& needs) {
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

BiasGradientSizes bias_gradient_sizes(const WorkspaceNeeds& needs, BiasGradientTile tile) {
  return {needs.batch, needs.num_heads, needs.seqlen_q, needs.seqlen_k, tile};
}

// If both kinds of forward kernels run, the decode kernels compute the sequences with at most this many queries, and
// the large kernels the others. 0 = the large kernels compute all of them.
int64_t few_queries(const WorkspaceNeeds& needs) {
  if (needs.splits.decode == 0) return 0;
  return kMaxDecodeTiles * kDecodeRows * needs.num_kv_heads / std::max<int64_t>(needs.num_heads, 1);
}

// Takes the arrays for the sums of `count` splits of the keys, for sequences with fewest_queries ... most_queries
// queries. The longest one has needs.seqlen_q.
SplitParams take_splits(const WorkspaceNeeds& needs, int32_t count, int64_t fewest_queries, int64_t most_queries,
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

// The shape of the gradient of a key bias: that of a dense bias that heads and queries share.
std::array<int64_t, 4> dkey_bias_shape(const WorkspaceNeeds& needs) { return {needs.batch, 1, 1, needs.seqlen_k}; }

// Divides a workspace into the pieces that a call needs. With a workspace that only counts, this gives the size. `tile`
// is that of the kernel for the gradient of a bias.
Pieces take_pieces(const WorkspaceNeeds& needs, BiasGradientTile tile, Workspace& workspace) {
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
  const bool is_fused = is_fused_backward(needs);
  const GradientSplits& splits = needs.gradient_splits;
  if (needs.is_backward) {
    const int64_t query_rows = splits.dq > 1 ? splits.dq * needs.batch_entries * needs.num_heads * needs.rows_q : 0;
    const int64_t key_rows = splits.dk > 1 ? splits.dk * needs.batch_entries * needs.num_kv_heads * needs.rows_k : 0;
    if (needs.wants_dquery) pieces.dq_parts = workspace.take<float>(query_rows * needs.head_dim);
    if (needs.wants_dkey) pieces.dk_parts = workspace.take<float>(key_rows * needs.head_dim);
    if (needs.wants_dvalue) pieces.dv_parts = workspace.take<float>(key_rows * needs.value_dim);
    // A sequence may end within a row block: see HeadSlice::padded_q_offset.
    pieces.row_blocks = static_cast<int32_t>(needs.is_packed ? needs.rows_q / kRowBlock + needs.batch
                                                             : ceil_div(needs.rows_q, kRowBlock));
    const int64_t all_blocks = needs.batch_entries * needs.num_heads * pieces.row_blocks;
    pieces.lse_log2 = workspace.take<float>(all_blocks * kRowBlock);
    pieces.delta = workspace.take<float>(all_blocks * kRowBlock);
    if (is_fused) {
      constexpr int64_t kPanel = 64, kSmallestTile = 64;
      if (needs.wants_dquery) {
        pieces.dq_sums_log2 = dq_sums_log2(needs);
        const int64_t rows = all_blocks * kRowBlock << pieces.dq_sums_log2;
        pieces.dq_sums = workspace.take<float>(rows * ceil_div(needs.head_dim, kPanel) * kPanel);
        pieces.dq_turns = workspace.take<int32_t>(rows / kSmallestTile);
      }
      const int64_t key_blocks = ceil_div(needs.seqlen_k, kKeyBlock);
      pieces.key_blocks = workspace.take<KeyBlock>(needs.batch * needs.num_kv_heads * key_blocks * splits.dk);
      if (needs.has_key_padding) pieces.key_ranks = workspace.take<int32_t>(needs.batch * (key_blocks + 1));
      if (needs.mask_entries != 0) {
        // Each sequence gets as much room as the longest one.
        const int64_t heads = needs.batch * needs.num_heads, tiles = ceil_div(needs.seqlen_q, kSmallestTile);
        pieces.mask_steps = workspace.take<StepInfo>(heads * key_blocks * splits.dk * ceil_div(tiles, splits.dk));
        if (needs.wants_dquery) pieces.mask_turns = workspace.take<int32_t>(heads * tiles * key_blocks);
      }
    }
  }
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
  if (needs.wants_dbias) pieces.dbias_sums = workspace.take<float>(sum_floats(plan_dense(sizes, needs.dbias_shape)));
  if (needs.wants_dkey_bias)
    pieces.dkey_bias_sums = workspace.take<float>(sum_floats(plan_dense(sizes, dkey_bias_shape(needs))));
  if (needs.wants_drelative_bias) pieces.drelative_bias_sums = workspace.take<float>(sum_floats(plan_relative(sizes)));
  if (needs.relative_bias_heads != 0)
    pieces.relative_bias = workspace.take<float>(needs.relative_bias_heads *
                                                 (needs.seqlen_q + needs.seqlen_k - 1 + 2 * kRelativeBiasMargin));
  if (needs.architecture == 90 && (is_fused || !needs.is_backward)) pieces.tile_counter = workspace.take<int32_t>(1);
  if (needs.architecture == 90 && needs.wants_dbias) pieces.program_counter = workspace.take<int32_t>(1);
  return pieces;
}

// A tensor of AttentionParams in the type that the kernels read.
Rows rows_of(const TensorView& x, int64_t columns) {
  return {x.data, x.stride_batch, x.stride_head, x.stride_row, static_cast<int32_t>(columns)};
}

ScoreTensor scores_of(const TensorView& x) {
  return {x.data, x.stride_batch, x.stride_head, x.stride_row, x.stride_col};
}

MaskSource mask_source_of(const AttentionParams& a) {
  const TensorView& x = a.key_ranges;
  return {scores_of(a.mask),
          {static_cast<const int32_t*>(x.data), x.stride_batch, x.stride_head, x.stride_row,
           static_cast<int32_t>(a.num_ranges)}};
}

RowValues values_of(const TensorView& x) {
  return {static_cast<float*>(x.data), x.stride_batch, x.stride_head, x.stride_row};
}

// Where Philox begins to number the entries of the scores.
DropoutOrigin dropout_origin_of(const AttentionParams& a) {
  const fused_attn::DropoutOrigin& x = a.dropout_origin;
  return {static_cast<int32_t>(x.batch), static_cast<int32_t>(x.head), static_cast<int32_t>(x.query),
          static_cast<int32_t>(x.key / kPhiloxKeys)};
}

// Whether the masks of the caller differ among batch entries, and among heads.
bool mask_has_batch(const AttentionParams& a) { return a.mask.stride_batch != 0 || a.key_ranges.stride_batch != 0; }
bool mask_has_heads(const AttentionParams& a) { return a.mask.stride_head != 0 || a.key_ranges.stride_head != 0; }

// How many different masks (batch entry, head) the dense mask and the ranges of keys make; 0 without both.
int64_t mask_entries(const AttentionParams& a) {
  if (a.mask.data == nullptr && a.key_ranges.data == nullptr) return 0;
  return (mask_has_batch(a) ? a.batch : 1) * (mask_has_heads(a) ? a.num_heads : 1);
}

// Whether the blocks of threads of forward need a counter to share the tiles of queries evenly (Params::tile_counter).
// Each tile has large_splits programs.
// They need none if all tiles take equally long, or if each block has one tile at most. The counter has to be reset,
// and without other work for the preparation kernel this takes a launch.
bool shares_tiles(const AttentionParams& a, int64_t large_splits) {
  const bool has_equal_tiles = a.band_left == kUnbounded && a.band_right == kUnbounded && a.cu_seqlens_q == nullptr &&
                               a.key_padding.data == nullptr && a.key_lengths == nullptr && mask_entries(a) == 0;
  return !has_equal_tiles &&
         ceil_div(a.seqlen_q, kLeastForwardRowsSm90) * a.num_heads * a.batch * large_splits > num_multiprocessors();
}

// How many heads the relative bias has: 0 without one, 1 if all heads share it.
int64_t relative_bias_heads(const AttentionParams& a) {
  if (a.relative_bias.data == nullptr) return 0;
  return a.relative_bias.stride_head == 0 ? 1 : a.num_heads;
}

// What happens to scores in this call. `relative_bias` is the piece of the workspace with the padded copy.
LogitParams logits_of(const AttentionParams& a, const float* relative_bias) {
  LogitParams x{};
  // LazySoftmax takes the largest score of a row as its reference, which is right only if the scale is positive. With
  // another scale, to_logits multiplies the scores by the scale first.
  const bool is_scale_positive = static_cast<float>(a.scale) > 0.0f;
  x.is_plain = is_scale_positive && a.softcap == 0.0 && a.relative_bias.data == nullptr && a.key_bias.data == nullptr &&
               a.bias.data == nullptr;
  if (a.softcap != 0.0) {
    const double softcap = std::clamp(a.softcap, 1e-30, 1e30);  // a float, and so is the quotient
    x.softcap_scale = static_cast<float>(a.scale / softcap);
    x.softcap = static_cast<float>(softcap);
  }
  if (relative_bias != nullptr) {
    const int64_t stride_head = a.seqlen_q + a.seqlen_k - 1 + 2 * kRelativeBiasMargin;
    x.relative_bias = relative_bias + kRelativeBiasMargin;
    x.relative_bias_stride_head = a.relative_bias.stride_head == 0 ? 0 : stride_head;
  }
  x.key_bias = static_cast<const float*>(a.key_bias.data);
  x.key_bias_stride_batch = a.key_bias.stride_batch;
  x.bias = scores_of(a.bias);
  x.is_bias_float = a.bias_dtype == DType::kFloat32;
  x.has_bias_rows = !x.is_bias_float && has_aligned_groups(a.bias, a.seqlen_k, 8, 16);
  x.has_bias_pairs = x.is_bias_float && has_aligned_groups(a.bias, a.seqlen_k, 2, 8);
  return x;
}

// The parts of a gradient (batch entries, heads, rows, columns), which lie one after another in `piece`.
GradientParts parts_of(float* piece, int32_t num_splits, int64_t entries, int64_t heads, int64_t rows,
                       int64_t columns) {
  if (num_splits == 1) return {};
  const int64_t stride_head = rows * columns, stride_batch = heads * stride_head;
  return {{piece, entries == 1 ? 0 : stride_batch, stride_head, columns, static_cast<int32_t>(columns)},
          entries * stride_batch};
}

// Fills in Params: sizes in 32 bits, tensors, and pieces of the workspace.
Params params_of(const Call& call, const WorkspaceNeeds& needs, const Pieces& pieces) {
  const AttentionParams& a = call.params;
  Params p{};
  p.batch = static_cast<int32_t>(a.batch);
  p.num_heads = static_cast<int32_t>(a.num_heads);
  p.group_size = static_cast<int32_t>(a.num_heads / a.num_kv_heads);
  p.seqlen_q = static_cast<int32_t>(a.seqlen_q);
  p.seqlen_k = static_cast<int32_t>(a.seqlen_k);
  p.rows_q = static_cast<int32_t>(call.rows_q);
  p.rows_k = static_cast<int32_t>(call.rows_k);
  p.heads_per_l2_group = heads_per_l2_group(needs, a.head_dim);
  p.q = rows_of(a.query, a.head_dim);
  p.k = rows_of(a.key, a.head_dim);
  p.v = rows_of(a.value, a.value_dim);
  p.out = rows_of(a.out, a.value_dim);
  p.lse = values_of(a.lse);
  p.row_max = values_of(a.row_max);
  p.scale = static_cast<float>(a.scale);
  p.scale_log2 = static_cast<float>(a.scale * kLog2EExact);
  p.logits = logits_of(a, pieces.relative_bias);
  p.softmax_scale = p.logits.is_plain ? p.scale : 1.0f;
  p.softmax_scale_log2 = p.logits.is_plain ? p.scale_log2 : kLog2E;
  p.mask = pieces.mask;
  p.mask.entries_per_head = mask_has_heads(a) ? 1 : 0;
  p.mask.entries_per_batch = mask_has_batch(a) ? static_cast<int32_t>(mask_has_heads(a) ? a.num_heads : 1) : 0;
  p.sinks = static_cast<const float*>(a.sinks.data);
  p.first_diagonal = static_cast<int32_t>(std::clamp<int64_t>(a.band_offset - a.band_left, -kMaxRows, kMaxRows));
  p.last_diagonal = static_cast<int32_t>(std::clamp<int64_t>(a.band_offset + a.band_right, -kMaxRows, kMaxRows));
  p.band_from_end = a.band_from_end;
  p.cu_seqlens_q = a.cu_seqlens_q;
  p.cu_seqlens_k = a.cu_seqlens_k;
  p.pages = {a.block_table, a.block_table_stride, static_cast<int32_t>(a.page_size), static_cast<int32_t>(a.num_pages)};
  p.key_lengths = a.key_lengths;
  p.query_tiles = pieces.query_tiles;
  p.num_query_tiles = pieces.num_query_tiles;
  p.splits = pieces.large_splits;
  p.valid_keys = pieces.valid_keys;
  p.valid_words = pieces.valid_words;
  p.dropout_seed = a.has_dropout ? a.dropout_seed_data : nullptr;
  p.dropout_threshold = a.dropout_threshold;
  p.dropout_scale = static_cast<float>(a.dropout_scale);
  p.dropout_origin = dropout_origin_of(a);
  p.dout = rows_of(a.dout, a.value_dim);
  p.dlse = values_of(a.dlse);
  p.dq = rows_of(a.dquery, a.head_dim);
  p.dk = rows_of(a.dkey, a.head_dim);
  p.dv = rows_of(a.dvalue, a.value_dim);
  p.dsinks = static_cast<float*>(a.dsinks.data);
  p.dq_splits = needs.gradient_splits.dq;
  p.dk_splits = needs.gradient_splits.dk;
  p.dq_parts = parts_of(pieces.dq_parts, p.dq_splits, call.batch_entries, a.num_heads, call.rows_q, a.head_dim);
  p.dk_parts = parts_of(pieces.dk_parts, p.dk_splits, call.batch_entries, a.num_kv_heads, call.rows_k, a.head_dim);
  p.dv_parts = parts_of(pieces.dv_parts, p.dk_splits, call.batch_entries, a.num_kv_heads, call.rows_k, a.value_dim);
  p.row_blocks = pieces.row_blocks;
  const int64_t stride_head = int64_t{p.row_blocks} * kRowBlock;
  const int64_t stride_batch = a.cu_seqlens_q != nullptr ? 0 : a.num_heads * stride_head;
  p.lse_log2 = {pieces.lse_log2, stride_batch, stride_head, 1};
  p.delta = {pieces.delta, stride_batch, stride_head, 1};
  p.dq_sums_log2 = pieces.dq_sums_log2;
  p.dq_sums = pieces.dq_sums;
  p.dq_turns = pieces.dq_turns;
  p.key_ranks = pieces.key_ranks;
  p.key_blocks = pieces.key_blocks;
  p.mask_steps = pieces.mask_steps;
  p.mask_turns = pieces.mask_turns;
  p.num_key_blocks = static_cast<int32_t>(ceil_div(a.seqlen_k, kKeyBlock));
  const int64_t entries = a.batch * p.num_key_blocks, entries_by_offset = call.rows_k / kKeyBlock + a.batch;
  p.lists_key_blocks_by_offset =
      a.cu_seqlens_k != nullptr && a.key_padding.data == nullptr && entries_by_offset < entries;
  if (pieces.key_blocks != nullptr) {
    const int64_t listed = (p.lists_key_blocks_by_offset ? entries_by_offset : entries) * a.num_kv_heads * p.dk_splits;
    if (listed >= int64_t{1} << 31) throw std::length_error("the problem needs more blocks than a grid may have");
    p.num_listed_key_blocks = static_cast<int32_t>(listed);
  }
  if (pieces.tile_counter != nullptr && (needs.is_backward || shares_tiles(a, p.splits.count)))
    p.tile_counter = pieces.tile_counter;
  p.program_counter = pieces.program_counter;
  return p;
}

using Launcher = void (*)(const Params&, bool, Stream);

// The launchers for one architecture, and for heads of up to head_dim columns in queries and keys, and of up to
// value_dim columns in values.
struct KernelSet {
  int architecture;
  int head_dim;
  int value_dim;
  Launcher forward;
  int forward_rows[2];  // the rows of a tile of queries in the plain forward kernel, and in the general one
  Launcher backward;
  BiasGradientLauncher bias_gradient;
  BiasGradientTile bias_gradient_tile;
  void (*decode)(const Params&, const DecodeParams&, bool, Stream);
};

// The decode kernel for a head dim: there is none for 192.
template <int kHeadDim>
constexpr int kDecodeHeadDim = kHeadDim == 192 ? 256 : kHeadDim;

// The kernels that an architecture has for these head dims.
template <int kHeadDim, int kValueDim = kHeadDim>
constexpr KernelSet sm80_kernels() {
  using BiasTile = BiasGradientTileSm80<kHeadDim>;
  return {80,
          kHeadDim,
          kValueDim,
          sm80::launch_forward<kHeadDim, kValueDim>,
          {ForwardTileSm80<kHeadDim>::kBlockM, ForwardTileSm80<kHeadDim>::kBlockM},
          sm80::launch_backward<kHeadDim, kValueDim>,
          sm80::launch_bias_gradient<kHeadDim, kValueDim>,
          {BiasTile::kBlockM, BiasTile::kBlockN},
          launch_decode<kDecodeHeadDim<kHeadDim>>};
}
template <int kHeadDim, int kValueDim = kHeadDim>
constexpr KernelSet sm90_kernels() {
  using BiasTile = BiasGradientTileSm90<kHeadDim>;
  return {90,
          kHeadDim,
          kValueDim,
          sm90::launch_forward<kHeadDim, kValueDim>,
          {kForwardRowsSm90<kHeadDim, false>, kForwardRowsSm90<kHeadDim, true>},
          sm90::launch_backward<kHeadDim, kValueDim>,
          sm90::launch_bias_gradient<kHeadDim, kValueDim>,
          {BiasTile::kBlockM, BiasTile::kBlockN},
          launch_decode<kDecodeHeadDim<kHeadDim>>};
}

// CMake can leave an architecture out.
constexpr KernelSet kKernelSets[] = {
#ifndef FUSED_ATTN_WITHOUT_SM80
    sm80_kernels<64>(), sm80_kernels<96>(), sm80_kernels<128>(), sm80_kernels<192, 128>(), sm80_kernels<256>(),
#endif
#ifndef FUSED_ATTN_WITHOUT_SM90
    sm90_kernels<64>(), sm90_kernels<96>(), sm90_kernels<128>(), sm90_kernels<192, 128>(), sm90_kernels<256>(),
#endif
};

// The first kernels that queries and values fit into, and so the smallest ones. Columns beyond the tensors' own are
// zeros.
const KernelSet& kernels_for(int architecture, int64_t head_dim, int64_t value_dim) {
  for (const KernelSet& set : kKernelSets) {
    if (set.architecture == architecture && set.head_dim >= head_dim && set.value_dim >= value_dim) return set;
  }
  throw std::invalid_argument("no kernel for head dims " + std::to_string(head_dim) + " and " +
                              std::to_string(value_dim) + " on sm_" + std::to_string(architecture));
}

// The jobs of the preparation kernel in this call. No job has blocks of threads if there is nothing to prepare.
PreparationParams preparation_of(const AttentionParams& a, const Params& p, const Pieces& pieces,
                                 const KernelSet& kernels, bool is_backward) {
  PreparationParams jobs{};
  int64_t total = 0;
  const auto blocks_for = [&total](int64_t work, int64_t work_of_block) {
    const int64_t blocks = ceil_div(work, work_of_block);
    total += blocks;
    if (total >= int64_t{1} << 31) throw std::length_error("the problem needs more blocks than a grid may have");
    return static_cast<int32_t>(blocks);
  };
  if (a.key_padding.data != nullptr) {
    jobs.padding = {static_cast<const uint8_t*>(a.key_padding.data), a.key_padding.stride_batch,
                    a.key_padding.stride_col, pieces.valid_keys, pieces.key_ranks};
    jobs.padding_blocks = blocks_for(a.batch, 1);
  }
  if (a.relative_bias.data != nullptr) {
    jobs.relative_bias = {static_cast<const float*>(a.relative_bias.data), a.relative_bias.stride_head,
                          relative_bias_heads(a), a.seqlen_q + a.seqlen_k - 1, pieces.relative_bias};
    jobs.relative_bias_blocks = blocks_for(
        jobs.relative_bias.heads * (jobs.relative_bias.columns + 2 * kRelativeBiasMargin), kPreparationThreads);
  }
  if (mask_entries(a) != 0) {
    jobs.mask = mask_source_of(a);
    jobs.mask_blocks = blocks_for(warps_of_mask(p.mask, mask_entries(a)), kPreparationWarps);
  }
  if (pieces.query_tiles != nullptr) {
    jobs.query_tiles = {kernels.forward_rows[is_general_forward(p)], p.splits.fewest_queries, pieces.most_query_tiles,
                        pieces.query_tiles, pieces.num_query_tiles};
    jobs.query_tile_blocks = blocks_for(1, 1);
  }
  // Row statistics lie in whole row blocks, up to the end of the last one.
  if (is_backward)
    jobs.row_blocks = blocks_for(ceil_div(a.seqlen_q, kRowBlock) * kRowBlock * a.num_heads * a.batch, kPreparationRows);
  return jobs;
}

// The most blocks of keys of a batch entry that are listed by the block of threads that has packed its padding. It
// lists 128 at a time, and each pass waits for loads. For more, a second launch is estimated to be faster. Neither has
// been measured.
constexpr int64_t kMostListedWithPadding = 2048;

// Launches the preparation kernel, if the large kernels of this call need anything that it makes.
void prepare(const AttentionParams& a, const Params& p, const Pieces& pieces, const KernelSet& kernels,
             bool is_backward, Stream stream) {
  PreparationParams jobs = preparation_of(a, p, pieces, kernels, is_backward);
  const auto run = [&](const Params& params, const PreparationParams& what) {
    const int blocks =
        what.padding_blocks + what.relative_bias_blocks + what.mask_blocks + what.query_tile_blocks + what.row_blocks;
    if (blocks == 0 && p.tile_counter == nullptr) return;
    const LaunchShape shape{std::max(blocks, 1), 1, 1, kPreparationThreads, 0};
    const bool has_large_tiles = fused_backward_rows(kernels.head_dim, is_general_backward(p)) == 128;
    for_variant(a.dtype == DType::kBFloat16, has_large_tiles, [&](auto type, auto is_large) {
      run_kernel(preparation_kernel < decltype(type), is_large() ? 128 : 64 >, shape, stream, params, what);
    });
  };
  const int64_t key_blocks = int64_t{p.num_heads / p.group_size} * p.num_key_blocks * p.dk_splits;  // of a batch entry
  if (jobs.padding_blocks > 0 && p.key_blocks != nullptr && key_blocks > kMostListedWithPadding) {
    Params without_list = p;
    without_list.key_blocks = nullptr;
    PreparationParams packing{};
    std::swap(packing.padding, jobs.padding);
    std::swap(packing.padding_blocks, jobs.padding_blocks);
    run(without_list, packing);
  }
  run(p, jobs);
}

// The arguments of the decode kernels besides Params. Changes `p` where these kernels read what the caller has given,
// and not what preparation kernels have made of it, and to the longest sequence that they compute.
DecodeParams decode_params_of(const AttentionParams& a, const Pieces& pieces, Params& p) {
  DecodeParams d{};
  p.splits = pieces.decode_splits;
  p.seqlen_q = std::min(p.seqlen_q, p.splits.most_queries);
  // The kernels find diagonal 0 in column seqlen_q - 1. The bias of the caller has it in column a.seqlen_q - 1.
  p.logits.relative_bias = static_cast<const float*>(a.relative_bias.data);
  if (p.logits.relative_bias != nullptr) p.logits.relative_bias += a.seqlen_q - p.seqlen_q;
  p.logits.relative_bias_stride_head = a.relative_bias.stride_head;
  d.row_tiles = static_cast<int32_t>(ceil_div(int64_t{p.seqlen_q} * p.group_size, kDecodeRows));
  d.padding = static_cast<const uint8_t*>(a.key_padding.data);
  d.padding_stride_batch = a.key_padding.stride_batch;
  d.padding_stride_key = a.key_padding.stride_col;
  d.mask = mask_source_of(a);
  return d;
}

// Throws if the kernels that are about to run would ignore an argument. The Python backend makes no such call.
void check_kernels(const AttentionParams& a, const WorkspaceNeeds& needs) {
  const KeySplits& splits = needs.splits;
  const std::string numbers = std::to_string(splits.decode) + " and " + std::to_string(splits.large);
  if (splits.decode == 0 && splits.large == 0)
    throw std::invalid_argument("decode_splits, large_splits: expected one above 0, got " + numbers);
  if (splits.decode > 0 && splits.large > 0 && a.cu_seqlens_q == nullptr)
    throw std::invalid_argument("decode_splits, large_splits: expected both above 0 for packed calls only, got " +
                                numbers);
  if (splits.decode > 0 && (a.has_dropout || a.key_bias.data != nullptr || a.row_max.data != nullptr))
    throw std::invalid_argument("decode_splits: expected 0 with dropout, key_bias or row_max, got " +
                                std::to_string(splits.decode));
  if (needs.is_backward && a.block_table != nullptr)
    throw std::invalid_argument("block_table: expected None in backward, got a tensor");
  if (is_fused_backward(needs) && needs.gradient_splits.dq > 1)
    throw std::invalid_argument("dq_splits: expected 1 for the fused backward, got " +
                                std::to_string(needs.gradient_splits.dq));
}

// Checks the sizes of a call, and launches its kernels in order: preparation, forward or backward, gradients of biases
// and sinks. All run on the caller's stream.
void run(const Call& of_caller, bool is_backward) {
  const Call& call = on_device(of_caller);
  const AttentionParams& a = call.params;
  const KernelSet& kernels = kernels_for(call.architecture, a.head_dim, a.value_dim);
  const DeviceGuard guard(call.device);
  if (std::max({a.seqlen_q, a.seqlen_k, call.rows_q, call.rows_k}) > kMaxRows)
    throw std::invalid_argument("more than " + std::to_string(kMaxRows) + " rows");
  if (is_backward && a.cu_seqlens_q != nullptr &&
      a.batch > kMaxRows / kRowBlock)  // each may begin a row block of its own
    throw std::invalid_argument("more than " + std::to_string(kMaxRows / kRowBlock) + " packed sequences");
  WorkspaceNeeds needs;
  needs.architecture = call.architecture;
  needs.is_backward = is_backward;
  needs.wants_dquery = a.dquery.data != nullptr;
  needs.wants_dkey = a.dkey.data != nullptr;
  needs.wants_dvalue = a.dvalue.data != nullptr;
  needs.batch = a.batch;
  needs.batch_entries = call.batch_entries;
  needs.num_heads = a.num_heads;
  needs.num_kv_heads = a.num_kv_heads;
  needs.rows_q = call.rows_q;
  needs.rows_k = call.rows_k;
  needs.seqlen_k = a.seqlen_k;
  needs.head_dim = kernels.head_dim;
  needs.is_packed = a.cu_seqlens_q != nullptr;
  needs.has_key_padding = a.key_padding.data != nullptr;
  needs.seqlen_q = a.seqlen_q;
  needs.relative_bias_heads = relative_bias_heads(a);
  needs.mask_entries = mask_entries(a);
  needs.wants_dbias = a.dbias.data != nullptr;
  needs.dbias_shape[0] = a.dbias.stride_batch == 0 ? 1 : a.batch;
  needs.dbias_shape[1] = a.dbias.stride_head == 0 ? 1 : a.num_heads;
  needs.dbias_shape[2] = a.dbias.stride_row == 0 ? 1 : a.seqlen_q;
  needs.dbias_shape[3] = a.dbias.stride_col == 0 ? 1 : a.seqlen_k;
  needs.wants_dkey_bias = a.dkey_bias.data != nullptr;
  needs.wants_drelative_bias = a.drelative_bias.data != nullptr;
  needs.splits = call.splits;
  needs.gradient_splits = call.gradient_splits;
  needs.value_dim = a.value_dim;
  if (const int64_t bytes = workspace_bytes(needs); call.workspace_bytes < bytes)
    throw std::invalid_argument("workspace: expected at least " + std::to_string(bytes) + " bytes, got " +
                                std::to_string(call.workspace_bytes));
  check_kernels(a, needs);
  Workspace workspace(call.workspace);
  const Pieces pieces = take_pieces(needs, kernels.bias_gradient_tile, workspace);
  const Params params = params_of(call, needs, pieces);
  const bool is_bf16 = a.dtype == DType::kBFloat16;
  if (needs.splits.decode > 0) {
    Params few = params;
    const DecodeParams decode = decode_params_of(a, pieces, few);
    kernels.decode(few, decode, is_bf16, call.stream);
    merge_splits(few, is_bf16, call.stream);
    if (needs.splits.large == 0) return;
  }
  prepare(a, params, pieces, kernels, is_backward, call.stream);
  if (!is_backward) {
    kernels.forward(params, is_bf16, call.stream);
    merge_splits(params, is_bf16, call.stream);
    return;
  }
  kernels.backward(params, is_bf16, call.stream);
  for (const bool is_of_queries : {true, false}) merge_gradients(params, is_of_queries, is_bf16, call.stream);
  // These kernels come after those of backward, because they read the row statistics.
  const BiasGradientSizes sizes = bias_gradient_sizes(needs, kernels.bias_gradient_tile);
  if (needs.wants_dbias) {
    BiasGradientParams plan = plan_dense(sizes, needs.dbias_shape);
    plan.is_dense_bias = true;
    plan.program_counter = pieces.program_counter;
    sum_dense(params, plan, a.dbias, a.dbias_dtype, needs.dbias_shape, pieces.dbias_sums, kernels.bias_gradient,
              is_bf16, call.stream);
  }
  if (needs.wants_dkey_bias)
    sum_dense(params, plan_dense(sizes, dkey_bias_shape(needs)), a.dkey_bias, DType::kFloat32, dkey_bias_shape(needs),
              pieces.dkey_bias_sums, kernels.bias_gradient, is_bf16, call.stream);
  if (needs.wants_drelative_bias)
    sum_relative(params, plan_relative(sizes), sizes.tile, a.drelative_bias, pieces.drelative_bias_sums,
                 kernels.bias_gradient, is_bf16, call.stream);
  if (a.dsinks.data != nullptr) sum_sinks(params, call.stream);
}

}  // namespace

int64_t workspace_bytes(WorkspaceNeeds needs) {
  Workspace workspace(nullptr);
  const KernelSet& kernels = kernels_for(needs.architecture, needs.head_dim, needs.value_dim);
  needs.head_dim = kernels.head_dim;
  take_pieces(needs, kernels.bias_gradient_tile, workspace);
  return workspace.bytes();
}

std::string unusable_reason(int device) {
  try {
    const DeviceGuard guard(device);
    check_loadable(preparation_kernel<f16_t, kRowBlock>);
    return "";
  } catch (const LastingError& error) {
    return error.what();
  }
}

bool runs_on_cpu() { return kRunsOnCpu; }

void forward(const Call& call) { run(call, false); }
void backward(const Call& call) { run(call, true); }

}  // namespace fused_attn::gpu
