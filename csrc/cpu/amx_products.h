// The products of forward and backward with AMX, for a block of keys and a block of queries at a time:
//
//   multiply_rows_by_columns   scores^T[key][query] = key[key] . query^T; likewise value . dout^T
//   add_sum_over_keys          acc^T[d][query]     += value^T[d] . probs^T; likewise dquery from key and dscores
//   sum_over_queries           dvalue[key][d]       = probs^T[key] . dout[d]; likewise dkey from dscores and query
//
// The right factors lie in the scratch as pairs of bfloat16, which is what AMX wants. Left factors are read from the
// tensors, or copied or transposed to tiles. Results go through memory.
#pragma once
#include "amx.h"
#include "key_rows.h"
#include "pack.h"

namespace fused_attn::cpu {
namespace {

template <class Policy>
struct SummedTiles;

// What depends on whether AMX multiplies: the rows of a block of keys in the form that a sum over keys reads, what a
// thread has to hold while it multiplies, and the lanes that copies of the rows of a block of keys take.
template <class Policy, bool kUsesAmx = Policy::kUsesAmx>
struct Products {
  using RowsToSum = SummedRows<Policy>;
  struct Registers {};
  static int64_t copy_lanes(int64_t dim) {
    if (!Policy::kConverts && dim % Policy::kPerLane == 0) return 0;
    return kBlockRows * round_up(Policy::lanes_for(static_cast<int>(dim)), kLanes<typename Policy::Lane>);
  }
};

// The products. Only a file that is compiled for AMX defines them.
template <class Policy>
void multiply_rows_by_columns(const char* const* rows, int count, int dim, const typename Policy::Lane* columns,
                              int64_t stride, typename Policy::Lane* row_tiles, typename Policy::Lane* products);
template <class Policy>
void add_sum_over_keys(const SummedTiles<Policy>& rows, int dim, typename Policy::Lane* coefficients,
                       const Vec<typename Policy::Lane>* rescale, const VectorRange* ranges, int count, int vectors,
                       typename Policy::Lane* acc);
template <class Policy>
void sum_over_queries(BFloat16* coefficients, int64_t stride, int64_t coefficient_part, const VectorRange* ranges,
                      int count, int nq, typename Policy::Lane* rows, int64_t row_lanes, int64_t row_part,
                      typename Policy::Lane* sums);

#if defined(__AMX_BF16__)

constexpr int kStepRows = 2 * kAmxLanes;  // keys, or queries, that one multiplication sums over

// The lanes of a row of `dim` elements as pairs, rounded up to whole tiles.
inline int64_t tiled_lanes(int64_t dim) { return round_up(dim, 2 * kAmxLanes) / 2; }

// The rows of one head of key or value as tiles: 16 columns d of 32 keys. For the keys of a step, the tiles of all d
// follow one another, those of the first part first.
//
// A thread keeps the tiles in a cache, as SummedRows does, because the next block of queries needs the same ones.
template <class Policy>
struct SummedTiles {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  char* pairs;                        // memory for the interleaved rows of one step
  char* block;                        // memory for the tiles of one block of keys
  Lane* sums;                         // memory for the sum over a block of keys, if factors have several parts
  int64_t steps;                      // how many steps the cache has room for; 0 = no cache
  char* cached;                       // the tiles of all steps: those of keys 32 i ... 32 i + 31 are number i
  uint8_t* is_cached;                 // [step]
  RowSource<Storage>* cached_source;  // where the cached tiles come from; a pointer, because find() is const
  const char** tiles;                 // the result of find(): the tiles of the block

  static int64_t part_bytes(int dim) { return round_up(dim, kAmxRows) / kAmxRows * kAmxTileBytes; }
  static int64_t step_bytes(int dim) { return Policy::kParts * part_bytes(dim); }

