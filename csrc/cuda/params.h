// What a kernel is given: AttentionParams in the sizes that a GPU computes with. attention.cu fills it in.
#pragma once
#include <cstdint>

namespace fused_attn::gpu {

// Above every row number and below every diagonal's, so that positions can be added to diagonals in 32 bits.
constexpr int32_t kMaxRows = 1 << 29;

// A tensor (batch, head, row, column) of 16-bit numbers: columns side by side, rows aligned to 16 bytes, strides in
// elements.
struct Rows {
  void* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

// One float for each query: (batch, head, row), rows side by side unless said otherwise.
struct RowValues {
  float* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

// Packed (varlen) problems: tensors have one batch entry (stride_batch is 0), and row r of sequence b lies at
// cu_seqlens[b] + r.
struct Params {
  int32_t batch;       // B, or the number of sequences
  int32_t num_heads;   // H
  int32_t group_size;  // H / Hkv: query head h reads key head h / group_size
  int32_t seqlen_q;    // L, or the longest
  int32_t seqlen_k;    // S, or the longest
  int32_t rows_q;      // of the tensors: L, or the total when packed
  int32_t rows_k;
  int32_t heads_per_section;  // heads whose keys and values share the L2 cache; see schedule.h

  Rows q;         // (B, H, L, D)
  Rows k;         // (B, Hkv, S, D)
  Rows v;         // (B, Hkv, S, D)
  Rows out;       // (B, H, L, D)
  RowValues lse;  // (B, H, L), natural log; null = not wanted

  float scale;             // above 0
  float scale_log2;        // scale * log2(e)
  int32_t first_diagonal;  // key j is visible to query i iff first_diagonal <= j - i <= last_diagonal
  int32_t last_diagonal;

  const int32_t* cu_seqlens_q;  // (B + 1), or null when not packed
  const int32_t* cu_seqlens_k;
  const uint32_t* kept_keys;  // (B, kept_words): bit j % 32 of word j / 32 = key j is no padding; null = all are kept
  int32_t kept_words;

  const int64_t* dropout_seed;  // null = no dropout
  uint32_t dropout_threshold;   // words below it are dropped
  float dropout_scale;          // factor for what is kept

  // Backward only.
  Rows dout;           // (B, H, L, D)
  RowValues dlse;      // (B, H, L), any strides; null = zero
  Rows dq;             // (B, H, L, D); null data = not wanted, as for dk and dv
  Rows dk;             // (B, Hkv, S, D)
  Rows dv;             // (B, Hkv, S, D)
  RowValues lse_log2;  // (B, H, L), written by the delta kernel: lse * log2(e), or +inf for an empty row
  RowValues delta;     // (B, H, L), written by the delta kernel: rowsum(dout * out) - dlse

  // For kernels whose blocks stay and take one tile after another.
  int32_t* tile_counter;  // 0 at the start: how many tiles have been taken beyond the first one of each block
};

}  // namespace fused_attn::gpu
