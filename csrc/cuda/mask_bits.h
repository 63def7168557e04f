// Dense masks and ranges of keys as bits. PyTorch stores a byte for each entry of a mask, and ranges are two numbers
// each. A small kernel makes bits of both, once for each call. The large kernels then read 32 entries of a row with one
// load. The same small kernel writes a map of the mask: a byte for each granule of 32 x 32 entries, which says whether
// the granule has visible entries, and whether it has hidden ones. So the large kernels skip blocks without a visible
// entry, and test no entry in blocks without a hidden one.
#pragma once
#include "fragments.h"
#include "kernels.h"

namespace fused_attn::gpu {

constexpr int32_t kGranule = 32;  // queries, and keys, of a granule

// Whether a part of the mask has visible entries, and whether it has hidden ones. Both may be true. `bits` holds up to
// four bytes of the map, for neighbouring granules; the functions ask about all of them together. Entries beyond the
// last query or key count as neither.
struct MaskContents {
  static constexpr uint32_t kVisible = 1, kHidden = 2;
  uint32_t bits;

  GPU_DEVICE bool has_visible() const { return (bits & kVisible * 0x01010101u) != 0; }
  GPU_DEVICE bool has_hidden() const { return (bits & kHidden * 0x01010101u) != 0; }
};

// The index of the mask that a head slice reads, among the `entries` masks of MaskParams. Heads or batch entries share
// a mask if it broadcasts along them.
GPU_DEVICE int64_t mask_entry(const MaskParams& mask, const HeadSlice& head_slice) {
  return int64_t{head_slice.batch} * mask.entries_per_batch + int64_t{head_slice.head} * mask.entries_per_head;
}

// The contents of the mask for the queries first_query ... first_query + kQueries - 1 and the keys first_key ...
// first_key + kKeys - 1: reads the map, one load for each row of granules.
template <int kQueries, int kKeys>
GPU_DEVICE MaskContents mask_contents(const MaskParams& mask, const HeadSlice& head_slice, int32_t first_query,
                                      int32_t first_key) {
  using Bytes = std::conditional_t<kKeys == 32, uint8_t, std::conditional_t<kKeys == 64, uint16_t, uint32_t>>;
  static_assert(sizeof(Bytes) * kGranule == kKeys && kQueries % kGranule == 0);
  const int32_t row = first_query / kGranule;
  const uint8_t* const map =
      mask.map + (mask_entry(mask, head_slice) * mask.query_words + row) * mask.key_words + first_key / kGranule;
  uint32_t bits = 0;
  GPU_UNROLL for (int r = 0; r < kQueries / kGranule; ++r) {
    if (row + r < mask.query_words) bits |= load_global(reinterpret_cast<const Bytes*>(map + r * mask.key_words));
  }
  return {bits};
}

// Clears the bits of the keys that the mask hides from the thread's two queries, first_query and first_query + 8.
template <int kKeys>
GPU_DEVICE void hide_masked_keys(const Params& p, const HeadSlice& head_slice, VisibleColumns<kKeys>& visible,
                                 int32_t first_query, int32_t first_key) {
  const MaskParams& mask = p.mask;
  const uint32_t* const rows = mask.keys_of_query + mask_entry(mask, head_slice) * p.seqlen_q * mask.key_words;
  first_query = keep_computed(first_query);  // for the same reason as in to_logits (logits.h)
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int32_t query = min(first_query + 8 * r, head_slice.seqlen_q - 1);
    GPU_UNROLL for (int w = 0; w < kKeys / 32; ++w) visible.words[r][w] &=
        load_global(rows + int64_t{query} * mask.key_words + first_key / 32 + w);
  }
}

// The words of queries_of_key for key `key`, or for the last key if there is no such key.
GPU_DEVICE const uint32_t* queries_of_key(const Params& p, const HeadSlice& head_slice, int32_t key) {
  const int64_t row = mask_entry(p.mask, head_slice) * p.seqlen_k + min(key, head_slice.seqlen_k - 1);
  return p.mask.queries_of_key + row * p.mask.query_words;
}

// Clears the bits of the queries from which the mask hides the thread's two keys, first_key and first_key + 8.
template <int kQueries>
GPU_DEVICE void hide_masked_queries(const Params& p, const HeadSlice& head_slice, VisibleColumns<kQueries>& visible,
                                    int32_t first_query, int32_t first_key) {
  first_key = keep_computed(first_key);  // for the same reason as in to_logits (logits.h)
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const uint32_t* const words = queries_of_key(p, head_slice, first_key + 8 * r) + first_query / 32;
    GPU_UNROLL for (int w = 0; w < kQueries / 32; ++w) visible.words[r][w] &= load_global(words + w);
  }
}

