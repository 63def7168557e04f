// The products of forward and backward with AMX, for a block of keys and a block of queries at a time:
//
//   multiply_rows_by_columns   scores^T[key][query] = key[key] . query^T; likewise value . dout^T
//   add_sum_over_keys          acc^T[d][query]     += value^T[d] . probs^T; likewise dquery from key and dscores
//   sum_over_queries           dvalue[key][d]       = probs^T[key] . dout[d]; likewise dkey from dscores and query
//
// The right factors lie in the scratch as pairs of bfloat16, which is what AMX wants. Left factors are read from the
// tensors, or copied or transposed to tiles. Floats are always copied, as parts (float_parts.h). Results go through
// memory.
#pragma once
#include <type_traits>

#include "amx.h"
#include "key_rows.h"
#include "pack.h"

namespace fused_attn::cpu {
namespace {

template <class Policy>
struct SummedTiles;
template <class Policy>
struct RowTiles;

// What depends on whether AMX multiplies: the rows of a block of keys in the forms that the products read, and what a
// thread has to hold while it multiplies.
template <class Policy, bool kUsesAmx = Policy::kUsesAmx>
struct Products {
  using RowsToMultiply = FoundRows<Policy>;
  using RowsToSum = SummedRows<Policy>;
  struct Registers {};
};

// Whether AMX multiplies the floats of a sequence, if the policy has parts. Parts of keys and values take long to make,
// so more than one block of queries has to use them. On a Xeon, forward of 32 queries and keys took 1.33 of the time of
// AVX-512, of 64 0.99, of 96 0.94, and with backward 1.13, 1.05 and 0.96 (head dim 64); 512 queries and keys with head
// dim 8 1.63, 16 1.12, and 32 0.78. The choice depends on the sequence alone, and backward makes the same one, because
// it has to compute the scores of forward.
template <class Policy>
bool multiplies_parts(const AttentionParams& p, const Sequence& seq) {
  constexpr int64_t kShortRows = 56;  // of a key and a value together
  const int64_t queries = group_size_of(p) * seq.seqlen_q;
  return Policy::kParts > 1 && seq.seqlen_q >= kBlockQ && queries > kBlockQ && p.head_dim + p.value_dim >= kShortRows;
}

// The products. Only a file that is compiled for AMX defines them.
template <class Policy>
void multiply_rows_by_columns(const char* const* rows, int count, int dim, const typename Policy::Lane* columns,
                              int64_t stride, typename Policy::Lane* row_tiles, typename Policy::Lane* products);
template <class Policy>
void multiply_keys_by_columns(const typename Products<Policy>::RowsToMultiply& keys, int count, int dim,
                              const typename Policy::Lane* columns, int64_t stride, typename Policy::Lane* products);
template <class Policy>
void clear_unseen_pairs(typename Policy::Lane* coefficients, const VectorRange* ranges, int count, int vectors);
template <class Policy, class Meanwhile>
void add_sum_over_keys(const SummedTiles<Policy>& rows, int dim, const typename Policy::Lane* coefficients,
                       const Vec<typename Policy::Lane>* rescale, int count, int vectors, typename Policy::Lane* acc,
                       const Meanwhile& meanwhile);
template <class Policy>
void sum_over_queries(BFloat16* coefficients, int64_t stride, int64_t coefficient_part, const VectorRange* ranges,
                      int count, int nq, typename Policy::Lane* rows, int64_t row_lanes, int64_t row_part,
                      typename Policy::Lane* sums);

#if defined(__AMX_BF16__)

constexpr int kStepRows = 2 * kAmxLanes;  // keys, or queries, that one multiplication sums over

// The lanes of a row of `dim` elements as pairs, rounded up to whole tiles.
inline int64_t tiled_lanes(int64_t dim) { return round_up(dim, 2 * kAmxLanes) / 2; }

// The rows of one head of key or value in the form of tiles, for the keys of a block. What the tiles hold is up to the
// caller, who fills them for 32 keys at a time, a step.
//
// A thread keeps the tiles in a cache, as SummedRows does, because the next block of queries needs the same ones.
template <class Policy>
struct CachedTiles {
  using Storage = typename Policy::Storage;
  static_assert(kStepRows == kKeyStep<Policy>);

