// The arguments of kernels: AttentionParams in the types that a GPU computes with. params_of.h fills them in.
#pragma once
#include <cstdint>

namespace fused_attn::gpu {

// No tensor has more rows than this. Diagonals are clamped to this number, too, so that the sum of a row and a diagonal
// fits into 32 bits.
constexpr int32_t kMaxRows = 1 << 29;

// The size of a row block. What backward stores for each query (lse_log2, delta, sums of dq) lies in whole row blocks.
// So bulk copies of a block start at aligned addresses, and need no test for the end of a sequence.
constexpr int32_t kRowBlock = 128;

// The keys of a block of the fused backward: one block of threads sums their gradients, or several share the tiles of
// queries that see the block (gradient_splits.h). Key ranks count blocks of this size.
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

// The ranges of keys of each query, int32 (batch, head, query, 2 * count): begin, end of each range. A query sees only
// the keys begin ... end - 1 of its ranges. The numbers may be any. The stride of a broadcast dimension is 0.
struct KeyRanges {
  const int32_t* data;  // null = no ranges
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_query;
  int32_t count;
};

// The masks of a call as the caller has given them. An entry is visible if neither hides it.
struct MaskSource {
  ScoreTensor bytes;  // nonzero = visible; null data = none
  KeyRanges ranges;
};

// Keys and values in pages. Their tensors have pages in place of batch entries: key j of batch entry b is row j % size
// of page table[b * stride_batch + j / size].
struct Pages {
  const int32_t* table;  // any numbers: kernels clip them to [0, count); null = keys and values are not paged
  int64_t stride_batch;
  int32_t size;   // rows of a page
  int32_t count;  // how many pages there are
};

// What the softmax of a row has found in a split of the keys.
struct alignas(16) SplitSum {
  float reference;  // -inf: no key is visible, or all scores are NaN
  float total;      // the sum of the probs, which are relative to the reference
  float row_max;    // the largest logit, if the caller wants it
  float unused;     // one load reads 16 bytes
};

// What happens to a score between the product with the keys and the softmax. Masks are not part of it. logits.h applies
// this.
struct LogitParams {
  bool is_plain;        // nothing but the scale, and the softmax multiplies by it
  float softcap_scale;  // scale / softcap
  float softcap;        // 0 = no softcap
  // The copy of the relative bias in the workspace: (H or 1, columns), with kRelativeBiasMargin zeros at both ends of a
  // row. The pointer points behind the first margin. The bias of query i and key j is column j - i + seqlen_q - 1.
  // Null = none.
  const float* relative_bias;
  int64_t relative_bias_stride_head;
  const float* key_bias;  // (B, S): a bias for each key, the same for all queries and heads; null = none
  int64_t key_bias_stride_batch;
  ScoreTensor bias;    // null data = none
  bool is_bias_float;  // the bias has type float; otherwise the type of the query
  // The bias has the type of the query, and any 8 keys from a multiple of 8 on are one aligned load.
  bool has_bias_rows;
  // The bias has type float, and any 2 keys from a multiple of 2 on are one aligned load.
  bool has_bias_pairs;
};

// The masks of MaskSource as bits, in words of 32 (mask_bits.h). An entry here is the mask of one batch entry and head.
// All pointers are null without a mask.
struct MaskParams {
  uint32_t* keys_of_query;    // (entries, L, key_words): bit j % 32 of word j / 32 is set if the query sees key j
  uint32_t* queries_of_key;   // (entries, S, query_words): the transpose; null in forward
  uint8_t* map;               // (entries, query_words, key_words): a byte for each granule of 32 x 32, see MaskContents
  int32_t entries_per_batch;  // how many entries lie between batch entries; 0 = the mask broadcasts along them
  int32_t entries_per_head;   // likewise between heads: 1 or 0
  int32_t key_words;          // words, and granules, along the keys; they reach to the end of the largest block
  int32_t query_words;        // likewise along the queries
};

// Kernels also read the relative bias for rows of a block that do not exist. So they may read up to this many columns
// before the first and after the last one.
constexpr int32_t kRelativeBiasMargin = 256;

// An entry of the list that orders the work of the fused backward: a block of keys of one head, and the tiles of
// queries that see these keys, or a split of them.
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
  int32_t begin;                   // the first tile of queries of this entry that sees the block
  int32_t end;                     // one past the last tile of this entry that does
  int32_t full_begin;              // the first tile whose queries all see all keys
  int32_t full_end;                // one past the last such tile
  int32_t rank_after;              // how many of the blocks 0 ... number have a valid key
  int32_t steps;                   // the number of tiles to visit, over all heads of the group
  int32_t program;                 // the place of this entry in the list
  uint32_t valid[kKeyBlock / 32];  // one bit for each key: the key is valid
};

