// The products of decode.h with AMX, for groups with several rows, as where heads share keys or a draft is verified.
// Vectors need a multiply-add of each row for each vector of a key, so the time grows with the rows. A tile has 16
// rows, and keys are read from the tensor as they are:
//
//   scores[key][row] = keys . queries^T        then transposed, because the softmax takes a row of scores
//   sums[row][d]     = probs . values          probs are split into two bfloat16, neighbouring values are interleaved
//
// Nothing is prefetched: with prefetches beside the products, as in decode_block.h, calls took 1.0 to 1.3 of the time,
// and only 16 rows over 32k keys took 0.9.
#pragma once
#include "amx.h"
#include "decode_block.h"

namespace fused_attn::cpu {
namespace {

// The rows of a group from which on tiles multiply. With 4 rows, vectors load and convert a key once.
constexpr int64_t kLeastTileRows = 5;

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

  static constexpr int kStepColumns = 32;  // of a key or a query that a tile has; the keys of a tile of probs

  int steps;          // of a row of a key
  int row_tiles;      // of a group of the longest sequence
  int64_t value_row;  // floats of a row of sums
  char* queries;      // [group][tile of rows][step]: tiles of pairs of columns, which are zero behind the last one
  Storage* keys;      // [key of the block][step * 32]: copies of rows that tiles cannot read
  float* products;    // [key of the block][row]
  Storage* probs[2];  // [row of a turn][kBlockK], as the sum of two bfloat16 numbers (split_probs)
  float* values;      // [pair of keys][value_row]: pairs of neighbouring values
  float* sums[2];     // [group of a turn][row][value_row], for each of the two

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, int64_t groups, int64_t turn_groups, int64_t group_rows) {
    if (group_rows < kLeastTileRows) return;
    steps = static_cast<int>(round_up(p.head_dim, kStepColumns) / kStepColumns);
    row_tiles = static_cast<int>(round_up(group_rows, kAmxRows) / kAmxRows);
    value_row = round_up(p.value_dim, kAmxLanes);
    queries = arena.take<char>(groups * group_bytes());
    keys = arena.take<Storage>(kBlockK * steps * kStepColumns);
    products = arena.take<float>(kBlockK * row_tiles * kAmxRows);
    for (Storage*& part : probs) part = arena.take<Storage>(turn_groups * row_tiles * kAmxRows * kBlockK);
    values = arena.take<float>(kBlockK / 2 * value_row);
    for (float*& part : sums) part = arena.take<float>(turn_groups * group_sums());
  }

  // The bytes of the queries of a group.
  int64_t group_bytes() const { return int64_t{1} * row_tiles * steps * kAmxTileBytes; }

  // The floats of the sums of a group.
  int64_t group_sums() const { return row_tiles * kAmxRows * value_row; }

  // Writes query number `row` of a group to its column of the tiles.
  void read_query(const Storage* query, int head_dim, int64_t group, int64_t row) const {
    char* column = queries + group * group_bytes() + row / kAmxRows * steps * kAmxTileBytes + row % kAmxRows * 4;
    for (int d = 0; d < steps * kStepColumns; d += 2, column += kAmxRowBytes) {
      const Storage pair[2] = {d < head_dim ? query[d] : Storage{}, d + 1 < head_dim ? query[d + 1] : Storage{}};
      memcpy(column, pair, sizeof(pair));
    }
  }

  // scores[row * kScoreRow + key] = scale * (query . key), for `rows` rows of a group and `count` keys. Also writes
  // scores of a few keys behind the last one.
  FA_NOINLINE void multiply(int64_t group, int64_t rows, HeadRows<Storage> key_rows, int count, int head_dim,
                            float scale, float* scores) const {
    const int key_tiles = static_cast<int>(round_up(count, kAmxRows) / kAmxRows);
    const int64_t product_row = int64_t{1} * row_tiles * kAmxRows;
    const AmxMatrix<const char> right = {queries + group * group_bytes(), kAmxRowBytes, steps * kAmxTileBytes,
                                         kAmxTileBytes, 0};
    multiply_amx<1>(readable_keys(key_rows, key_tiles * kAmxRows, head_dim), right, steps, key_tiles, tiles_of(rows),
                    {reinterpret_cast<char*>(products), product_row * 4, product_row * 4 * kAmxRows, 0, 0},
                    /*accumulates=*/false);
    for (int64_t r = 0; r < rows; r += kAmxRows) {
      const int64_t end = rows - r < kAmxRows ? rows - r : kAmxRows;
      for (int k = 0; k < key_tiles * kAmxRows; k += kAmxRows) {
        Vec<float> tile[kAmxRows];
        FA_UNROLL
        for (int i = 0; i < kAmxRows; ++i) tile[i] = load<float>(products + (k + i) * product_row + r);
        transpose<float>(tile);
        for (int64_t i = 0; i < end; ++i) store<float>(scores + (r + i) * kScoreRow<float> + k, tile[i] * scale);
      }
    }
  }

