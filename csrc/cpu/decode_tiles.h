// The products of decode_forward.h with AMX, for groups with several rows, as where heads share keys or a draft is
// verified. Vectors need a multiply-add of each row for each vector of a key, so the time grows with the rows. A tile
// has 16 rows, and keys are read from the tensor as they are:
//
//   scores[key][row] = keys . queries^T        then transposed, because the softmax takes a row of scores
//   sums[row][d]     = probs . values          probs are split into two bfloat16, neighbouring values are interleaved
//
// A tile of probs has the two bfloat16 of 8 rows, so for up to 8 rows one multiplication sums both.
#pragma once
#include "amx.h"
#include "decode_plan.h"

namespace fused_attn::cpu {
namespace {

// Prefetches the rows of the groups of a turn in the order in which the turn reads them, a few cache lines at a time.
// Memory delivers a line in the time of some ten cycles and holds few requests, so these are best spread over all that
// is computed meanwhile: 4 query heads for each of 8 kv heads over 64k keys (one thread of a Xeon, head dim 128) took
// 60 ns for a key without prefetches, 54 with those of the values or of the keys alone, and 50 with both. A sum of the
// same bytes took 40. What did not help: to prefetch into the first-level cache what the tiles read next (60), and to
// copy keys and values in the order of memory before the tiles read them (57).
template <class Storage>
class TurnPrefetcher {
 public:
  // Prefetches nothing.
  TurnPrefetcher() = default;

  // `count` rows of `dim` elements for each of `groups` groups, `part_keys` at a time; see groups_of_turn. The rows of
  // a group are `stride_head` elements from those of the one before. next() will be called about `calls` times, which
  // must be positive.
  TurnPrefetcher(HeadRows<Storage> rows, int64_t stride_head, int64_t groups, int count, int part_keys, int dim,
                 int64_t calls)
      : rows_(rows.rows),
        first_offset_(rows.offset),
        offset_(rows.offset),
        stride_head_(stride_head),
        groups_(groups),
        count_(count),
        part_keys_(part_keys),
        row_bytes_(dim * static_cast<int64_t>(sizeof(Storage))) {
    const int64_t lines = count * groups * ((row_bytes_ + kCacheLine - 1) / kCacheLine);
    bytes_per_call_ = (lines + calls - 1) / calls * kCacheLine;
  }

  // Prefetches the next rows.
  void next() {
    for (int64_t bytes = 0; bytes < bytes_per_call_ && row_ < count_;) {
      const Storage* row = rows_[row_] + offset_;
      for (int64_t byte = 0; byte < row_bytes_; byte += kCacheLine) prefetch_bytes(row, byte);
      bytes += row_bytes_;
      if (++row_ < count_ && row_ < part_ + part_keys_) continue;
      offset_ += stride_head_;
      if (++group_ < groups_) {
        row_ = part_;
      } else {
        group_ = 0;
        offset_ = first_offset_;
        part_ = row_;
      }
    }
  }

 private:
  const Storage* const* rows_ = nullptr;
  int64_t first_offset_ = 0, offset_ = 0, stride_head_ = 0;
  int64_t group_ = 0, groups_ = 0;
  int row_ = 0, count_ = 0, part_ = 0, part_keys_ = 0;  // part_: the first row of the part
  int64_t row_bytes_ = 0, bytes_per_call_ = 0;
};

// Without AMX: nothing.
template <class Policy, bool kUsesAmx = Policy::kUsesAmx>
struct DecodeTiles {
  void layout(Arena& /*arena*/, const AttentionParams& /*p*/, int64_t /*groups*/, int64_t /*turn_groups*/,
              int64_t /*group_rows*/) {}
};

#if defined(__AMX_BF16__)

// The memory of the products, for the groups of a work item.
template <class Policy>
struct DecodeTiles<Policy, true> {
  using Storage = typename Policy::Storage;
  using Prefetcher = TurnPrefetcher<Storage>;

  static constexpr int kStep = 32;                         // what a multiplication sums over: columns of a key, or keys
  static constexpr int kProbRows = 8;                      // of a tile of probs
  static constexpr int kTiles = kTilePartKeys / kAmxRows;  // so many tiles of sums are in registers at a time
  static constexpr int kColumns = kTiles * kAmxLanes;      // the most columns of values that are interleaved at a time