// ---- What kernels ask about blocks
//
// The answers are those of a mask that hides nothing if the call has no mask, and in a plain kernel.

// Returns the last one of the blocks of keys begin ... block that has a valid key, and a key that the mask shows to one
// of the kQueries queries from first_query on. Returns a number below `begin` if no block has both. All lanes of a warp
// call this, and get the same number.
// kByLanes: lanes look at several blocks at once, because a mask of documents may hide hundreds of blocks in a row. Not
// every kernel has the registers for this.
template <bool kIsGeneral, int kQueries, int kKeys, bool kByLanes = false>
GPU_DEVICE int32_t last_block_to_visit(const Params& p, const HeadSlice& head_slice, int32_t first_query, int32_t begin,
                                       int32_t block) {
  block = last_valid_block<kKeys>(p, head_slice, begin, block);
  if constexpr (kIsGeneral) {
    if (p.mask.map == nullptr) return block;
    constexpr int32_t kRows = kQueries / kGranule, kBlocks = 32 / kRows;
    while (block >= begin) {
      if constexpr (kByLanes) {
        const int32_t lane = this_lane().index, of_lane = block - lane / kRows;
        const int32_t first_of_lane = first_query + lane % kRows * kGranule;
        const uint32_t visible = warp_ballot(
            lane < kRows * kBlocks && of_lane >= begin &&
            mask_contents<kGranule, kKeys>(p.mask, head_slice, first_of_lane, of_lane * kKeys).has_visible());
        block -= visible == 0 ? kBlocks - 1 : lowest_bit(visible) / kRows;
        if (visible != 0 && last_valid_block<kKeys>(p, head_slice, block, block) == block) return block;
      } else if (mask_contents<kQueries, kKeys>(p.mask, head_slice, first_query, block * kKeys).has_visible()) {
        return block;
      }
      block = last_valid_block<kKeys>(p, head_slice, begin, block - 1);
    }
  }
  return block;
}

// Whether the mask hides some key of the block from one of the kQueries queries from first_query on.
template <bool kIsGeneral, int kQueries, int kKeys>
GPU_DEVICE bool has_masked_keys(const Params& p, const HeadSlice& head_slice, int32_t first_query, int32_t block) {
  if (!kIsGeneral || p.mask.map == nullptr) return false;
  return mask_contents<kQueries, kKeys>(p.mask, head_slice, first_query, block * kKeys).has_hidden();
}

// Whether the mask hides one of the kKeys keys from first_key on from some query of the block.
template <bool kIsGeneral, int kQueries, int kKeys>
GPU_DEVICE bool has_masked_queries(const Params& p, const HeadSlice& head_slice, int32_t block, int32_t first_key) {
  if (!kIsGeneral || p.mask.map == nullptr) return false;
  return mask_contents<kQueries, kKeys>(p.mask, head_slice, block * kQueries, first_key).has_hidden();
}

// Whether the mask shows one of the kKeys keys from first_key on to some query of the block.
template <int kQueries, int kKeys>
GPU_DEVICE bool has_visible_queries(const Params& p, const HeadSlice& head_slice, int32_t block, int32_t first_key) {
  if (p.mask.map == nullptr) return true;
  return mask_contents<kQueries, kKeys>(p.mask, head_slice, block * kQueries, first_key).has_visible();
}

// ---- Preparation

// Granules that one warp packs: 32 queries x 128 keys, whose four bytes of the map are one store.
constexpr int kGranulesPerWarp = 4;

// Transposes the 32 x 32 matrix of bits whose row n is the word of lane n: bit i of lane n becomes bit n of lane i. All
// lanes of a warp take part. Each step exchanges two quarters of each square of 2 * size x 2 * size bits.
GPU_DEVICE uint32_t transpose_bits(uint32_t row, int32_t lane) {
  uint32_t low = 0x0000ffffu;  // the bits of the left half of each square
  for (int size = 16; size > 0; size /= 2) {
    const uint32_t other = shuffle_xor(row, size);
    row = lane & size ? (row & ~low) | (other >> size & low) : (row & low) | (other << size & ~low);
    low ^= low << (size / 2);
  }
  return row;
}

