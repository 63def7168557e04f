// Finds the rows of a block's keys and values, or converts them to what a product reads.
#pragma once
#include "key_blocks.h"

namespace fused_attn::cpu {
namespace {

// Finds the rows of the block's keys as rows of lanes. If memory holds lanes, `rows` point into memory. Otherwise the
// rows are converted into `scratch` (rows of round_up(dim, lanes) lanes). Sets kTileKeys pointers behind the last key
// as well.
template <class Policy>
FA_NOINLINE void find_rows(const typename Policy::Storage* base, int64_t stride_row, const KeyBlock& keys, int dim,
                           typename Policy::Lane* scratch, const char** rows) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  if (Policy::kPerLane == 1 ? !Policy::kConverts : dim % 2 == 0) {
    for (int k = 0; k < keys.count; ++k) rows[k] = reinterpret_cast<const char*>(base + keys.index[k] * stride_row);
  } else {
    const int lanes = Policy::lanes_for(dim);
    const int64_t row = round_up(lanes, n);
    for (int k = 0; k < keys.count; ++k) {
      const typename Policy::Storage* source = base + keys.index[k] * stride_row;
      for (int d = 0; d < lanes; d += n) store<Lane>(scratch + k * row + d, load_lanes<Policy>(source, d, dim));
      rows[k] = reinterpret_cast<const char*>(scratch + k * row);
    }
  }
  for (int k = keys.count; k < keys.count + kTileKeys; ++k) rows[k] = rows[keys.count - 1];
}

// Rows of one head for sums over its keys. If lanes hold pairs, rows of neighbouring keys are interleaved.
//
// A thread caches such pairs for the next blocks of queries, as long as the rows begin at the same address: they are
// then the same rows, because one call has one stride between rows. A block that begins at an odd key, or has holes, is
// interleaved each time.
template <class Policy>
struct SummedRows {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  static constexpr int64_t kMaxCachedBytes = int64_t{1} << 20;  // what a second-level cache holds

  const char** rows;            // the rows of the block's keys, or pairs of keys
  Lane* block;                  // these rows, if memory does not hold them and they are not cached
  int64_t pairs;                // how many pairs can be cached
  Lane* cached;                 // [pair of keys 2 i, 2 i + 1][dim, padded]
  uint8_t* is_cached;           // [pair]
  const Storage** cached_base;  // where the cached rows begin; a pointer, because functions get the scratch as constant

  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    const int64_t row = round_up(dim, kLanes<Lane>);
    pairs = Policy::kPerLane == 2 && visits > 1 ? (p.seqlen_k + 1) / 2 : 0;
    if (pairs * row * static_cast<int64_t>(sizeof(Lane)) > kMaxCachedBytes) pairs = 0;
    rows = arena.take<const char*>(kBlockK + kTileKeys);
    block = arena.take<Lane>(Policy::kConverts || Policy::kPerLane == 2 ? (kBlockK + kTileKeys) * row : 0);
    cached = arena.take<Lane>(pairs * row);
    is_cached = arena.take<uint8_t>(pairs);
    cached_base = arena.take<const Storage*>(1);
    if (cached_base != nullptr) *cached_base = nullptr;
  }

  FA_NOINLINE void find(const Storage* base, int64_t stride_row, const KeyBlock& keys, int dim) const {
    if constexpr (Policy::kPerLane == 1) {
      find_rows<Policy>(base, stride_row, keys, dim, block, rows);
    } else {
#if defined(__AVX512BF16__)
      const int64_t row = round_up(dim, kLanes<Lane>);
      const auto source = [&](int k) { return reinterpret_cast<const uint16_t*>(base + keys.index[k] * stride_row); };
      const bool caches = pairs > 0 && keys.contiguous && keys.index[0] % 2 == 0 && keys.count % 2 == 0;
      if (caches && *cached_base != base) {
        memset(is_cached, 0, pairs);
        *cached_base = base;
      }
      for (int k = 0; k < keys.count; k += 2) {
        const int64_t pair = keys.index[k] / 2;
        Lane* target = caches ? cached + pair * row : block + k / 2 * row;
        if (!caches || is_cached[pair] == 0) {
          interleave_rows(source(k), k + 1 < keys.count ? source(k + 1) : nullptr, dim, target);
        }
        if (caches) is_cached[pair] = 1;
        rows[k / 2] = reinterpret_cast<const char*>(target);
      }
#endif
    }
  }
};

}  // namespace
}  // namespace fused_attn::cpu