  int steps;           // of a row of a key
  int row_tiles;       // of 16 rows, of a group of the longest sequence
  int64_t value_row;   // floats of a row of sums
  char* queries;       // [group][tile of 16 rows][step]: tiles of pairs of columns, which are zero behind the last one
  Storage* keys;       // [key of a pass][step * 32]: copies of rows that tiles cannot read
  float* products[2];  // [key][16 rows], of a pass and of the next one
  int prob_tiles;      // of 8 rows, of a group of the longest sequence
  Storage* probs;    // [group of a turn][tile of 8 rows][step of 32 keys]: tiles, with the first part of all rows first
  float* values[2];  // [16 pairs of keys][kColumns]: pairs of neighbouring values, of a step and of the next one
  float* sums;       // [group of a turn][tile of 8 rows][part][row of the tile][value_row]

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, int64_t groups, int64_t turn_groups, int64_t group_rows) {
    if (group_rows < kLeastTileRows) return;
    steps = static_cast<int>(round_up(p.head_dim, kStep) / kStep);
    row_tiles = static_cast<int>(round_up(group_rows, kAmxRows) / kAmxRows);
    prob_tiles = static_cast<int>(round_up(group_rows, kProbRows) / kProbRows);
    value_row = round_up(p.value_dim, kColumns);
    queries = arena.take<char>(groups * group_bytes());
    keys = arena.take<Storage>(kTilePartKeys * steps * kStep);
    for (float*& tiles : products) tiles = arena.take<float>(kTilePartKeys * kAmxRows);
    probs = arena.take<Storage>(turn_groups * group_probs());
    for (float*& step : values) step = arena.take<float>(kStep / 2 * kColumns);
    sums = arena.take<float>(turn_groups * group_sums());
  }

  // The bytes of the queries of a group.
  int64_t group_bytes() const { return int64_t{1} * row_tiles * steps * kAmxTileBytes; }

  // The elements of the probs of a group, and the floats of its sums.
  int64_t group_probs() const { return int64_t{1} * prob_tiles * kAmxRows * kBlockK; }
  int64_t group_sums() const { return prob_tiles * kAmxRows * value_row; }

  // How often multiply, and sum_values, call prefetcher.next() for a part of `count` keys.
  int64_t multiply_calls(int count, int64_t rows) const {
    return round_up(count, kTilePartKeys) / kTilePartKeys * (round_up(rows, kAmxRows) / kAmxRows) *
           (steps * kTiles + kTiles);
  }
  int64_t sum_calls(int count, int64_t rows) const {
    const int64_t tiles = round_up(rows, kProbRows) / kProbRows;
    return round_up(count, kStep) / 2 * tiles * (value_row / kColumns);
  }

  // Writes query number `row` of a group to its column of the tiles.
  void read_query(const Storage* query, int head_dim, int64_t group, int64_t row) const {
    char* column = queries + group * group_bytes() + row / kAmxRows * steps * kAmxTileBytes + row % kAmxRows * 4;
    for (int d = 0; d < steps * kStep; d += 2, column += kAmxRowBytes) {
      const Storage pair[2] = {d < head_dim ? query[d] : Storage{}, d + 1 < head_dim ? query[d + 1] : Storage{}};
      memcpy(column, pair, sizeof(pair));
    }
  }

