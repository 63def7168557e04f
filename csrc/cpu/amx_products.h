// The two products of forward with AMX, for a block of keys and a block of queries at a time:
//
//   scores^T[key][query] = key[key] . query^T           the scores go through memory
//   acc^T[d][query]     += value^T[d] . probs^T
//
// `query` and `probs` lie in the scratch as pairs of bfloat16, which is what AMX wants of a right factor. Rows of keys
// are copied, and rows of values are transposed, to tiles.
#pragma once
#include "amx.h"
#include "key_rows.h"

#if defined(__AMX_BF16__)
namespace fused_attn::cpu {
namespace {

constexpr int kStepKeys = 2 * kAmxLanes;  // keys that one multiplication with values sums over

// The values of one head as tiles: 16 columns d of 32 keys. For the keys of a step, the tiles of all d follow one
// another.
//
// A thread keeps the tiles in a cache, as SummedRows does, because the next block of queries needs the same ones.
template <class Policy>
struct ValueTiles {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  static constexpr int64_t kMaxCachedBytes = int64_t{1} << 20;  // half of a typical second-level cache or less

  char* pairs;                        // memory for the interleaved rows of one step
  char* block;                        // memory for the tiles of one block of keys
  int64_t steps;                      // how many steps the cache has room for; 0 = no cache
  char* cached;                       // the tiles of all steps: those of keys 32 i ... 32 i + 31 are number i
  uint8_t* is_cached;                 // [step]
  RowSource<Storage>* cached_source;  // where the cached tiles come from; a pointer, because find() is const
  const char** tiles;                 // the result of find(): the tiles of the block

  static int64_t step_bytes(int dim) { return round_up(dim, kAmxRows) / kAmxRows * kAmxTileBytes; }

  // Takes the memory out of the arena. `visits`: as for SummedRows.
  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    steps = visits > 1 ? (p.seqlen_k + kStepKeys - 1) / kStepKeys : 0;
    if (steps * step_bytes(dim) > kMaxCachedBytes) steps = 0;
    pairs = arena.take<char>(step_bytes(dim));
    block = arena.take<char>(kBlockK / kStepKeys * step_bytes(dim));
    cached = arena.take<char>(steps * step_bytes(dim));
    is_cached = arena.take<uint8_t>(steps);
    cached_source = arena.take<RowSource<Storage>>(1);
    tiles = arena.take<const char*>(1);
    if (cached_source == nullptr) return;
    *cached_source = {};
    memset(pairs, 0, step_bytes(dim));  // columns behind the last one
  }

  // Finds the tiles of the keys of the block. Behind the last key, they hold zeros.
  FA_NOINLINE void find(const RowSource<Storage>& source, const KeyBlock& keys, int dim) const {
    const Storage* rows[kBlockK];
    source.find(keys, rows);
    // A step with fewer keys would need other tiles if more of its keys were visible.
    const bool caches = steps > 0 && keys.contiguous && keys.index[0] % kStepKeys == 0 && keys.count % kStepKeys == 0;
    if (caches && !(*cached_source == source)) {
      memset(is_cached, 0, steps);
      *cached_source = source;
    }
    const int64_t first = keys.index[0] / kStepKeys;
    char* const target = caches ? cached + first * step_bytes(dim) : block;
    for (int k = 0, step = 0; k < keys.count; k += kStepKeys, ++step) {
      if (caches && is_cached[first + step] != 0) continue;
      transpose_step(rows + k, keys.count - k, dim, target + step * step_bytes(dim));
      if (caches) is_cached[first + step] = 1;
    }
    *tiles = target;
  }