// A step of the fused backward: what a block of keys does with one tile of queries.
struct alignas(8) StepInfo {
  int32_t tile;  // kTileNumber: number of the tile; kHasMask: some query does not see some key
  int32_t head;  // the query head
};
constexpr int32_t kHasMask = 1 << 30;
constexpr int32_t kTileNumber = kHasMask - 1;

// A tile of queries of a packed call: a block of rows of one sequence. All heads have the same tiles.
struct alignas(8) QueryTile {
  int32_t sequence;
  int32_t block;
};

// What the preparation kernel reads to list the tiles of queries of a packed call.
struct QueryTileParams {
  int32_t rows;      // the rows of a tile
  int32_t fewest;    // sequences with fewer queries are left out: the decode kernels compute them
  int32_t most;      // how many tiles the list has room for
  QueryTile* tiles;  // output: see Params
  int32_t* count;    // output: see Params
};

// How forward kernels divide the keys of a row, where few rows have many keys. Each split of the keys has a program of
// its own, which stores sums. merge_splits_kernel makes the results of them.
struct SplitParams {
  int32_t count;  // how many splits; 1 = keys are not divided
  // The sums of each split, relative to its reference. Null if keys are not divided.
  float* acc;      // (count, B, H, L, Dv): sums of prob * value
  SplitSum* sums;  // (count, B, H, L)
  // In a packed call, the decode kernels may compute the sequences with few queries, and the large kernels the others.
  // Sequences with fewer or more queries than these are left to the other kernels.
  int32_t fewest_queries;
  int32_t most_queries;
};

// The parts of a gradient, if several programs share the work for a block of its rows (gradient_splits.h): those of
// split n lie n * stride_split floats behind those of split 0.
struct GradientParts {
  Rows rows;  // floats, in the shape of the gradient; null data = there are no parts
  int64_t stride_split;
};

// What the preparation kernel reads to pack key padding to bits.
struct PaddingParams {
  const uint8_t* padding;  // (B, S), nonzero = padding; null = none
  int64_t stride_batch;
  int64_t stride_key;
  uint32_t* valid_keys;  // (B, valid_words), output: see Params
  int32_t* key_ranks;    // (B, num_key_blocks + 1), output: see Params; null = not wanted
};

// What the preparation kernel reads to copy a relative bias with margins.
struct RelativeBiasParams {
  const float* bias;  // (heads, columns); null = none
  int64_t stride_head;
  int64_t heads;    // H, or 1 for all
  int64_t columns;  // L + S - 1
  float* padded;    // output, from the first margin on: see LogitParams::relative_bias
};

// A tensor of which the preparation kernel clears rows (unowned_rows.h). A row takes `stores` stores for each head, of
// 16 bytes each, or of 4 if the numbers are floats. Each of their words becomes `word`.
struct ClearedTensor {
  char* data;
  int64_t batch_bytes;  // from a batch entry to the next one
  int64_t head_bytes;
  int64_t row_bytes;
  int32_t heads;  // 0 = there is no such tensor
  int32_t stores;
  bool is_float;
  uint32_t word;
};

// The tensors that have the same rows, those of the queries or of the keys.
struct UnownedRows {
  static constexpr int kMost = 3;  // out, lse and row_max
  const int32_t* cu_seqlens;       // (B + 1), or null when not packed
  const int32_t* lengths;          // (B): how many rows of a batch entry are owned; null when packed
  int32_t rows;                    // of a batch entry
  int32_t longest;                 // sequence
  ClearedTensor tensors[kMost];
};

