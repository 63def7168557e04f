// Which keys a block of queries sees, as a stream of blocks of keys. For each key, a word of 64 bits says which queries
// of the block see the key.
#pragma once
#include <algorithm>

#include "mask_words.h"
#include "tiles.h"
#include "valid_keys.h"

namespace fused_attn::cpu {
namespace {

// Up to kBlockK valid keys in ascending order. kTileKeys further entries follow: copies of the last key, with a word of
// zeros, so that no query sees them. The copies fill the last tile up, so kernels compute every tile as a whole.
struct KeyBlock {
  int count;        // keys of the block, without the copies
  bool contiguous;  // whether index[k] == index[0] + k for all keys
  bool partial;     // whether some key is hidden from some query
  int32_t index[kBlockK + kTileKeys];
  uint64_t word[kBlockK + kTileKeys];  // bit q is set if query q of the block sees the key
};

// The queries of a sequence from `begin` on, at most kBlockQ.
FA_INLINE QueryBlock query_block_of(const Sequence& seq, int64_t b, int64_t h, int64_t begin) {
  return {b, h, begin, seq.seqlen_q - begin < kBlockQ ? static_cast<int>(seq.seqlen_q - begin) : kBlockQ};
}

// Yields, block by block, the valid keys of [key_begin, key_end) that at least one of the queries sees. Other keys cost
// nothing, because kernels never load them.
class KeyStream {
 public:
  // Finds the first and the last key. `valid_keys` are the lists of all batch entries, or null without key padding.
  // Where keys follow one another without a gap, blocks end at multiples of `step` (kKeyStep), so that the next block
  // finds its rows in a cache.
  KeyStream(const AttentionParams& p, const Sequence& seq, const ValidKeys* valid_keys, const QueryBlock& queries,
            int64_t key_begin, int64_t key_end, int step)
      : step_(step),
        band_(band_of(p, seq)),
        mask_(p, queries, seq.seqlen_k),
        q_begin_(queries.begin),
        q_last_(queries.begin + queries.count - 1),
        valid_queries_(bit_range(0, queries.count - 1)) {
    const int64_t first = band_.first_key(q_begin_);
    const int64_t last = band_.last_key(q_last_);
    next_ = first > key_begin ? first : key_begin;
    end_ = last < key_end - 1 ? last + 1 : key_end;
    mask_.narrow(next_, end_);
    if (band_.left + band_.right < 0) end_ = key_begin;  // the band is empty, so no query sees a key
    if (valid_keys != nullptr) {
      valid_keys_ = valid_keys[queries.b];
      // With a list of valid keys, next_ is a position in the list. A binary search finds the first key of the list
      // that is not before the first key of the band.
      int64_t low = 0, high = valid_keys_.count;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (valid_keys_.index[middle] < next_) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      next_ = low;
    }
  }

  // The word whose bits of the queries that exist are set.
  uint64_t valid_queries() const { return valid_queries_; }

  // Writes the next keys to `block`. If no key is left, returns false and leaves the block as it is.
  bool next(KeyBlock& block) {
    int count = 0;
    uint64_t common = valid_queries_;
    if (valid_keys_.index != nullptr) {
      take_listed_keys(block, count, common);
    } else if (mask_.present()) {
      take_masked_keys(block, count, common);
    } else {
      take_keys(block, count, common);
    }
    if (count == 0) return false;
    block.count = count;
    block.partial = common != valid_queries_;
    block.contiguous = block.index[count - 1] - block.index[0] == count - 1;
    for (int k = count; k < count + kTileKeys; ++k) {
      block.index[k] = block.index[count - 1];
      block.word[k] = 0;
    }
    return true;
  }

 private:
  // Each of the following functions writes keys to the block until it is full or no key is left. They add to `count`,
  // the keys of the block. `common` keeps the bits that are set in the words of all keys.

  // Without a mask and without a list, the band shows each key to some query.
  void take_keys(KeyBlock& block, int& count, uint64_t& common) {
    count = next_ < end_ ? static_cast<int>(keys_of_block(end_ - next_)) : 0;
    const bool full = band_.all_visible(q_begin_, q_last_, next_, next_ + count - 1);
    for (int k = 0; k < count; ++k) {
      block.index[k] = static_cast<int32_t>(next_ + k);
      block.word[k] = full ? valid_queries_ : visible_bits(next_ + k);
      common &= block.word[k];
    }
    next_ += count;
  }