// The word of keys_of_query for word `word` of query first_query + lane, zero if this query does not exist: which keys
// the caller's masks show to the query. All lanes of a warp take part. Lane i reads the byte of key i, for four
// queries at a time, and warp_ballot makes the word of each query.
GPU_DEVICE uint32_t keys_of_lane(const Params& p, const MaskSource& source, int32_t batch, int32_t head,
                                 int32_t first_query, int32_t num_queries, int32_t word, int32_t lane) {
  const int32_t first_key = kGranule * word;
  uint32_t keys = lane < num_queries ? low_bits(clamp_to(p.seqlen_k - first_key, 0, kGranule)) : 0;
  if (source.bytes.data != nullptr) {
    const ScoreTensor& bytes = source.bytes;
    const bool is_key = first_key + lane < p.seqlen_k;
    const uint8_t* byte = static_cast<const uint8_t*>(bytes.data) + batch * bytes.stride_batch +
                          head * bytes.stride_head + first_query * bytes.stride_query +
                          int64_t{first_key + lane} * bytes.stride_key;
    constexpr int kAhead = 4;  // loads that are in flight at once; with more, the kernel would spill registers
    GPU_NO_UNROLL for (int32_t first_row = 0; first_row < num_queries; first_row += kAhead) {
      bool is_visible[kAhead];
      GPU_UNROLL for (int i = 0; i < kAhead; ++i, byte += bytes.stride_query) {
        is_visible[i] = is_key && first_row + i < num_queries && load_global(byte) != 0;
      }
      GPU_UNROLL for (int i = 0; i < kAhead; ++i) {
        const uint32_t shown = warp_ballot(is_visible[i]);
        if (lane == first_row + i) keys &= shown;
      }
    }
  }
  if (source.ranges.data != nullptr && lane < num_queries)
    keys &= keys_in_ranges(source.ranges, batch, head, first_query + lane, first_key);
  return keys;
}

// Packs the caller's masks into keys_of_query, queries_of_key (backward only) and the map. Entries beyond the last
// query or key count as neither visible nor hidden. Warp `number` of all warps that share the work calls this, for
// kGranulesPerWarp granules.
GPU_DEVICE void pack_mask(const Params& p, const MaskSource& source, int64_t number) {
  const MaskParams& mask = p.mask;
  // The granules of this warp begin at word first_word of row query_word of the map.
  const int32_t words_of_warp = mask.key_words / kGranulesPerWarp;
  const int32_t first_word = static_cast<int32_t>(number % words_of_warp) * kGranulesPerWarp;
  const int32_t query_word = static_cast<int32_t>(number / words_of_warp % mask.query_words);
  const int64_t entry = number / words_of_warp / mask.query_words;
  const int32_t heads = mask.entries_per_head == 0 ? 1 : p.num_heads;
  if (entry >= int64_t{mask.entries_per_batch == 0 ? 1 : p.batch} * heads) return;
  const int32_t batch = static_cast<int32_t>(entry / heads), head = static_cast<int32_t>(entry % heads);
  const int32_t lane = this_lane().index, first_query = kGranule * query_word;
  const int32_t num_queries = clamp_to(p.seqlen_q - first_query, 0, kGranule);
  uint32_t contents = 0;
  GPU_NO_UNROLL for (int i = 0; i < kGranulesPerWarp; ++i) {  // an unrolled loop would spill registers
    const int32_t word = first_word + i, key = kGranule * word + lane;
    const uint32_t keys = keys_of_lane(p, source, batch, head, first_query, num_queries, word, lane);
    const uint32_t all_keys = lane < num_queries ? low_bits(clamp_to(p.seqlen_k - kGranule * word, 0, kGranule)) : 0;
    if (lane < num_queries)
      store_global(mask.keys_of_query + (entry * p.seqlen_q + first_query + lane) * mask.key_words + word, keys);
    if (mask.queries_of_key != nullptr) {
      const uint32_t queries = transpose_bits(keys, lane);
      if (key < p.seqlen_k)
        store_global(mask.queries_of_key + (entry * p.seqlen_k + key) * mask.query_words + query_word, queries);
    }
    const bool has_visible = warp_any(keys != 0), has_hidden = warp_any(keys != all_keys);
    contents |= ((has_visible ? MaskContents::kVisible : 0) | (has_hidden ? MaskContents::kHidden : 0)) << (8 * i);
  }
  uint8_t* const map = mask.map + (entry * mask.query_words + query_word) * mask.key_words + first_word;
  if (lane == 0) store_global(reinterpret_cast<uint32_t*>(map), contents);
}

// The number of warps that pack `entries` masks.
inline int64_t warps_of_mask(const MaskParams& mask, int64_t entries) {
  return entries * mask.query_words * mask.key_words / kGranulesPerWarp;
}

}  // namespace fused_attn::gpu