  // scores[row * kScoreRow + key] = scale * (query . key), for `rows` rows of a group and `count` keys. Also writes
  // scores of a few keys behind the last one. Meanwhile, `prefetcher` brings other rows.
  FA_NOINLINE void multiply(int64_t group, int64_t rows, HeadRows<Storage> key_rows, int count, int head_dim,
                            float scale, float* scores, Prefetcher& prefetcher) const {
    const char* const right = queries + group * group_bytes();
    KeyTile tiles[kTiles];
    // A pass is kTilePartKeys keys and 16 rows. The next pass is multiplied before the scores of a pass are read,
    // because a tile of sums reaches memory late.
    const int tiles_of_rows = static_cast<int>(round_up(rows, kAmxRows) / kAmxRows);
    const int passes = static_cast<int>(round_up(count, kTilePartKeys) / kTilePartKeys) * tiles_of_rows;
    const auto multiply_pass = [&](int pass) {
      for (int i = 0; i < kTiles && pass % tiles_of_rows == 0; ++i) {
        // There are no addresses of rows far behind the last key.
        const int k = pass / tiles_of_rows * kTilePartKeys + i * kAmxRows;
        tiles[i] = k < count ? readable_keys(key_rows, k, i * kAmxRows, head_dim) : tiles[0];
      }
      multiply_tiles(tiles, right + pass % tiles_of_rows * steps * kAmxTileBytes, products[pass % 2], prefetcher);
    };
    if (passes > 0) multiply_pass(0);
    for (int pass = 0; pass < passes; ++pass) {
      if (pass + 1 < passes) multiply_pass(pass + 1);
      const int k = pass / tiles_of_rows * kTilePartKeys;
      const int64_t r = pass % tiles_of_rows * kAmxRows;
      const int64_t end = rows - r < kAmxRows ? rows - r : kAmxRows;
      for (int i = 0; i < kTilePartKeys && k + i < count; i += kAmxRows) {
        Vec<float> tile[kAmxRows];
        FA_UNROLL
        for (int j = 0; j < kAmxRows; ++j) tile[j] = load<float>(products[pass % 2] + (i + j) * kAmxRows);
        transpose<float>(tile);
        float* target = scores + r * kScoreRow<float> + k + i;
        for (int64_t j = 0; j < end; ++j) store<float>(target + j * kScoreRow<float>, tile[j] * scale);
        prefetcher.next();
      }
    }
  }

  // Writes the probs of row number `row` of group number `group` of a turn as the sum of two bfloat16 numbers, which is
  // exact to 2^-17. In one number, their rounding would be as large as that of the output. Expects probs of 0 behind
  // the last key, up to a whole vector.
  void split_probs(int count, const float* exact, int64_t group, int64_t row) const {
    constexpr int n = kLanes<float>;
    Storage* high = probs + group * group_probs() + row / kProbRows * kAmxRows * kBlockK + row % kProbRows * kStep;
    for (int k = 0; k < count; k += 2 * n, high += kAmxRows * kStep) {
      const Vec<float> first = load<float>(exact + k);
      const Vec<float> second = k + n < count ? load<float>(exact + k + n) : Vec<float>{};
      const auto round = [](Vec<float> x, Vec<float> y) {
        return _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(x));
      };
      const auto rounded = reinterpret_cast<__m512i>(round(first, second));
      const auto widened = [&](auto half) {
        const __m256i bits = _mm512_extracti64x4_epi64(rounded, decltype(half)::value);
        return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      };
      const auto rest = round(first - widened(Constant<0>{}), second - widened(Constant<1>{}));
      memcpy(high, &rounded, sizeof(rounded));
      memcpy(high + kProbRows * kStep, &rest, sizeof(rest));
    }
  }

  // sums = sum over `count` keys of probs[row][first_key + key] * value, for the `rows` rows of group number `group` of
  // the turn. The sums of a block are the same if its keys come in several calls. `prefetcher`: as in multiply.
  void sum_values(HeadRows<Storage> value_rows, int64_t group, int64_t rows, int first_key, int count, int value_dim,
                  Prefetcher& prefetcher) const {
    const int tiles = static_cast<int>(round_up(rows, kProbRows) / kProbRows);
    for (int tile = 0; tile < tiles; tile += 2) {
      const auto sum = tiles - tile > 1 ? &DecodeTiles::sum_tiles<2> : &DecodeTiles::sum_tiles<1>;
      (this->*sum)(value_rows, group, tile, first_key, count, value_dim, prefetcher);
    }
  }

