// Sizes of blocks and tiles, and the two products of register tiles (dot_tile and outer_tile) that all kernels for
// blocks of queries are made of, but for those with AMX (amx_products.h).
//
// A vector holds one number of each of several neighbouring queries. So the softmax of a query needs no operation
// across lanes. An element of a key or value is a scalar that is broadcast from memory to all lanes. So a key is only a
// pointer to its row, and a kernel leaves out a hidden key by leaving out its pointer.
//
// Names: a tile begins at key k of the block of keys, and at vector v of the block of queries. r counts the keys of the
// tile, and c its vectors of queries. n is the number of lanes of a vector.
#pragma once
#include "memory.h"
#include "policy.h"

namespace fused_attn::cpu {
namespace {

constexpr int kBlockQ = 64;  // queries of a block; with 32, each loaded key serves half as many: 13-25 % slower

// A tile has kTileKeys x kTileVectors accumulators, each one vector register. There must be enough of them that a
// multiply-add need not wait for the previous one, and some registers must be left for operands. With 32 registers, 4 x
// 4 accumulators do. With 16 registers, 6 x 2 is up to 10 % faster than 4 x 2.
constexpr int kTileKeys = kVectorRegisters == 32 ? 4 : 6;
constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;

// Keys of a block: a multiple of kTileKeys and of the lanes of a vector. 128 keys are 1-2 % faster than 64, also in
// forward with head dim 512. With 16 registers, 144 keys are not faster than 72.
constexpr int kBlockK = kTileKeys == 4 ? 128 : 72;

// The number of vectors that hold one number for each query of a block.
template <class T>
constexpr int kBlockVectors = kBlockQ / kLanes<T>;
static_assert(kBlockVectors<double> % kTileVectors == 0 && kBlockVectors<float> % kTileVectors == 0);

// The caches of rows (key_rows.h, amx_products.h) hold keys in groups of this size: those of a multiplication with AMX,
// or of a lane. A group begins with a multiple of this number.
template <class Policy>
constexpr int kKeyStep = Policy::kUsesAmx ? 32 : Policy::kPerLane;

// The rows of a matrix with one for each key of a block. The last tile may reach beyond the block.
constexpr int kBlockRows = kBlockK + kTileKeys;

// The lanes from one row of a matrix of factors to the next one, if a row has `lanes` of them, in whole vectors. With
// parts, the distance is an odd number of cache lines. So the rows of a tile of AMX are spread over all sets of the
// first-level cache.
template <class Policy>
constexpr int64_t factor_stride(int64_t lanes) {
  return Policy::kParts > 1 ? lanes | kLanes<float> : lanes;
}

// The lanes of one part of a matrix of factors with a row, or half of one, for each key of a block.
template <class Policy>
constexpr int64_t part_lanes(int64_t stride) {
  return kBlockRows * factor_stride<Policy>(stride) / Policy::kFactorsPerLane;
}
static_assert(kBlockK % kTileKeys == 0 && kBlockK % kLanes<float> % 8 == 0 && kTileKeys % 2 == 0);

// An integer as a type, so that a function argument can be a compile-time constant.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Constant<n>{}), which turns n, with 1 <= n <= kTileVectors, into a compile-time constant.
template <class F>
FA_INLINE void with_columns(int n, const F& f) {
  if constexpr (kTileVectors == 4) {
    if (n == 4) return f(Constant<4>{});
    if (n == 3) return f(Constant<3>{});
  }
  if (n == 2) return f(Constant<2>{});
  f(Constant<1>{});
}

// The most lanes that dot_tile adds up in one sum. A longer sum is a sum of such sums, because the rounding error of a
// sum grows with its length. In float32 with head dim 512, results of one long sum, and a few of sums of 256, have
// larger errors than the tests allow. Sums of 128 take 1.00 to 1.01 of the time (head dims 192 to 512). delta has the
// same sums (row_statistics.h).
constexpr int kLongestSum = 128;

// A product of tiles that sums over the lanes of rows: acc[r][c] = sum over k < depth of rows[r][k] * columns[k][c].
// Lane k of row r is broadcast, and columns[k][c] is a vector. columns[k + 1] begins `stride` lanes behind columns[k].
template <class Policy, int kRows, int kColumns>
FA_INLINE void dot_tile(const char* const* rows, const typename Policy::Lane* columns, int64_t stride, int depth,
                        Vec<typename Policy::Lane> (&acc)[kRows][kColumns]) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const char* row[kRows];
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  // The sums so far. They are stored in an array because the registers are full.
  alignas(kVectorBytes) Lane sums[kRows * kColumns * n];
  for (int begin = 0, end;; begin = end) {
    end = depth - begin > kLongestSum ? begin + kLongestSum : depth;
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = Vec<Lane>{};
    }
    FA_UNROLL_TWICE
    for (int k = begin; k < end; ++k) {
      Vec<Lane> column[kColumns];
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) column[c] = load<Lane>(columns + c * n);
      columns += stride;
      FA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec<Lane> x = broadcast_lane<Policy>(row[r], k);
        FA_UNROLL
        for (int c = 0; c < kColumns; ++c) acc[r][c] = multiply_add<Policy>(x, column[c], acc[r][c]);
      }
    }
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        Lane* sum = sums + (r * kColumns + c) * n;
        if (begin > 0) acc[r][c] += load<Lane>(sum);
        if (end < depth) store<Lane>(sum, acc[r][c]);
      }
    }
    if (end == depth) return;
  }
}