  // Takes the memory out of the arena. `visits`: as for SummedRows.
  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    steps = visits > 1 ? (p.seqlen_k + kStepRows - 1) / kStepRows : 0;
    if (steps * step_bytes(dim) > SummedRows<Policy>::kMaxCachedBytes) steps = 0;
    pairs = arena.take<char>(step_bytes(dim));
    block = arena.take<char>(kBlockK / kStepRows * step_bytes(dim));
    sums = arena.take<Lane>(Policy::kParts > 1 ? round_up(dim, kAmxRows) * kBlockQ : 0);
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
    const bool caches = steps > 0 && keys.contiguous && keys.index[0] % kStepRows == 0 && keys.count % kStepRows == 0;
    if (caches && !(*cached_source == source)) {
      memset(is_cached, 0, steps);
      *cached_source = source;
    }
    const int64_t first = keys.index[0] / kStepRows;
    char* const target = caches ? cached + first * step_bytes(dim) : block;
    for (int k = 0, step = 0; k < keys.count; k += kStepRows, ++step) {
      if (caches && is_cached[first + step] != 0) continue;
      transpose_step(rows + k, keys.count - k, dim, target + step * step_bytes(dim));
      if (caches) is_cached[first + step] = 1;
    }
    *tiles = target;
  }

 private:
  // Makes the tiles of the first 32 of `count` keys.
  void transpose_step(const Storage* const* rows, int count, int dim, char* target) const {
    const int64_t row_lanes = round_up(dim, kAmxRows), next_part = kAmxLanes * row_lanes;
    Lane* const interleaved = reinterpret_cast<Lane*>(pairs);
    for (int pair = 0; pair < kAmxLanes; ++pair) {
      Lane* const row = interleaved + pair * row_lanes;
      const auto row_of_key = [&](int k) { return k < count ? rows[k] : nullptr; };
      if (2 * pair < count) {
        interleave<Policy>(row_of_key(2 * pair), row_of_key(2 * pair + 1), dim, next_part, row);
        continue;
      }
      for (int part = 0; part < Policy::kParts; ++part) memset(row + part * next_part, 0, row_lanes * sizeof(Lane));
    }
    for (const Lane* part = interleaved; part < interleaved + Policy::kParts * next_part; part += next_part) {
      for (int64_t d = 0; d < row_lanes; d += kAmxRows, target += kAmxTileBytes) {
        Vec<Lane> tile[kAmxRows];
        FA_UNROLL
        for (int pair = 0; pair < kAmxLanes; ++pair) tile[pair] = load<Lane>(part + pair * row_lanes + d);
        transpose<Lane>(tile);
        FA_UNROLL
        for (int i = 0; i < kAmxRows; ++i) store<Lane>(reinterpret_cast<Lane*>(target) + i * kAmxLanes, tile[i]);
      }
    }
  }
};

// Copies rows of floats to tiles of their parts, one row of tiles after the other. In such a row, the parts of a step
// follow one another. Rows from `count` on are zero.
template <class Policy>
FA_NOINLINE void copy_parts(const char* const* rows, int count, int dim, float* row_tiles) {
  constexpr int kTile = kAmxRows * kAmxLanes;
  for (int first = 0; first < count; first += kAmxRows) {
    for (int d = 0; d < dim; d += 2 * kAmxLanes, row_tiles += Policy::kParts * kTile) {
      for (int i = 0; i < kAmxRows; ++i) {
        Vec<float> pairs[Policy::kParts] = {};
        if (first + i < count) load_parts(reinterpret_cast<const float*>(rows[first + i]), d, dim, pairs);
        FA_UNROLL
        for (int part = 0; part < Policy::kParts; ++part)
          store<float>(row_tiles + part * kTile + i * kAmxLanes, pairs[part]);
      }
    }
  }
}

// products[i][stride] = rows[i] . columns^T, for `count` rows of `dim` elements, rounded up to whole tiles. The columns
// are those of queries, or of dout, transposed by pack_columns. `row_tiles`: memory for copies of the rows, which may
// lie there already if they have one part.
//
// Rows that lie at equal distances are read where they are: copying them takes 8 to 17 % of forward. If the distance is
// a multiple of 4096 bytes, the rows of a tile do not fit into the first-level cache together.
template <class Policy>
FA_NOINLINE void multiply_rows_by_columns(const char* const* rows, int count, int dim,
                                          const typename Policy::Lane* columns, int64_t stride,
                                          typename Policy::Lane* row_tiles, typename Policy::Lane* products) {
  using Lane = typename Policy::Lane;
  const int64_t lanes = tiled_lanes(dim), row_bytes = lanes * sizeof(Lane), stride_bytes = stride * sizeof(Lane);
  const int64_t column_bytes = factor_stride<Policy>(stride) * sizeof(Lane);
  const int steps = static_cast<int>(lanes) / kAmxLanes;
  const int tiled_count = static_cast<int>(round_up(count, kAmxRows));
  const auto multiply = [&](const AmxMatrix<const char>& left, int first, int tiles) {
    if (tiles == 0) return;
    multiply_amx<Policy::kParts>(
        left,
        {reinterpret_cast<const char*>(columns), column_bytes, kAmxRowBytes, kAmxRows * column_bytes,
         lanes * column_bytes},
        steps, tiles, static_cast<int>(stride) / kAmxLanes,
        {reinterpret_cast<char*>(products + first * stride), stride_bytes, kAmxRows * stride_bytes, 0, 0},
        /*accumulates=*/false);
  };
  if constexpr (Policy::kParts > 1) {
    copy_parts<Policy>(rows, count, dim, row_tiles);
    constexpr int64_t kStepBytes = Policy::kParts * kAmxTileBytes;
    multiply({reinterpret_cast<const char*>(row_tiles), kAmxRowBytes, steps * kStepBytes, kStepBytes, kAmxTileBytes}, 0,
             tiled_count / kAmxRows);
    return;
  }
  const int64_t distance = count > 1 ? rows[1] - rows[0] : 0;
  int direct_rows = dim % (2 * kAmxLanes) == 0 && distance % 4096 != 0 ? count / kAmxRows * kAmxRows : 0;
  for (int i = 1; i < direct_rows; ++i) {
    if (rows[i] - rows[i - 1] != distance) direct_rows = 0;
  }
  multiply({rows[0], distance, kAmxRows * distance, kAmxRowBytes, 0}, 0, direct_rows / kAmxRows);
  for (int i = direct_rows; i < count; ++i) {
    const auto* const row = reinterpret_cast<const typename Policy::Storage*>(rows[i]);
    for (int d = 0; d < lanes; d += kAmxLanes) store<Lane>(row_tiles + i * lanes + d, load_lanes<Policy>(row, d, dim));
  }
  memset(row_tiles + count * lanes, 0, (tiled_count - count) * row_bytes);
  multiply({reinterpret_cast<const char*>(row_tiles + direct_rows * lanes), row_bytes, kAmxRows * row_bytes,
            kAmxRowBytes, 0},
           direct_rows, (tiled_count - direct_rows) / kAmxRows);
}

// acc[d][stride] = acc * rescale + sum over the keys of the block of rows[key][d] * coefficients[key][query]. The
// coefficients are pairs of keys [part][pair][stride]. Queries outside of the range of a tile of keys have none for it.
template <class Policy>
FA_NOINLINE void add_sum_over_keys(const SummedTiles<Policy>& rows, int dim, typename Policy::Lane* coefficients,
                                   const Vec<typename Policy::Lane>* rescale, const VectorRange* ranges, int count,
                                   int vectors, typename Policy::Lane* acc) {
  using Lane = typename Policy::Lane;
  const int64_t stride = vectors * kAmxLanes, stride_bytes = stride * sizeof(Lane);
  const int64_t pair_stride = factor_stride<Policy>(stride), pair_bytes = pair_stride * sizeof(Lane);
  const int64_t next_part = part_lanes<Policy>(stride);
  const int tiles = (count + kTileKeys - 1) / kTileKeys, steps = (count + kStepRows - 1) / kStepRows;
  constexpr int kPairs = kTileKeys / 2;  // of a tile of keys
  for (Lane* part = coefficients; part < coefficients + Policy::kParts * next_part; part += next_part) {
    for (int t = 0; t < tiles; ++t) {
      for (int v = 0; v < vectors; ++v) {
        if (v >= ranges[t].begin && v < ranges[t].end) continue;
        for (int pair = 0; pair < kPairs; ++pair)
          store<Lane>(part + (t * kPairs + pair) * pair_stride + v * kAmxLanes, Vec<Lane>{});
      }
    }
    memset(part + tiles * kPairs * pair_stride, 0, (steps * kAmxLanes - tiles * kPairs) * pair_bytes);
  }
  const int64_t step_bytes = rows.step_bytes(dim), part_bytes = rows.part_bytes(dim);
  const auto multiply = [&](Lane* target, bool accumulates) {
    multiply_amx<Policy::kParts>({*rows.tiles, kAmxRowBytes, kAmxTileBytes, step_bytes, part_bytes},
                                 {reinterpret_cast<const char*>(coefficients), pair_bytes, kAmxRowBytes,
                                  kAmxRows * pair_bytes, next_part * static_cast<int64_t>(sizeof(Lane))},
                                 steps, static_cast<int>(part_bytes / kAmxTileBytes), vectors,
                                 {reinterpret_cast<char*>(target), stride_bytes, kAmxRows * stride_bytes, 0, 0},
                                 accumulates);
  };
  if constexpr (Policy::kParts > 1) {
    // As in outer_tile, a sum of sums of blocks has smaller rounding errors than one long sum.
    multiply(rows.sums, /*accumulates=*/false);
    for (int d = 0; d < dim; ++d) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t i = d * stride + v * kAmxLanes;
        store<Lane>(acc + i, load<Lane>(acc + i) * rescale[v] + load<Lane>(rows.sums + i));
      }
    }
    return;
  }
  for (int v = 0; v < vectors; ++v) {
    if (!any_positive<Lane>(Lane(1) - rescale[v])) continue;  // no reference has risen
    for (int d = 0; d < dim; ++d) {
      Lane* const sum = acc + d * stride + v * kAmxLanes;
      store<Lane>(sum, load<Lane>(sum) * rescale[v]);
    }
  }
  multiply(acc, /*accumulates=*/true);
}