 private:
  // Makes the tiles of the first 32 of `count` keys.
  void transpose_step(const Storage* const* rows, int count, int dim, char* target) const {
    const int64_t row_lanes = round_up(dim, kAmxRows);
    Lane* const interleaved = reinterpret_cast<Lane*>(pairs);
    for (int pair = 0; pair < kAmxLanes; ++pair) {
      Lane* const row = interleaved + pair * row_lanes;
      const auto row_of_key = [&](int k) { return k < count ? reinterpret_cast<const uint16_t*>(rows[k]) : nullptr; };
      if (2 * pair < count) {
        interleave_rows(row_of_key(2 * pair), row_of_key(2 * pair + 1), dim, row);
      } else {
        memset(row, 0, row_lanes * sizeof(Lane));
      }
    }
    for (int64_t d = 0; d < row_lanes; d += kAmxRows, target += kAmxTileBytes) {
      Vec<Lane> tile[kAmxRows];
      FA_UNROLL
      for (int pair = 0; pair < kAmxLanes; ++pair) tile[pair] = load<Lane>(interleaved + pair * row_lanes + d);
      transpose<Lane>(tile);
      FA_UNROLL
      for (int i = 0; i < kAmxRows; ++i) store<Lane>(reinterpret_cast<Lane*>(target) + i * kAmxLanes, tile[i]);
    }
  }
};

// The lanes of a row of queries or keys, rounded up to whole tiles.
template <class Policy>
int64_t tiled_lanes(int64_t head_dim) {
  return round_up(Policy::lanes_for(static_cast<int>(head_dim)), kAmxLanes);
}

// Computes scores[key of the block][stride], without scale, for the keys of the block, rounded up to whole tiles.
// `key_rows`: the row of each key, as lanes. `key_tiles`: memory for their copies.
template <class Policy>
FA_NOINLINE void multiply_keys_by_queries(const char* const* key_rows, int count, int head_dim,
                                          const typename Policy::Lane* query, int64_t stride,
                                          typename Policy::Lane* key_tiles, typename Policy::Lane* scores) {
  using Lane = typename Policy::Lane;
  const int64_t row_lanes = tiled_lanes<Policy>(head_dim), row_bytes = row_lanes * sizeof(Lane);
  const int rows = static_cast<int>(round_up(count, kAmxRows));
  for (int k = 0; k < count; ++k) {
    const auto* const row = reinterpret_cast<const typename Policy::Storage*>(key_rows[k]);
    for (int d = 0; d < row_lanes; d += kAmxLanes)
      store<Lane>(key_tiles + k * row_lanes + d, load_lanes<Policy>(row, d, head_dim));
  }
  memset(key_tiles + count * row_lanes, 0, (rows - count) * row_bytes);
  const int64_t stride_bytes = stride * sizeof(Lane);
  multiply_amx({reinterpret_cast<const char*>(key_tiles), row_bytes, kAmxRows * row_bytes, kAmxRowBytes},
               {reinterpret_cast<const char*>(query), stride_bytes, kAmxRowBytes, kAmxRows * stride_bytes},
               static_cast<int>(row_lanes) / kAmxLanes, rows / kAmxRows, static_cast<int>(stride) / kAmxLanes,
               {reinterpret_cast<char*>(scores), stride_bytes, kAmxRows * stride_bytes, 0}, /*accumulates=*/false);
}

// acc[d][stride] = acc * rescale + the product of the values and the probs of the block. Queries outside of the range
// of a tile of keys have no probs for it.
template <class Policy>
FA_NOINLINE void multiply_values_by_probs(const ValueTiles<Policy>& values, int value_dim, typename Policy::Lane* probs,
                                          const Vec<typename Policy::Lane>* rescale, const VectorRange* ranges,
                                          int count, int vectors, typename Policy::Lane* acc) {
  using Lane = typename Policy::Lane;
  const int64_t stride = vectors * kAmxLanes, stride_bytes = stride * sizeof(Lane);
  const int tiles = (count + kTileKeys - 1) / kTileKeys, steps = (count + kStepKeys - 1) / kStepKeys;
  constexpr int kPairs = kTileKeys / Policy::kPerLane;  // of a tile of keys
  for (int t = 0; t < tiles; ++t) {
    for (int v = 0; v < vectors; ++v) {
      if (v >= ranges[t].begin && v < ranges[t].end) continue;
      for (int pair = 0; pair < kPairs; ++pair)
        store<Lane>(probs + (t * kPairs + pair) * stride + v * kAmxLanes, Vec<Lane>{});
    }
  }
  memset(probs + tiles * kPairs * stride, 0, (steps * kAmxLanes - tiles * kPairs) * stride_bytes);
  for (int v = 0; v < vectors; ++v) {
    if (!any_positive<Lane>(Lane(1) - rescale[v])) continue;  // no reference has risen
    for (int d = 0; d < value_dim; ++d) {
      Lane* const sum = acc + d * stride + v * kAmxLanes;
      store<Lane>(sum, load<Lane>(sum) * rescale[v]);
    }
  }
  const int64_t step_bytes = values.step_bytes(value_dim);
  multiply_amx({*values.tiles, kAmxRowBytes, kAmxTileBytes, step_bytes},
               {reinterpret_cast<const char*>(probs), stride_bytes, kAmxRowBytes, kAmxRows * stride_bytes}, steps,
               static_cast<int>(step_bytes / kAmxTileBytes), vectors,
               {reinterpret_cast<char*>(acc), stride_bytes, kAmxRows * stride_bytes, 0}, /*accumulates=*/true);
}

}  // namespace
}  // namespace fused_attn::cpu
#endif