// A product of tiles that sums over rows: target[r][c] = target[r][c] * rescale[c] + sum over j < count of
// rows[j][first + r] * coefficients[j][c]. Here c counts vectors of queries, and j counts keys or pairs of keys.
template <class Policy, int kRows, int kColumns>
FA_INLINE void outer_tile(const char* const* rows, int first, const typename Policy::Lane* coefficients,
                          const Vec<typename Policy::Lane>* rescale, int count, int64_t stride,
                          typename Policy::Lane* target) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  Vec<Lane> acc[kRows][kColumns];
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) acc[r][c] = Vec<Lane>{};
  }
  FA_UNROLL_TWICE
  for (int j = 0; j < count; ++j) {
    const char* row = rows[j] + first * static_cast<int64_t>(sizeof(Lane));
    Vec<Lane> coefficient[kColumns];
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) coefficient[c] = load<Lane>(coefficients + j * stride + c * n);
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<Lane> x = broadcast_lane<Policy>(row, r);
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = multiply_add<Policy>(x, coefficient[c], acc[r][c]);
    }
  }
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      // The target is added after the loop. A sum of sums of blocks has smaller rounding errors than one long sum.
      Lane* sum = target + r * stride + c * n;
      store<Lane>(sum, load<Lane>(sum) * rescale[c] + acc[r][c]);
    }
  }
}

// Calls outer_tile for all `dim` rows of the target, in tiles of kTileKeys rows, then 4, then 1. With one or two
// vectors of queries, tiles of twice or four times as many rows come first: a smaller tile has too few sums, so that
// each multiply-add would wait for an earlier one.
template <class Policy, int kColumns>
FA_NOINLINE void outer_columns(const char* const* rows, int dim, const typename Policy::Lane* coefficients,
                               const Vec<typename Policy::Lane>* rescale, int count, int64_t stride,
                               typename Policy::Lane* target) {
  int d = 0;
  const auto tiles = [&](auto tile_rows) {
    constexpr int kRows = decltype(tile_rows)::value;
    for (; d + kRows <= dim; d += kRows) {
      outer_tile<Policy, kRows, kColumns>(rows, d, coefficients, rescale, count, stride, target + d * stride);
    }
  };
  constexpr int kWide = kTileVectors / kColumns;  // how many times as many rows as kTileKeys
  if constexpr (kWide > 1) tiles(Constant<kTileKeys * kWide>{});
  tiles(Constant<kTileKeys>{});
  if constexpr (kTileKeys > 4) tiles(Constant<4>{});
  tiles(Constant<1>{});
}

