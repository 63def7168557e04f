// The arguments of kernels: AttentionParams in the types that a GPU computes with. attention.cu fills them in.
#pragma once
#include <cstdint>

namespace fused_attn::gpu {

// No tensor has more rows. Diagonals are clamped to this number, so that a row can be added to a diagonal in 32 bits.
constexpr int32_t kMaxRows = 1 << 29;

// What backward stores of queries lies in whole blocks of this many rows. So bulk copies start at aligned rows, and
// need not ask where a sequence ends.
constexpr int32_t kRowBlock = 128;

// The number of keys whose gradients one block of the fused backward sums. Their padding is looked at together.
constexpr int32_t kKeyBlock = 128;

// A tensor (batch, head, row, column) of 16-bit numbers. Columns lie side by side, rows are aligned to 16 bytes, and
// strides count elements. The number of columns is a multiple of 8. A kernel for a larger head dim takes the missing
// columns as zeros, and does not store them.
struct Rows {
  void* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
  int32_t columns;
};

// One float for each query: (batch, head, row). Rows lie side by side unless said otherwise.
struct RowValues {
  float* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

// A tensor that broadcasts to the scores (batch, head, query, key). The stride of a broadcast dimension is 0, and any
// dimension may have any stride. Strides count elements.
struct ScoreTensor {
  const void* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_query;
  int64_t stride_key;
};

// What happens to a score between the two products, besides the scale (logits.h).
struct LogitParams {
  bool is_plain;        // nothing: the softmax multiplies the scale in
  float softcap_scale;  // scale / softcap
  float softcap;        // 0 = no softcap
  // (H or 1, columns), with kRelativeBiasMargin zeros at both ends. The bias of query i and key j is
  // column j - i + seqlen_q - 1, not counting the margin. Null = none.
  const float* relative_bias;
  int64_t relative_bias_stride_head;
  ScoreTensor bias;    // null data = none
  bool is_bias_float;  // float; otherwise the type of the query
  bool has_bias_rows;  // the type of the query, and eight neighbouring keys of a query can be read at once
};

// A dense mask as bits, in words of 32 (mask_bits.h). An entry is a pair of a batch entry and a head. Null = no mask.
struct MaskParams {
  uint32_t* keys_of_query;    // (entries, L, key_words): bit j % 32 of word j / 32 is set if the query sees key j
  uint32_t* queries_of_key;   // (entries, S, query_words): the transpose; null in forward
  uint8_t* map;               // (entries, query_words, key_words): what 32 x 32 entries hold, see MaskContents
  int32_t entries_per_batch;  // how many entries further on the next batch entry lies; 0 = broadcast
  int32_t entries_per_head;   // likewise the next head
  int32_t key_words;          // the words reach to the end of the largest block
  int32_t query_words;
};

// Kernels read a relative bias also for rows of a block that do not exist, at up to this many columns past its ends.
constexpr int32_t kRelativeBiasMargin = 256;

// What a block of the fused backward works on: a block of keys of one head, and the tiles of queries that see these
// keys.
struct alignas(16) KeyBlock {
  int32_t number;    // number of the block within its sequence
  int32_t batch;     // index of the sequence
  int32_t head;      // the first query head of the head group
  int32_t kv_head;   // index of the key head
  int32_t q_offset;  // these five are fields of HeadSlice
  int32_t seqlen_q;
  int32_t padded_q_offset;
  int32_t k_offset;
  int32_t seqlen_k;
  int32_t begin;       // the first tile of queries that sees the block
  int32_t end;         // one past the last tile that does
  int32_t full_begin;  // the first tile whose queries all see all keys
  int32_t full_end;    // one past the last such tile
  int32_t rank_after;  // how many blocks up to this one, and with this one, have a valid key
  int32_t steps;       // the number of tiles to visit, over all heads of the group
  int32_t unused;
  uint32_t valid[kKeyBlock / 32];  // one bit for each key: the key is valid
};

struct PaddingParams {
  const uint8_t* padding;  // (B, S), nonzero = padding; null = none
  int64_t stride_batch;
  int64_t stride_key;
  uint32_t* valid_keys;  // (B, valid_words), output: see Params
  int32_t* key_ranks;    // (B, num_key_blocks + 1), output: see Params; null = not wanted
};

struct RelativeBiasParams {
  const float* bias;  // (heads, columns)
  int64_t stride_head;
  int64_t heads;    // H, or 1 for all
  int64_t columns;  // L + S - 1
  float* padded;    // output: LogitParams::relative_bias, from the beginning of the margin on
};

// Packed (varlen) problems: tensors have one batch entry (stride_batch is 0), and row r of sequence b lies at
// cu_seqlens[b] + r.
struct Params {
  int32_t batch;               // B, or the number of sequences
  int32_t num_heads;           // H
  int32_t group_size;          // H / Hkv: query head h reads key head h / group_size
  int32_t seqlen_q;            // L, or the longest
  int32_t seqlen_k;            // S, or the longest
  int32_t rows_q;              // rows of the tensors: L, or the total when packed
  int32_t rows_k;              // S, or the total when packed
  int32_t heads_per_l2_group;  // heads that run side by side, so that their tensors stay in the L2 cache