  // Writes the probs of row number `row` of a turn as the sum of two bfloat16 numbers, which is exact to 2^-17. In one
  // number, their rounding would be as large as that of the output. Expects probs of 0 behind the last key, up to a
  // whole vector.
  void split_probs(int count, const float* exact, int64_t row) const {
    constexpr int n = kLanes<float>;
    Storage* high = probs[0] + row * kBlockK;
    Storage* low = probs[1] + row * kBlockK;
    for (int k = 0; k < count; k += 2 * n) {
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
      memcpy(high + k, &rounded, sizeof(rounded));
      memcpy(low + k, &rest, sizeof(rest));
    }
  }

  // sums = sum over `count` keys of probs[row][first_key + key] * value, for the `rows` rows of group number `group` of
  // the turn. The sums of a block are the same if its keys come in several calls.
  FA_NOINLINE void sum_values(HeadRows<Storage> value_rows, int64_t group, int64_t rows, int first_key, int count,
                              int value_dim) const {
    const int key_steps = static_cast<int>(round_up(count, kStepColumns) / kStepColumns);
    for (int k = 0; k < key_steps * kStepColumns; k += 2) {
      float* pairs = values + k / 2 * value_row;
      if (k >= count) {
        memset(pairs, 0, value_row * sizeof(float));
        continue;
      }
      const auto* low = reinterpret_cast<const uint16_t*>(value_rows[k]);
      const auto* high = k + 1 < count ? reinterpret_cast<const uint16_t*>(value_rows[k + 1]) : nullptr;
      interleave_rows(low, high, value_dim, pairs);
    }
    constexpr int64_t kProbRowBytes = kBlockK * sizeof(Storage);
    for (int part = 0; part < 2; ++part) {
      const char* left = reinterpret_cast<const char*>(probs[part] + group * rows * kBlockK + first_key);
      char* target = reinterpret_cast<char*>(sums[part] + group * group_sums());
      multiply_amx<1>({left, kProbRowBytes, kAmxRows * kProbRowBytes, kAmxRowBytes, 0},
                      {reinterpret_cast<const char*>(values), value_row * 4, kAmxRowBytes, kAmxRows * value_row * 4, 0},
                      key_steps, tiles_of(rows), static_cast<int>(value_row / kAmxLanes),
                      {target, value_row * 4, value_row * 4 * kAmxRows, 0, 0}, /*accumulates=*/first_key > 0);
    }
  }

  // acc[row] = acc[row] * rescale[row] + sums[row], for the `rows` rows of group number `group` of the turn.
  void add_sums(int64_t group, int64_t rows, const float* rescale, float* acc) const {
    const float* high = sums[0] + group * group_sums();
    const float* low = sums[1] + group * group_sums();
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = row * value_row; d < (row + 1) * value_row; d += kLanes<float>)
        store<float>(acc + d, load<float>(acc + d) * rescale[row] + (load<float>(high + d) + load<float>(low + d)));
    }
  }

 private:
  static int tiles_of(int64_t rows) { return static_cast<int>(round_up(rows, kAmxRows) / kAmxRows); }

  // `count` rows, a multiple of 16, as the left factor. They are read where they are if they follow one another at a
  // fixed distance and consist of whole steps. Otherwise they are copied.
  AmxMatrix<const char> readable_keys(HeadRows<Storage> key_rows, int count, int head_dim) const {
    const int64_t stride = key_rows[1] - key_rows[0];
    bool is_regular = head_dim == steps * kStepColumns;
    for (int k = 1; is_regular && k < count; ++k) is_regular = key_rows[k] - key_rows[k - 1] == stride;
    if (is_regular) {
      const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(Storage));
      return {reinterpret_cast<const char*>(key_rows[0]), row_bytes, kAmxRows * row_bytes, kAmxRowBytes, 0};
    }
    const int64_t row = int64_t{1} * steps * kStepColumns;
    for (int k = 0; k < count; ++k) {
      for (int step = 0; step < steps; ++step) {
        const int d = step * kStepColumns, left = head_dim - d;
        const __mmask32 valid = left >= kStepColumns ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        _mm512_storeu_epi16(keys + k * row + d, _mm512_maskz_loadu_epi16(valid, key_rows[k] + d));
      }
    }
    const int64_t row_bytes = row * static_cast<int64_t>(sizeof(Storage));
    return {reinterpret_cast<const char*>(keys), row_bytes, kAmxRows * row_bytes, kAmxRowBytes, 0};
  }
};

#endif

}  // namespace
}  // namespace fused_attn::cpu