  // With a mask, 64 keys at a time. Keys between the ranges of the queries are skipped at once. Without that, 8192
  // queries that see the first 4 keys and a window of 512 took 1.44 of the time in bfloat16, and 1.17 in float32 (AMX).
  void take_masked_keys(KeyBlock& block, int& count, uint64_t& common) {
    int64_t room = kBlockK;
    while (count < room && next_ < end_) {
      const int64_t chunk_end = (next_ | 63) + 1 < end_ ? (next_ | 63) + 1 : end_;
      if (mask_.hides_chunk(next_)) {
        next_ = mask_.next_in_ranges(chunk_end, end_);
        continue;
      }
      const uint64_t* words = mask_.words(next_);
      if (count == 0 && mask_.shows_each_key(next_)) room = keys_to_step(next_);
      const int64_t behind = std::min(chunk_end, next_ + room - count);
      if (mask_.shows_each_key(next_) && band_.all_visible(q_begin_, q_last_, next_, behind - 1)) {
        // No key is left out, so the compiler makes vectors of the loop.
        const int shown = static_cast<int>(behind - next_);
        words += next_ & 63;
        for (int k = 0; k < shown; ++k) {
          block.index[count + k] = static_cast<int32_t>(next_ + k);
          block.word[count + k] = words[k] & valid_queries_;
          common &= block.word[count + k];
        }
        count += shown;
        next_ = behind;
        continue;
      }
      for (; next_ < chunk_end && count < room; ++next_) {
        append_if_seen(block, count, common, next_, visible_bits(next_) & words[next_ & 63]);
      }
    }
  }

  // With a list of valid keys, and perhaps a mask.
  void take_listed_keys(KeyBlock& block, int& count, uint64_t& common) {
    const int32_t* const first = valid_keys_.index + next_;
    const bool no_gap = next_ + kBlockK <= valid_keys_.count && first[kBlockK - 1] - first[0] == kBlockK - 1;
    const int64_t room = no_gap ? keys_to_step(first[0]) : kBlockK;
    while (count < room && next_ < valid_keys_.count) {
      const int64_t j = valid_keys_.index[next_];
      if (j >= end_) break;
      if (mask_.present() && mask_.hides_chunk(j)) {
        const int64_t next = mask_.next_in_ranges((j | 63) + 1, end_);
        while (next_ < valid_keys_.count && valid_keys_.index[next_] < next) ++next_;
        continue;
      }
      ++next_;
      append_if_seen(block, count, common, j,
                     mask_.present() ? visible_bits(j) & mask_.words(j)[j & 63] : visible_bits(j));
    }
  }

  // The number of keys of the next block, if `left` keys are left. A block that begins between two multiples of step_
  // is as short as it can be without a further block: the other blocks of a window then hold as many keys as possible
  // that the next queries see, too. With AMX, forward of 2048 queries that see a window of 500 or 100 keys takes 0.84
  // to 0.93 of the time that it takes with blocks of kBlockK keys, and with 150 of 1024 keys as padding on the left
  // 0.83 to 0.92.
  int64_t keys_of_block(int64_t left) const {
    if (left <= kBlockK || next_ % step_ == 0) return std::min<int64_t>(left, kBlockK);
    const int64_t later = (left - 1) / kBlockK * kBlockK;
    return std::min(round_up(next_ + left - later, step_) - next_, keys_to_step(next_));
  }

  // The largest number of keys, at most kBlockK, after which a block that begins with key j ends at a multiple of
  // step_.
  int64_t keys_to_step(int64_t j) const { return kBlockK - j % step_; }

  // Appends key j to the block, unless its word is 0.
  static void append_if_seen(KeyBlock& block, int& count, uint64_t& common, int64_t j, uint64_t word) {
    if (word == 0) return;
    block.index[count] = static_cast<int32_t>(j);
    block.word[count] = word;
    common &= word;
    ++count;
  }

  // The queries that see key j according to the band.
  uint64_t visible_bits(int64_t j) const {
    return valid_queries_ & bit_range(band_.first_query(j) - q_begin_, band_.last_query(j) - q_begin_);
  }

  int step_;
  Band band_;
  MaskWords mask_;
  ValidKeys valid_keys_;
  int64_t q_begin_, q_last_;
  uint64_t valid_queries_;
  int64_t next_ = 0;  // the next key, or its position in valid_keys_ if there is a list
  int64_t end_ = 0;   // the key behind the last one
};

// The range of vectors of queries that contains every query that sees a key of the tile [k, k + kTileKeys) of the
// block. Sets `partial` to true if one of these keys is hidden from some query. A kernel tests the bits of words only
// in tiles that are partial.
template <class Lane>
FA_INLINE VectorRange tile_range(const KeyBlock& block, int k, uint64_t valid_queries, int vectors, bool& partial) {
  partial = block.partial || k + kTileKeys > block.count;
  if (!partial) return {0, vectors};
  uint64_t any = 0, all = ~uint64_t{0};
  for (int r = 0; r < kTileKeys; ++r) {
    any |= block.word[k + r];
    all &= block.word[k + r];
  }
  partial = all != valid_queries;
  return {__builtin_ctzll(any) / kLanes<Lane>, (63 - __builtin_clzll(any)) / kLanes<Lane> + 1};
}

}  // namespace
}  // namespace fused_attn::cpu
