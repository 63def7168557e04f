// What sees what, by band and key padding: which blocks of keys a block of queries has to visit, which blocks of
// queries see a block of keys, and which entries of a block of scores are visible.
//
// A block that lies within the band and holds only valid keys is full: no entry needs a test. A block without a visible
// key is not visited. Dense masks and ranges of keys come on top (mask_bits.h). keys_in_ranges is what ranges mean.
#pragma once
#include "head_slice.h"

namespace fused_attn::gpu {

// A word whose bits 0 ... n - 1 are set, for 0 <= n <= 32.
GPU_DEVICE uint32_t low_bits(int32_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// The bits of the columns first ... end - 1 in word `word`, which holds columns 32 * word ... 32 * word + 31.
GPU_DEVICE uint32_t column_bits(int32_t first, int32_t end, int32_t word) {
  return low_bits(clamp_to(end - 32 * word, 0, 32)) & ~low_bits(clamp_to(first - 32 * word, 0, 32));
}

// Which of the 32 keys from first_key on lie in a range of the query: bit n stands for key first_key + n.
GPU_DEVICE uint32_t keys_in_ranges(const KeyRanges& ranges, int32_t batch, int32_t head, int32_t query,
                                   int32_t first_key) {
  const int32_t* const ends =
      ranges.data + batch * ranges.stride_batch + head * ranges.stride_head + query * ranges.stride_query;
  uint32_t bits = 0;
  GPU_NO_UNROLL for (int32_t n = 0; n < ranges.count; ++n) {
    // The numbers may be any, and a difference of any numbers could overflow.
    const int32_t begin = max(load_global(ends + 2 * n), 0), end = max(load_global(ends + 2 * n + 1), 0);
    bits |= column_bits(begin - first_key, end - first_key, 0);
  }
  return bits;
}

// The diagonals of the band in one sequence: key j is visible to query i if first <= j - i <= last.
struct Diagonals {
  int32_t first;
  int32_t last;

  GPU_DEVICE Diagonals(const Params& p, const HeadSlice& head_slice)
      : first(p.first_diagonal + head_slice.diagonal_shift(p)), last(p.last_diagonal + head_slice.diagonal_shift(p)) {}

  // The first and the last key that a query sees, and the first and the last query that sees a key. The results may lie
  // outside of the sequence.
  GPU_DEVICE int32_t first_key(int32_t query) const { return query + first; }
  GPU_DEVICE int32_t last_key(int32_t query) const { return query + last; }
  GPU_DEVICE int32_t first_query(int32_t key) const { return key - last; }
  GPU_DEVICE int32_t last_query(int32_t key) const { return key - first; }
};

// A range of blocks. Blocks begin ... end - 1 have to be visited. Of these, blocks full_begin ... full_end - 1 lie
// wholly within the band.
struct BlockRange {
  int32_t begin;
  int32_t end;
  int32_t full_begin;
  int32_t full_end;

  GPU_DEVICE bool has(int32_t block) const { return block >= begin && block < end; }
  GPU_DEVICE bool is_within_band(int32_t block) const { return block >= full_begin && block < full_end; }
};

// The blocks of kBlock rows for the visible rows first ... last. Rows full_first ... full_last are those that every row
// of the other side sees. `length` is the number of rows.
template <int kBlock>
GPU_DEVICE BlockRange block_range(int32_t first, int32_t last, int32_t full_first, int32_t full_last, int32_t length) {
  const int32_t end = (clamp_to(last + 1, 0, length) + kBlock - 1) / kBlock;
  return {clamp_to(first, 0, length) / kBlock, end, (clamp_to(full_first, 0, length) + kBlock - 1) / kBlock,
          clamp_to(full_last + 1, 0, length) / kBlock};
}

// The blocks of keys that one of the queries first_row ... last_row sees.
template <int kBlock>
GPU_DEVICE BlockRange key_range(const Params& p, const HeadSlice& head_slice, int32_t first_row, int32_t last_row) {
  const Diagonals band(p, head_slice);
  return block_range<kBlock>(band.first_key(first_row), band.last_key(last_row), band.first_key(last_row),
                             band.last_key(first_row), head_slice.seqlen_k);
}

// The blocks of queries that see one of the keys from ... to.
template <int kBlock>
GPU_DEVICE BlockRange query_range(const Params& p, const HeadSlice& head_slice, int32_t from, int32_t to) {
  const Diagonals band(p, head_slice);
  return block_range<kBlock>(band.first_query(from), band.last_query(to), band.first_query(to), band.last_query(from),
                             head_slice.seqlen_q);
}

// Which rows of a block are valid: bit c % 32 of word c / 32 stands for row c.
template <int kBlock>
struct ValidRows {
  static constexpr int kWords = kBlock / 32;
  uint32_t words[kWords];

  GPU_DEVICE uint32_t word(int w) const { return words[w]; }
  GPU_DEVICE bool all() const {
    uint32_t common = ~0u;
    GPU_UNROLL for (int w = 0; w < kWords; ++w) common &= words[w];
    return common == ~0u;
  }
  GPU_DEVICE bool none() const {
    uint32_t any = 0;
    GPU_UNROLL for (int w = 0; w < kWords; ++w) any |= words[w];
    return any == 0;
  }
  // Whether row `key` is valid. The function chooses a pair of words by a condition, not by an index, because an index
  // that is no constant would make the compiler put the words into local memory.
  GPU_DEVICE bool has(int32_t key) const {
    uint64_t pair = uint64_t{words[1]} << 32 | words[0];
    if constexpr (kWords == 4) pair = key < 64 ? pair : uint64_t{words[3]} << 32 | words[2];
    return (pair >> (key % 64)) & 1;
  }
  // Whether row first + offset is valid. `offset` is a constant, and both rows lie in the same word, so the index of
  // the word is a constant.
  GPU_DEVICE bool has(int32_t first, int32_t offset) const { return (words[offset / 32] >> (first + offset % 32)) & 1; }
};

// Stands for ValidRows if the first `count` rows of the block are the valid ones.
template <int kBlock>
struct FirstRows {
  static constexpr int kWords = kBlock / 32;
  int32_t count;

  GPU_DEVICE uint32_t word(int w) const { return column_bits(0, count, w); }
  GPU_DEVICE bool all() const { return count >= kBlock; }
};

// Which keys of a block of keys are valid: they exist, and are no padding.
template <int kBlock>
GPU_DEVICE ValidRows<kBlock> valid_keys(const Params& p, const HeadSlice& head_slice, int32_t block) {
  ValidRows<kBlock> valid;
  const int32_t block_start = block * kBlock;
  GPU_UNROLL for (int w = 0; w < valid.kWords; ++w) {
    valid.words[w] = column_bits(0, head_slice.seqlen_k - block_start, w);
    if (p.valid_keys != nullptr && valid.words[w] != 0)
      valid.words[w] &= load_global(p.valid_keys + int64_t{head_slice.batch} * p.valid_words + block_start / 32 + w);
  }
  return valid;
}

// Returns the last one of the blocks of keys begin ... block that has a valid key, or begin - 1 if none has.
template <int kBlock>
GPU_DEVICE int32_t last_valid_block(const Params& p, const HeadSlice& head_slice, int32_t begin, int32_t block) {
  if (p.valid_keys == nullptr) return block;  // every block below the end has a key
  while (block >= begin && valid_keys<kBlock>(p, head_slice, block).none()) --block;
  return block;
}

// Which columns are visible to the two rows that a thread has of a fragment, g and g + 8 (fragments.h). One bit stands
// for one column.
template <int kColumns>
struct VisibleColumns {
  uint32_t words[2][kColumns / 32];
};

// Returns which keys of a block the thread's queries first_row and first_row + 8 see, by band and padding. The rows of
// the fragment are queries.
template <int kBlock>
GPU_DEVICE VisibleColumns<kBlock> visible_keys(const Diagonals& band, const ValidRows<kBlock>& valid, int32_t block,
                                               int32_t first_row) {
  VisibleColumns<kBlock> visible;
  const int32_t block_start = block * kBlock;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int32_t query = first_row + 8 * r;
    const int32_t first = band.first_key(query) - block_start, end = band.last_key(query) + 1 - block_start;
    GPU_UNROLL for (int w = 0; w < kBlock / 32; ++w) {
      visible.words[r][w] = valid.words[w] & column_bits(first, end, w);
    }
  }
  return visible;
}

// Returns which queries of a block see the thread's keys own_key and own_key + 8, by the band. The rows of the fragment
// are keys. is_valid says which of the two keys are valid.
template <int kBlock>
GPU_DEVICE VisibleColumns<kBlock> visible_queries(const Diagonals& band, const bool (&is_valid)[2], int32_t block,
                                                  int32_t own_key) {
  VisibleColumns<kBlock> visible;
  const int32_t block_start = block * kBlock;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int32_t key = own_key + 8 * r;
    const int32_t first = band.first_query(key) - block_start, end = band.last_query(key) + 1 - block_start;
    GPU_UNROLL for (int w = 0; w < kBlock / 32; ++w) {
      visible.words[r][w] = is_valid[r] ? column_bits(first, end, w) : 0;
    }
  }
  return visible;
}

}  // namespace fused_attn::gpu