// What the preparation kernel does in a call (preparation.h). Each job has blocks of threads of its own, in this order.
// A job that is not needed has none.
struct PreparationParams {
  PaddingParams padding;
  RelativeBiasParams relative_bias;
  MaskSource mask;
  QueryTileParams query_tiles;
  UnownedRows queries;
  UnownedRows keys;
  int32_t padding_blocks;
  int32_t relative_bias_blocks;
  int32_t mask_blocks;
  int32_t query_tile_blocks;      // forward of packed calls: one warp lists the tiles of queries
  int32_t query_clearing_blocks;  // packed calls: their warps share the rows of queries, and clear the unowned ones
  int32_t key_clearing_blocks;    // backward: the same for keys, also for those behind the length of a batch entry
  int32_t row_blocks;             // backward: each computes the row statistics of kPreparationRows queries
};

// DropoutOrigin of common/attention_params.h in the types of a GPU: it is added to the position of an entry of the
// scores, and the sum is the counter with which Philox computes the dropout bit of the entry.
struct DropoutOrigin {
  int32_t batch;
  int32_t head;
  int32_t query;
  int32_t key_group;  // kPhiloxKeys neighbouring keys form a group
};

// What every large kernel gets. In packed (varlen) problems, tensors have one batch entry (stride_batch is 0), and row
// r of sequence b lies at row cu_seqlens[b] + r.
struct Params {
  int32_t batch;               // B, or the number of sequences
  int32_t num_heads;           // H
  int32_t group_size;          // H / Hkv: query head h reads key head h / group_size
  int32_t seqlen_q;            // L, or the longest
  int32_t seqlen_k;            // S, or the longest
  int32_t rows_q;              // rows of the tensors: L, or the total when packed
  int32_t rows_k;              // S, or the total when packed, or the rows of a page
  int32_t heads_per_l2_group;  // heads that run side by side, so that their tensors stay in the L2 cache

  Rows q;             // (B, H, L, D)
  Rows k;             // (B, Hkv, S, D); in pages: (pages, Hkv, rows of a page, D)
  Rows v;             // (B, Hkv, S, Dv); in pages: (pages, Hkv, rows of a page, Dv)
  Rows out;           // (B, H, L, Dv)
  RowValues lse;      // (B, H, L), natural logarithm; null data = not wanted
  RowValues row_max;  // (B, H, L), the largest logit of each row, in forward; null data = not wanted

  float scale;
  float scale_log2;  // scale * log2(e)
  // What the softmax multiplies its scores by, to get logits (softmax_scale) or exponents of 2 (softmax_scale_log2). If
  // the logits are plain, these are scale and scale_log2. Otherwise the softmax gets logits, and the factors are 1 and
  // log2(e).
  float softmax_scale;
  float softmax_scale_log2;
  LogitParams logits;
  MaskParams mask;
  const float* sinks;      // (H): a logit that joins the denominator of the softmax; null = none
  int32_t first_diagonal;  // key j is visible to query i iff first_diagonal <= j - i <= last_diagonal
  int32_t last_diagonal;

  // Whether the band ends at the last key of each sequence: HeadSlice::diagonal_shift is added to both diagonals.
  bool band_from_end;

  const int32_t* cu_seqlens_q;  // (B + 1), or null when not packed
  const int32_t* cu_seqlens_k;  // (B + 1), or null when not packed; keys of packed queries may also lie in pages
  Pages pages;                  // in forward
  const int32_t* key_lengths;   // (B): how many keys a batch entry has, any numbers: kernels clip them; null = S
  // (B, valid_words): bit j % 32 of word j / 32 is set if key j is no padding; null = no key is padding.
  const uint32_t* valid_keys;
  int32_t valid_words;