  // To make the parts of floats takes longer than to read them from the third-level cache: with head dim 128 and 2048
  // keys, which take 1.5 MiB, forward takes 0.85 of the time with a cache.
  static constexpr int64_t kMaxCachedBytes =
      Policy::kParts > 1 ? int64_t{2} << 20 : SummedRows<Policy>::kMaxCachedBytes;

  char* block;                        // memory for the tiles of one block of keys
  int64_t steps;                      // how many steps the cache has room for; 0 = no cache
  char* cached;                       // the tiles of all steps: those of keys 32 i ... 32 i + 31 are number i
  uint8_t* num_cached;                // [step]: how many of its keys the cache holds
  RowSource<Storage>* cached_source;  // where the cached tiles come from; a pointer, because find() is const

  // Takes the memory out of the arena. `visits`: as for SummedRows.
  void layout(Arena& arena, const AttentionParams& p, int64_t step_bytes, int64_t visits) {
    steps = visits > 1 ? (p.seqlen_k + kStepRows - 1) / kStepRows : 0;
    if (steps * step_bytes > kMaxCachedBytes) steps = 0;
    block = arena.take<char>(kBlockK / kStepRows * step_bytes);
    cached = arena.take<char>(steps * step_bytes);
    num_cached = arena.take<uint8_t>(steps);
    cached_source = arena.take<RowSource<Storage>>(1);
    if (cached_source != nullptr) *cached_source = {};
  }

  // Returns the tiles of the keys of the block. fill(rows, count, tiles) makes those of a step, of `count` keys. If
  // there are fewer than 32, it sets the others to zero.
  template <class Fill>
  const char* find(const RowSource<Storage>& source, const KeyBlock& keys, int64_t step_bytes, const Fill& fill) const {
    const Storage* rows[kBlockK];
    source.find(keys, rows);
    const bool caches = steps > 0 && keys.contiguous && keys.index[0] % kStepRows == 0;
    if (caches && !(*cached_source == source)) {
      memset(num_cached, 0, steps);
      *cached_source = source;
    }
    const int64_t first = keys.index[0] / kStepRows;
    char* const target = caches ? cached + first * step_bytes : block;
    for (int k = 0, step = 0; k < keys.count; k += kStepRows, ++step) {
      // Tiles of more keys than the block has would multiply rows that its queries do not see.
      const int count = keys.count - k < kStepRows ? keys.count - k : kStepRows;
      if (caches && num_cached[first + step] == count) continue;
      fill(rows + k, count, target + step * step_bytes);
      if (caches) num_cached[first + step] = static_cast<uint8_t>(count);
    }
    return target;
  }
};

// The rows for a sum over keys: tiles of 16 columns d of 32 keys. For the keys of a step, the tiles of all d follow one
// another, those of the first part first.
template <class Policy>
struct SummedTiles {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  char* pairs;         // memory for the interleaved rows of one step
  Lane* sums;          // memory for the sum over a block of keys, if factors have several parts
  const char** tiles;  // the result of find(); a pointer, because find() is const
  CachedTiles<Policy> cache;

  static int64_t part_bytes(int dim) { return round_up(dim, kAmxRows) / kAmxRows * kAmxTileBytes; }
  static int64_t step_bytes(int dim) { return Policy::kParts * part_bytes(dim); }

  // Takes the memory out of the arena. `visits`: as for SummedRows.
  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    pairs = arena.take<char>(step_bytes(dim));
    sums = arena.take<Lane>(Policy::kParts > 1 ? round_up(dim, kAmxRows) * kBlockQ : 0);
    tiles = arena.take<const char*>(1);
    cache.layout(arena, p, step_bytes(dim), visits);
    if (tiles != nullptr) memset(pairs, 0, step_bytes(dim));  // columns behind the last one
  }

  // Finds the tiles of the keys of the block.
  FA_NOINLINE void find(const RowSource<Storage>& source, const KeyBlock& keys, int dim) const {
    *tiles = cache.find(source, keys, step_bytes(dim), [&](const Storage* const* rows, int count, char* target) {
      transpose_step(rows, count, dim, target);
    });
  }

