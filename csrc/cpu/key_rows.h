// The rows of key or value for a block of keys, in the form that the matrix products read. Where memory holds this
// form, no row is copied.
#pragma once
#include "row_source.h"

namespace fused_attn::cpu {
namespace {

// Sets rows[k] to the row of key k of the block, as lanes, for products that sum over the columns of a row. If memory
// holds lanes, the pointers are addresses in the tensor. Otherwise the function converts the rows into `scratch`, where
// rows are padded to whole vectors. The kTileKeys pointers behind the last key point to the last key.
template <class Policy>
FA_NOINLINE void find_rows(const RowSource<typename Policy::Storage>& source, const KeyBlock& keys, int dim,
                           typename Policy::Lane* scratch, const char** rows) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const typename Policy::Storage* found[kBlockK];
  source.find(keys, found);
  if (Policy::kPerLane == 1 ? !Policy::kConverts : dim % 2 == 0) {
    for (int k = 0; k < keys.count; ++k) rows[k] = reinterpret_cast<const char*>(found[k]);
  } else {
    const int lanes = Policy::lanes_for(dim);
    const int64_t row = round_up(lanes, n);
    for (int k = 0; k < keys.count; ++k) {
      for (int d = 0; d < lanes; d += n) store<Lane>(scratch + k * row + d, load_lanes<Policy>(found[k], d, dim));
      rows[k] = reinterpret_cast<const char*>(scratch + k * row);
    }
  }
  for (int k = keys.count; k < keys.count + kTileKeys; ++k) rows[k] = rows[keys.count - 1];
}

// The rows of a block of keys for products that sum over the columns of a row.
template <class Policy>
struct FoundRows {
  using Lane = typename Policy::Lane;

  const char** rows;  // the result of find(), as of find_rows
  Lane* copies;       // memory for rows that have to be converted to lanes, or copied for AMX

  // Takes the memory out of the arena. The rows of a block are not kept for the next visit.
  void layout(Arena& arena, const AttentionParams& /*p*/, int dim, int64_t /*visits*/) {
    const bool copied = Policy::kConverts || Policy::kUsesAmx || dim % Policy::kPerLane != 0;
    rows = arena.take<const char*>(kBlockRows);
    copies = arena.take<Lane>(copied ? kBlockRows * round_up(Policy::lanes_for(dim), kLanes<Lane>) : 0);
  }

  // Finds the rows of the keys of the block.
  void find(const RowSource<typename Policy::Storage>& source, const KeyBlock& keys, int dim) const {
    find_rows<Policy>(source, keys, dim, copies, rows);
  }
};

// The rows of key or value of one head for products that sum over keys. If a lane holds a pair of elements, the pair
// must be the same column of two neighbouring keys, so the rows of the two keys are interleaved.
//
// A thread keeps interleaved rows in a cache, because the next block of queries needs the same rows. The cache is valid
// while the rows begin at the same address and have the same pages: strides are the same during a call, so these are
// the same rows. Blocks that begin at an odd key, or that leave out keys, do not use the cache.
template <class Policy>
struct SummedRows {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  static constexpr int64_t kMaxCachedBytes = int64_t{1} << 20;  // half of a typical second-level cache or less

  const char** rows;    // the result of find(): one row for each key of the block, or for each pair of keys
  Lane* block;          // memory for the converted or interleaved rows of one block
  int64_t pairs;        // the number of pairs in the cache; 0 = no cache
  Lane* cached;         // the cache: [pair i, of the keys 2 i and 2 i + 1][dim, padded]
  uint8_t* num_cached;  // [pair]: how many of its keys the cache holds
  RowSource<Storage>* cached_source;  // where the cached rows come from; a pointer, because find() is const

  // Takes the memory out of the arena. `visits` is the number of query blocks that a thread processes with one head of
  // keys. With one block, a cache would be of no use.
  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    const int64_t row = round_up(dim, kLanes<Lane>);
    pairs = Policy::kPerLane == 2 && visits > 1 ? (p.seqlen_k + 1) / 2 : 0;
    if (pairs * row * static_cast<int64_t>(sizeof(Lane)) > kMaxCachedBytes) pairs = 0;
    rows = arena.take<const char*>(kBlockRows);
    block = arena.take<Lane>(Policy::kConverts || Policy::kPerLane == 2 ? kBlockRows * row : 0);
    cached = arena.take<Lane>(pairs * row);
    num_cached = arena.take<uint8_t>(pairs);
    cached_source = arena.take<RowSource<Storage>>(1);
    if (cached_source != nullptr) *cached_source = {};
  }

  // Sets `rows` for the keys of the block.
  FA_NOINLINE void find(const RowSource<Storage>& source, const KeyBlock& keys, int dim) const {
    if constexpr (Policy::kPerLane == 1) {
      find_rows<Policy>(source, keys, dim, block, rows);
    } else {
#if defined(__AVX512BF16__)
      const int64_t row = round_up(dim, kLanes<Lane>);
      const Storage* found[kBlockK];
      source.find(keys, found);
      const auto row_of_key = [&](int k) { return reinterpret_cast<const uint16_t*>(found[k]); };
      const bool caches = pairs > 0 && keys.contiguous && keys.index[0] % 2 == 0;
      if (caches && !(*cached_source == source)) {
        memset(num_cached, 0, pairs);
        *cached_source = source;
      }
      for (int k = 0; k < keys.count; k += 2) {
        const int64_t pair = keys.index[k] / 2;
        const uint8_t count = k + 1 < keys.count ? 2 : 1;
        Lane* target = caches ? cached + pair * row : block + k / 2 * row;
        if (!caches || num_cached[pair] != count) {
          interleave_rows(row_of_key(k), count == 2 ? row_of_key(k + 1) : nullptr, dim, target);
        }
        if (caches) num_cached[pair] = count;
        rows[k / 2] = reinterpret_cast<const char*>(target);
      }
#endif
    }
  }
};

}  // namespace
}  // namespace fused_attn::cpu