// Sets columns[dim, padded to a vector][vectors] to zero.
template <class Lane>
FA_INLINE void clear_columns(Lane* columns, int dim, int vectors) {
  constexpr int n = kLanes<Lane>;
  const int padded = (dim + n - 1) / n * n;
  for (int i = 0; i < padded * vectors; ++i) store<Lane>(columns + i * n, Vec<Lane>{});
}

// The vectors [begin, end) of a block of queries. Used for those in which some query sees a key of a tile.
struct VectorRange {
  int begin;
  int end;

  bool operator==(const VectorRange& other) const { return begin == other.begin && end == other.end; }
};

// The part of a range that lies in a panel. A panel is as many vectors as a tile has: kTileVectors.
FA_INLINE VectorRange clip_to_panel(VectorRange range, int panel) {
  const int first = panel * kTileVectors;
  const int last = first + kTileVectors;
  return {range.begin < first ? first : range.begin, range.end > last ? last : range.end};
}

// Computes a product for a block of keys and a block of queries:
//
//   target[d][q] = target[d][q] * rescale[q] + sum over keys j of rows[j][d] * coefficients[j][q]
//
// Only the queries in ranges[t] see keys of tile t, and coefficients of other queries are not initialised. Neighbouring
// tiles with equal ranges form a run, which is one product. The first run that contains a vector of queries applies the
// factor `rescale`. A vector that is in no range stays as it is, because its factor is 1.
template <class Policy>
FA_INLINE void outer_block(const char* const* rows, int dim, const typename Policy::Lane* coefficients,
                           const Vec<typename Policy::Lane>* rescale, const VectorRange* ranges, int tiles,
                           int key_count, int vectors, typename Policy::Lane* target) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const int64_t stride = vectors * n;
  Vec<Lane> ones[kTileVectors];
  FA_UNROLL
  for (int c = 0; c < kTileVectors; ++c) ones[c] = broadcast<Lane>(1);

  for (int panel = 0; panel * kTileVectors < vectors; ++panel) {
    uint64_t rescaled = 0;  // bit v is set after vector v has been multiplied by rescale[v]
    int stop;
    for (int t = 0; t < tiles; t = stop) {
      const VectorRange run = clip_to_panel(ranges[t], panel);
      for (stop = t + 1; stop < tiles && clip_to_panel(ranges[stop], panel) == run; ++stop) {
      }
      if (run.begin >= run.end) continue;
      const uint64_t reached = ((uint64_t{1} << run.end) - 1) & ~((uint64_t{1} << run.begin) - 1);
      // If an earlier run has rescaled some vectors of this run, rescale the others here, and none in the product.
      const Vec<Lane>* scales = rescale + run.begin;
      if ((rescaled & reached) != 0) {
        for (int v = run.begin; v < run.end; ++v) {
          if ((rescaled >> v & 1) != 0) continue;
          for (int d = 0; d < dim; ++d) {
            Lane* sum = target + d * stride + v * n;
            store<Lane>(sum, load<Lane>(sum) * rescale[v]);
          }
        }
        scales = ones;
      }
      rescaled |= reached;
      const int first = t * kTileKeys;
      const int last = stop * kTileKeys < key_count ? stop * kTileKeys : key_count;
      const int64_t row = first / Policy::kPerLane;
      const int count = Policy::lanes_for(last - first);
      with_columns(run.end - run.begin, [&](auto columns) {
        outer_columns<Policy, decltype(columns)::value>(rows + row, dim, coefficients + row * stride + run.begin * n,
                                                        scales, count, stride, target + run.begin * n);
      });
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
