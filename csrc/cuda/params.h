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
// strides count elements.
struct Rows {
  void* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

// One float for each query: (batch, head, row). Rows lie side by side unless said otherwise.
struct RowValues {
  float* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

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
  Rows v;         // (B, Hkv, S, D)
  Rows out;       // (B, H, L, D)
  RowValues lse;  // (B, H, L), natural logarithm; null data = not wanted

  float scale;             // above 0
  float scale_log2;        // scale * log2(e)
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
  Rows dout;       // (B, H, L, D)
  RowValues dlse;  // (B, H, L), any strides; null = zero
  Rows dq;         // (B, H, L, D); null data = not wanted, also for dk and dv
  Rows dk;         // (B, Hkv, S, D)
  Rows dv;         // (B, Hkv, S, D)
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