  // Forward of packed calls: the tiles of queries, in the order of their rows. Without the list, each sequence has as
  // many programs as the longest one, and many of them find no queries. Null = no list.
  const QueryTile* query_tiles;
  const int32_t* num_query_tiles;  // how many there are, in a single number
  SplitParams splits;              // in forward

  const int64_t* dropout_seed;  // null = no dropout
  uint32_t dropout_threshold;   // dropout drops an entry if its random number (16 bits) is below this one
  float dropout_scale;          // the factor for entries that survive dropout
  DropoutOrigin dropout_origin;

  // Backward only.
  Rows dout;       // (B, H, L, Dv)
  RowValues dlse;  // (B, H, L), any strides; null = zero
  Rows dq;         // (B, H, L, D); null data = not wanted, also for dk and dv
  Rows dk;         // (B, Hkv, S, D)
  Rows dv;         // (B, Hkv, S, Dv)
  float* dsinks;   // (H); null = not wanted
  // How many programs a block of rows has in the kernel for dq, and in the one for dk and dv. Each program visits a
  // part of the keys, or queries. The fused backward has the second kind only.
  int32_t dq_splits;
  int32_t dk_splits;
  GradientParts dq_parts;
  GradientParts dk_parts;
  GradientParts dv_parts;
  // The preparation kernel writes these for every query, in row blocks (HeadSlice::row_statistic).
  int32_t row_blocks;  // row blocks of one head of a batch entry; of all sequences, if packed
  // In a packed call whose sequences differ much in length: kernels have a program for each tile of the rows of all
  // sequences, not one for each tile of `batch` times the longest. See gradient_tile in tile_scheduler.h.
  bool finds_queries_by_offset;
  bool finds_keys_by_offset;  // the list of blocks of keys has entries for these rows alone, too
  RowValues lse_log2;  // (B, H, row_blocks * kRowBlock): lse * log2(e), or +inf for an empty row and past the last one
  RowValues delta;     // (B, H, row_blocks * kRowBlock): rowsum(dout * out) - dlse, or 0 past the last row

  // Fused backward only. A tile of dq has 1 << dq_sums_log2 sums, to which the blocks of keys add in a fixed order
  // (DqTurn). Both pointers are null if dq is not wanted, or if there is one block of keys.
  int32_t dq_sums_log2;
  float* dq_sums;     // (B, H, tiles, sums, rows of a tile * padded head dim), each in the order of accumulators
  int32_t* dq_turns;  // (B, H, tiles, sums): how many blocks of keys have added to a sum so far
  bool clears_dq;     // the preparation kernel sets dq to zero: without dq_sums, if a query may see no key
  // (B, key blocks + 1): entry n says how many of the blocks 0 ... n - 1 have a valid key. Null = all blocks have one.
  const int32_t* key_ranks;
  int32_t num_key_blocks;  // how many blocks of keys the longest sequence has
  KeyBlock* key_blocks;    // (num_listed_key_blocks): blocks of keys of all heads, in the order in which they are taken
  // Each sequence has num_key_blocks * dk_splits entries for each key head, or, with finds_keys_by_offset, a number of
  // its own (listed_block in sm90/key_blocks.h).
  int32_t num_listed_key_blocks;  // 0 without key_blocks
  // Null without a dense mask. With one, the band and the padding do not say which steps have a visible entry. So these
  // steps are listed, and so are the turns of their blocks of keys (list_mask_steps_kernel).
  // Here, `tiles` counts those of the longest sequence.
  // (num_listed_key_blocks, group_size * tiles of a split): the first KeyBlock::steps of each entry are valid
  StepInfo* mask_steps;
  // (B, H, tiles, num_key_blocks): how many blocks of keys add to the tile before this one. Null without dq_sums.
  int32_t* mask_turns;

  // For persistent kernels, whose blocks of threads stay on a multiprocessor and take one piece of work after another.
  // The counter starts at 0. Forward counts the tiles of queries taken beyond the first one of each block of threads.
  // The fused backward counts the blocks of keys taken. Null = each block takes every grid_size-th tile.
  int32_t* tile_counter;
  int32_t* program_counter;  // see BiasGradientParams
};

}  // namespace fused_attn::gpu