  Rows q;         // (B, H, L, D)
  Rows k;         // (B, Hkv, S, D)
  Rows v;         // (B, Hkv, S, Dv)
  Rows out;       // (B, H, L, Dv)
  RowValues lse;  // (B, H, L), natural logarithm; null data = not wanted

  float scale;
  float scale_log2;  // scale * log2(e)
  // The softmax takes its scores times this factor as logits, and as exponents of 2. If a LogitParams has made logits of
  // the scores, the factors are 1 and log2(e).
  float softmax_scale;
  float softmax_scale_log2;
  LogitParams logits;
  MaskParams mask;
  const float* sinks;      // (H): a logit that joins the denominator of the softmax; null = none
  int32_t first_diagonal;  // key j is visible to query i iff first_diagonal <= j - i <= last_diagonal
  int32_t last_diagonal;

  const int32_t* cu_seqlens_q;  // (B + 1), or null when not packed
  const int32_t* cu_seqlens_k;
  // (B, valid_words): bit j % 32 of word j / 32 is set if key j is no padding; null = no key is padding.
  const uint32_t* valid_keys;
  int32_t valid_words;

  const int64_t* dropout_seed;  // null = no dropout
  uint32_t dropout_threshold;   // dropout drops words below it
  float dropout_scale;          // factor for what dropout keeps

  // Backward only.
  Rows dout;       // (B, H, L, Dv)
  RowValues dlse;  // (B, H, L), any strides; null = zero
  Rows dq;         // (B, H, L, D); null data = not wanted, also for dk and dv
  Rows dk;         // (B, Hkv, S, D)
  Rows dv;         // (B, Hkv, S, Dv)
  float* dsinks;   // (H); null = not wanted
  // The preparation kernel writes these, in row blocks (HeadSlice::row_statistic).
  int32_t row_blocks;  // how many row blocks one head of a batch entry has
  RowValues lse_log2;  // (B, H, row_blocks * kRowBlock): lse * log2(e), or +inf for an empty row and past the last one
  RowValues delta;     // (B, H, row_blocks * kRowBlock): rowsum(dout * out) - dlse, or 0 past the last row

  // Fused backward only. dq is a sum to which the blocks of keys add in a fixed order.
  float* dq_sums;     // (B, H, row_blocks, kRowBlock * padded head dim), each tile in the order of accumulators
  int32_t* dq_turns;  // (B, H, tiles): how many blocks of keys have added to a tile so far
  // (B, key blocks + 1): how many of the blocks before have a valid key; null = all blocks have one.
  const int32_t* key_ranks;
  int32_t num_key_blocks;  // how many blocks of keys the longest sequence has
  KeyBlock* key_blocks;    // (blocks of keys of all heads), in the order in which they are taken

  // For kernels whose blocks stay on a multiprocessor and take one tile after another. The counter is 0 at the start.
  // Forward counts the tiles taken beyond the first one of each block; the fused backward counts the blocks of keys
  // taken.
  int32_t* tile_counter;
};

}  // namespace fused_attn::gpu