  // acc[row] = acc[row] * rescale[row] + sums[row], for the `rows` rows of group number `group` of the turn.
  void add_sums(int64_t group, int64_t rows, const float* rescale, float* acc, int64_t acc_row) const {
    for (int64_t row = 0; row < rows; ++row) {
      const float* high = sums + group * group_sums() + (row / kProbRows * kAmxRows + row % kProbRows) * value_row;
      const float* low = high + kProbRows * value_row;
      for (int64_t d = 0; d < acc_row; d += 2 * kAmxLanes) {
        constexpr int n = kLanes<float>;
        const Vec<float> x = load<float>(high + d) + load<float>(low + d);
        const Vec<float> y = load<float>(high + d + n) + load<float>(low + d + n);
        // The inverse of the order of interleave_values.
        const Vec<float> first = __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const Vec<float> second =
            __builtin_shufflevector(x, y, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        float* own = acc + row * acc_row + d;
        store<float>(own, load<float>(own) * rescale[row] + first);
        if (d + n < acc_row) store<float>(own + n, load<float>(own + n) * rescale[row] + second);
      }
    }
  }

 private:
  // 16 rows of keys as a left factor.
  struct KeyTile {
    const char* data;
    int64_t row_bytes;
  };

  // target[key][row] = the scores of the keys of kTiles tiles, for 16 rows of queries, whose tiles begin at `right`.
  void multiply_tiles(const KeyTile (&tiles)[kTiles], const char* right, float* target, Prefetcher& prefetcher) const {
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step) {
      const int64_t column = step * kAmxRowBytes;
      _tile_loadd(4, right + step * kAmxTileBytes, kAmxRowBytes);
      _tile_loadd(5, tiles[0].data + column, tiles[0].row_bytes);
      _tile_dpbf16ps(0, 5, 4);
      prefetcher.next();
      _tile_loadd(6, tiles[1].data + column, tiles[1].row_bytes);
      _tile_dpbf16ps(1, 6, 4);
      prefetcher.next();
      _tile_loadd(7, tiles[2].data + column, tiles[2].row_bytes);
      _tile_dpbf16ps(2, 7, 4);
      prefetcher.next();
      _tile_loadd(5, tiles[3].data + column, tiles[3].row_bytes);
      _tile_dpbf16ps(3, 5, 4);
      prefetcher.next();
    }
    constexpr int64_t kTileFloats = kAmxRows * kAmxLanes;
    _tile_stored(0, target, kAmxRowBytes);
    _tile_stored(1, target + kTileFloats, kAmxRowBytes);
    _tile_stored(2, target + 2 * kTileFloats, kAmxRowBytes);
    _tile_stored(3, target + 3 * kTileFloats, kAmxRowBytes);
  }