 private:
  // Makes the tiles of `count` keys.
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

// The bytes of the parts of 16 rows of `dim` floats, as copy_parts stores them.
template <class Policy>
int64_t parts_bytes(int dim) {
  return Policy::kParts * tiled_lanes(dim) / kAmxLanes * kAmxTileBytes;
}

// Copies rows of floats to tiles of their parts, one row of tiles after the other. In such a row, the parts of a step
// of 32 columns follow one another. Rows from `count` on are zero, up to a whole tile.
template <class Policy, class Row>
FA_NOINLINE void copy_parts(const Row* const* rows, int count, int dim, char* target) {
  for (int first = 0; first < count; first += kAmxRows) {
    for (int d = 0; d < dim; d += 2 * kAmxLanes, target += Policy::kParts * kAmxTileBytes) {
      for (int i = 0; i < kAmxRows; ++i) {
        Vec<float> pairs[Policy::kParts] = {};
        if (first + i < count) load_parts(reinterpret_cast<const float*>(rows[first + i]), d, dim, pairs);
        FA_UNROLL
        for (int part = 0; part < Policy::kParts; ++part)
          store<float>(reinterpret_cast<float*>(target + part * kAmxTileBytes) + i * kAmxLanes, pairs[part]);
      }
    }
  }
}

// The rows for products with columns: tiles of 16 keys and 32 columns d, as copy_parts stores them.
template <class Policy>
struct RowTiles {
  const char** tiles;  // the result of find(); a pointer, because find() is const
  CachedTiles<Policy> cache;
  float* copies;  // memory for tiles of other rows, as many as a block has keys

  // Takes the memory out of the arena. `visits`: as for SummedRows.
  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    tiles = arena.take<const char*>(1);
    cache.layout(arena, p, 2 * parts_bytes<Policy>(dim), visits);
    copies = reinterpret_cast<float*>(cache.block);
  }