// sums[key of the block][row_lanes] = sum over queries q of coefficients[key][q] * rows[q][d], for `count` keys and nq
// queries. The rows are interleaved pairs of queries [part][pair][row_lanes], and `row_part` is the distance of their
// parts. Coefficients begin `stride` elements apart, a multiple of kStepRows, and their parts `coefficient_part`
// elements. Queries outside of the range of a tile of keys have none for it.
template <class Policy>
FA_NOINLINE void sum_over_queries(BFloat16* coefficients, int64_t stride, int64_t coefficient_part,
                                  const VectorRange* ranges, int count, int nq, typename Policy::Lane* rows,
                                  int64_t row_lanes, int64_t row_part, typename Policy::Lane* sums) {
  using Lane = typename Policy::Lane;
  constexpr int64_t kVectorOf16Bits = kAmxLanes * sizeof(BFloat16);
  const int tiled_count = static_cast<int>(round_up(count, kAmxRows)), steps = static_cast<int>(stride) / kStepRows;
  const int64_t row_stride = factor_stride<Policy>(row_lanes), row_stride_bytes = row_stride * sizeof(Lane);
  const int pairs = (nq + 1) / 2;
  for (int part = 0; part < Policy::kParts; ++part) {
    BFloat16* const own = coefficients + part * coefficient_part;
    for (int k = 0; k < tiled_count; ++k) {
      const VectorRange range = k < count ? ranges[k / kTileKeys] : VectorRange{0, 0};
      for (int v = 0; v < stride / kAmxLanes; ++v) {
        if (v < range.begin || v >= range.end)
          memset(static_cast<void*>(own + k * stride + v * kAmxLanes), 0, kVectorOf16Bits);
      }
    }
    memset(rows + part * row_part + pairs * row_stride, 0, (steps * kAmxLanes - pairs) * row_stride * sizeof(Lane));
  }
  const int64_t coefficient_bytes = stride * sizeof(BFloat16), row_bytes = row_lanes * sizeof(Lane);
  multiply_amx<Policy::kParts>({reinterpret_cast<const char*>(coefficients), coefficient_bytes,
                                kAmxRows * coefficient_bytes, kAmxRowBytes,
                                coefficient_part * static_cast<int64_t>(sizeof(BFloat16))},
                               {reinterpret_cast<const char*>(rows), row_stride_bytes, kAmxRowBytes, kAmxRows * row_stride_bytes,
                                row_part * static_cast<int64_t>(sizeof(Lane))},
                               steps, tiled_count / kAmxRows, static_cast<int>(row_lanes) / kAmxLanes,
                               {reinterpret_cast<char*>(sums), row_bytes, kAmxRows * row_bytes, 0, 0},
                               /*accumulates=*/false);
}

template <class Policy>
struct Products<Policy, true> {
  using RowsToSum = SummedTiles<Policy>;
  using Registers = AmxRegisters;
  static int64_t copy_lanes(int64_t dim) { return kBlockK * Policy::kParts * tiled_lanes(dim); }
};

#endif

template <class Policy>
using RowsToSum = typename Products<Policy>::RowsToSum;
template <class Policy>
using MatrixRegisters = typename Products<Policy>::Registers;

}  // namespace
}  // namespace fused_attn::cpu