  // sum_values for kProbTiles tiles of probs. Each element of the sums is added up in the same order for any number.
  template <int kProbTiles>
  FA_NOINLINE void sum_tiles(HeadRows<Storage> value_rows, int64_t group, int tile, int first_key, int count,
                             int value_dim, Prefetcher& prefetcher) const {
    constexpr int kWidth = kColumns / kProbTiles;
    constexpr int64_t kValueBytes = kWidth * sizeof(float), kProbTile = kAmxRows * kBlockK;
    const int64_t row_bytes = value_row * static_cast<int64_t>(sizeof(float));
    for (int d = 0; d < value_dim; d += kWidth) {
      float* const first = sums + group * group_sums() + tile * kAmxRows * value_row + d;
      float* const third = kProbTiles == 2 ? first + kAmxRows * value_row : first + 2 * kAmxLanes;
      if (first_key > 0) {
        asm volatile("" ::: "memory");
        _tile_loadd(0, first, row_bytes);
        _tile_loadd(1, first + kAmxLanes, row_bytes);
        _tile_loadd(2, third, row_bytes);
        _tile_loadd(3, third + kAmxLanes, row_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const auto interleave = [&](int k, int quarter) {
        if (k >= count) return;
        interleave_values<kWidth>({value_rows.rows + k, value_rows.offset + d}, count - k, value_dim - d,
                                  values[k / kStep % 2], quarter, prefetcher);
      };
      for (int quarter = 0; quarter < 4; ++quarter) interleave(0, quarter);
      const Storage* left = probs + group * group_probs() + tile * kProbTile + first_key * kAmxRows;
      for (int k = 0; k < count; k += kStep, left += kStep * kAmxRows) {
        const float* right = values[k / kStep % 2];
        // The intrinsics that load tiles do not tell the compiler that they read memory.
        asm volatile("" ::: "memory");
        // The next step is interleaved between the multiplications, because a tile cannot be loaded before the stores
        // to its memory have reached the cache, and because vectors and tiles work at the same time only so.
        _tile_loadd(4, left, kAmxRowBytes);
        if constexpr (kProbTiles == 1) {
          _tile_loadd(5, right, kValueBytes);
          _tile_dpbf16ps(0, 4, 5);
          interleave(k + kStep, 0);
          _tile_loadd(6, right + kAmxLanes, kValueBytes);
          _tile_dpbf16ps(1, 4, 6);
          interleave(k + kStep, 1);
          _tile_loadd(7, right + 2 * kAmxLanes, kValueBytes);
          _tile_dpbf16ps(2, 4, 7);
          interleave(k + kStep, 2);
          _tile_loadd(5, right + 3 * kAmxLanes, kValueBytes);
          _tile_dpbf16ps(3, 4, 5);
          interleave(k + kStep, 3);
        } else {
          _tile_loadd(5, left + kProbTile, kAmxRowBytes);
          _tile_loadd(6, right, kValueBytes);
          _tile_dpbf16ps(0, 4, 6);
          interleave(k + kStep, 0);
          _tile_dpbf16ps(2, 5, 6);
          interleave(k + kStep, 1);
          _tile_loadd(7, right + kAmxLanes, kValueBytes);
          _tile_dpbf16ps(1, 4, 7);
          interleave(k + kStep, 2);
          _tile_dpbf16ps(3, 5, 7);
          interleave(k + kStep, 3);
        }
      }
      _tile_stored(0, first, row_bytes);
      _tile_stored(1, first + kAmxLanes, row_bytes);
      _tile_stored(2, third, row_bytes);
      _tile_stored(3, third + kAmxLanes, row_bytes);
    }
  }

  // pairs = pairs of neighbouring values of a quarter of 32 keys, for kWidth columns. `count` of the keys and `dim` of
  // the columns exist. Of 32 columns, a tile has the columns 0-3, 8-11, 16-19 and 24-27, and the next tile has the
  // others: so shuffles within 128 bits make both, which take a cycle each.
  template <int kWidth>
  static void interleave_values(HeadRows<Storage> value_rows, int count, int dim, float* pairs, int quarter,
                                Prefetcher& prefetcher) {
    for (int pair = quarter * 4; pair < quarter * 4 + 4; ++pair) {
      float* target = pairs + pair * kWidth;
      const int k = 2 * pair;
      prefetcher.next();
      FA_UNROLL
      for (int d = 0; d < kWidth; d += kStep) {
        const int left = dim - d;
        const __mmask32 valid = left >= kStep ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
        const __m512i low = _mm512_maskz_loadu_epi16(k < count ? valid : 0, value_rows[k] + d);
        const __m512i high = _mm512_maskz_loadu_epi16(k + 1 < count ? valid : 0, value_rows[k + 1] + d);
        _mm512_storeu_si512(target + d, _mm512_unpacklo_epi16(low, high));
        _mm512_storeu_si512(target + d + kAmxLanes, _mm512_unpackhi_epi16(low, high));
      }
    }
  }

  // The rows of 16 keys from key k on. Tiles read them where they are if they follow one another at a fixed distance
  // and consist of whole steps. Otherwise they are copied to row number `copy` of the copies.
  KeyTile readable_keys(HeadRows<Storage> key_rows, int k, int copy, int head_dim) const {
    const int64_t stride = key_rows[k + 1] - key_rows[k];
    bool is_regular = head_dim == steps * kStep;
    for (int i = 2; i < kAmxRows; ++i) is_regular &= key_rows[k + i] - key_rows[k + i - 1] == stride;
    if (is_regular) {
      return {reinterpret_cast<const char*>(key_rows[k]), stride * static_cast<int64_t>(sizeof(Storage))};
    }
    const int64_t row = int64_t{1} * steps * kStep;
    Storage* const target = keys + copy * row;
    for (int i = 0; i < kAmxRows; ++i) {
      for (int d = 0; d < steps * kStep; d += kStep) {
        const int left = head_dim - d;
        const __mmask32 valid = left >= kStep ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        _mm512_storeu_epi16(target + i * row + d, _mm512_maskz_loadu_epi16(valid, key_rows[k + i] + d));
      }
    }
    return {reinterpret_cast<const char*>(target), row * static_cast<int64_t>(sizeof(Storage))};
  }
};

#endif

}  // namespace
}  // namespace fused_attn::cpu