  // Finds the tiles of the keys of the block.
  FA_NOINLINE void find(const RowSource<float>& source, const KeyBlock& keys, int dim) const {
    const int64_t step_bytes = 2 * parts_bytes<Policy>(dim);
    *tiles = cache.find(source, keys, step_bytes, [&](const float* const* rows, int count, char* target) {
      if (count <= kAmxRows) memset(target + step_bytes / 2, 0, step_bytes / 2);
      copy_parts<Policy>(rows, count, dim, target);
    });
  }
};

// products[i][stride] = rows[i] . columns^T, for `count` rows of `dim` floats, rounded up to whole tiles, whose tiles
// copy_parts has stored. The columns are those of queries, or of dout, transposed by pack_columns.
template <class Policy>
FA_NOINLINE void multiply_parts_by_columns(const char* row_tiles, int count, int dim, const float* columns,
                                           int64_t stride, float* products) {
  const int64_t lanes = tiled_lanes(dim), stride_bytes = stride * sizeof(float);
  const int64_t column_bytes = factor_stride<Policy>(stride) * sizeof(float);
  multiply_amx<Policy::kParts>(
      {row_tiles, kAmxRowBytes, parts_bytes<Policy>(dim), Policy::kParts * kAmxTileBytes, kAmxTileBytes},
      {reinterpret_cast<const char*>(columns), column_bytes, kAmxRowBytes, kAmxRows * column_bytes,
       lanes * column_bytes},
      static_cast<int>(lanes) / kAmxLanes, (count + kAmxRows - 1) / kAmxRows, static_cast<int>(stride) / kAmxLanes,
      {reinterpret_cast<char*>(products), stride_bytes, kAmxRows * stride_bytes, 0, 0},
      /*accumulates=*/false);
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
  if constexpr (Policy::kParts > 1) {
    copy_parts<Policy>(rows, count, dim, reinterpret_cast<char*>(row_tiles));
    multiply_parts_by_columns<Policy>(reinterpret_cast<const char*>(row_tiles), count, dim, columns, stride, products);
    return;
  }
  const int64_t lanes = tiled_lanes(dim), row_bytes = lanes * sizeof(Lane), stride_bytes = stride * sizeof(Lane);
  const int64_t distance = count > 1 ? rows[1] - rows[0] : 0;
  int direct_rows = dim % (2 * kAmxLanes) == 0 && distance % 4096 != 0 ? count / kAmxRows * kAmxRows : 0;
  for (int i = 1; i < direct_rows; ++i) {
    if (rows[i] - rows[i - 1] != distance) direct_rows = 0;
  }
  const auto multiply = [&](const char* left, int64_t left_bytes, int first, int tiles) {
    if (tiles == 0) return;
    multiply_amx<1>({left, left_bytes, kAmxRows * left_bytes, kAmxRowBytes, 0},
                    {reinterpret_cast<const char*>(columns), stride_bytes, kAmxRowBytes, kAmxRows * stride_bytes, 0},
                    static_cast<int>(lanes) / kAmxLanes, tiles, static_cast<int>(stride) / kAmxLanes,
                    {reinterpret_cast<char*>(products + first * stride), stride_bytes, kAmxRows * stride_bytes, 0, 0},
                    /*accumulates=*/false);
  };
  multiply(rows[0], distance, 0, direct_rows / kAmxRows);
  for (int i = direct_rows; i < count; ++i) {
    const auto* const row = reinterpret_cast<const typename Policy::Storage*>(rows[i]);
    for (int d = 0; d < lanes; d += kAmxLanes) store<Lane>(row_tiles + i * lanes + d, load_lanes<Policy>(row, d, dim));
  }
  const int tiled_count = static_cast<int>(round_up(count, kAmxRows));
  memset(row_tiles + count * lanes, 0, (tiled_count - count) * row_bytes);
  multiply(reinterpret_cast<const char*>(row_tiles + direct_rows * lanes), row_bytes, direct_rows,
           (tiled_count - direct_rows) / kAmxRows);
}

// Sets those coefficients, pairs of keys [part][pair][stride], to zero that no tile has computed: those of queries
// outside of the range of a tile of keys, and those behind the last tile, up to a whole step.
template <class Policy>
FA_NOINLINE void clear_unseen_pairs(typename Policy::Lane* coefficients, const VectorRange* ranges, int count,
                                    int vectors) {
  using Lane = typename Policy::Lane;
  const int64_t stride = factor_stride<Policy>(vectors * kAmxLanes),
                next_part = part_lanes<Policy>(vectors * kAmxLanes);
  const int tiles = (count + kTileKeys - 1) / kTileKeys, steps = (count + kStepRows - 1) / kStepRows;
  constexpr int kPairs = kTileKeys / 2;  // of a tile of keys
  for (int t = 0; t < tiles; ++t) {
    if (ranges[t] == VectorRange{0, vectors}) continue;
    for (int part = 0; part < Policy::kParts; ++part) {
      Lane* const rows = coefficients + part * next_part + t * kPairs * stride;
      for (int v = 0; v < vectors; ++v) {
        if (v >= ranges[t].begin && v < ranges[t].end) continue;
        for (int pair = 0; pair < kPairs; ++pair) store<Lane>(rows + pair * stride + v * kAmxLanes, Vec<Lane>{});
      }
    }
  }
  const int64_t unseen = (steps * kAmxLanes - tiles * kPairs) * stride;
  for (int part = 0; part < Policy::kParts; ++part)
    memset(coefficients + part * next_part + tiles * kPairs * stride, 0, unseen * sizeof(Lane));
}

// acc[d][stride] = acc * rescale + sum over the keys of the block of rows[key][d] * coefficients[key][query]. The
// coefficients are pairs of keys [part][pair][stride]. clear_unseen_pairs has set those to zero that do not exist.
template <class Policy, class Meanwhile>
FA_NOINLINE void add_sum_over_keys(const SummedTiles<Policy>& rows, int dim, const typename Policy::Lane* coefficients,
                                   const Vec<typename Policy::Lane>* rescale, int count, int vectors,
                                   typename Policy::Lane* acc, const Meanwhile& meanwhile) {
  using Lane = typename Policy::Lane;
  const int64_t stride = vectors * kAmxLanes, stride_bytes = stride * sizeof(Lane);
  const int64_t pair_bytes = factor_stride<Policy>(stride) * sizeof(Lane);
  const int steps = (count + kStepRows - 1) / kStepRows;
  const int64_t step_bytes = rows.step_bytes(dim), part_bytes = rows.part_bytes(dim);
  const auto multiply = [&](Lane* target, bool accumulates) {
    multiply_amx<Policy::kParts>(
        {*rows.tiles, kAmxRowBytes, kAmxTileBytes, step_bytes, part_bytes},
        {reinterpret_cast<const char*>(coefficients), pair_bytes, kAmxRowBytes, kAmxRows * pair_bytes,
         part_lanes<Policy>(stride) * static_cast<int64_t>(sizeof(Lane))},
        steps, static_cast<int>(part_bytes / kAmxTileBytes), vectors,
        {reinterpret_cast<char*>(target), stride_bytes, kAmxRows * stride_bytes, 0, 0}, accumulates, meanwhile);
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
  const int pairs = (nq + 1) / 2, vectors = static_cast<int>(stride) / kAmxLanes;
  for (int first = 0; first < tiled_count; first += kTileKeys) {
    const VectorRange range = first < count ? ranges[first / kTileKeys] : VectorRange{0, 0};
    if (range == VectorRange{0, vectors} && first + kTileKeys <= count) continue;
    for (int part = 0; part < Policy::kParts; ++part) {
      for (int k = first; k < first + kTileKeys; ++k) {
        BFloat16* const row = coefficients + part * coefficient_part + k * stride;
        for (int v = 0; v < vectors; ++v) {
          if (k >= count || v < range.begin || v >= range.end)
            memset(static_cast<void*>(row + v * kAmxLanes), 0, kVectorOf16Bits);
        }
      }
    }
  }
  for (int part = 0; part < Policy::kParts; ++part) {
    memset(rows + part * row_part + pairs * row_stride, 0, (steps * kAmxLanes - pairs) * row_stride * sizeof(Lane));
  }
  const int64_t coefficient_bytes = stride * sizeof(BFloat16), row_bytes = row_lanes * sizeof(Lane);
  multiply_amx<Policy::kParts>(
      {reinterpret_cast<const char*>(coefficients), coefficient_bytes, kAmxRows * coefficient_bytes, kAmxRowBytes,
       coefficient_part * static_cast<int64_t>(sizeof(BFloat16))},
      {reinterpret_cast<const char*>(rows), row_stride_bytes, kAmxRowBytes, kAmxRows * row_stride_bytes,
       row_part * static_cast<int64_t>(sizeof(Lane))},
      steps, tiled_count / kAmxRows, static_cast<int>(row_lanes) / kAmxLanes,
      {reinterpret_cast<char*>(sums), row_bytes, kAmxRows * row_bytes, 0, 0},
      /*accumulates=*/false);
}

template <class Policy>
struct Products<Policy, true> {
  using RowsToMultiply = std::conditional_t<(Policy::kParts > 1), RowTiles<Policy>, FoundRows<Policy>>;
  using RowsToSum = SummedTiles<Policy>;
  using Registers = AmxRegisters;
};

// multiply_rows_by_columns for the rows of a block of keys.
template <class Policy>
void multiply_keys_by_columns(const typename Products<Policy>::RowsToMultiply& keys, int count, int dim,
                              const typename Policy::Lane* columns, int64_t stride, typename Policy::Lane* products) {
  if constexpr (Policy::kParts > 1) {
    multiply_parts_by_columns<Policy>(*keys.tiles, count, dim, columns, stride, products);
  } else {
    multiply_rows_by_columns<Policy>(keys.rows, count, dim, columns, stride, keys.copies, products);
  }
}

#endif

template <class Policy>
using RowsToMultiply = typename Products<Policy>::RowsToMultiply;
template <class Policy>
using RowsToSum = typename Products<Policy>::RowsToSum;
template <class Policy>
using MatrixRegisters = typename Products<Policy>::Registers;

}  // namespace
}  // namespace fused_attn::cpu
