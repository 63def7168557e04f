// How a matrix lies in the registers of a warp, as a fragment. mma.sync and wgmma share this layout.
//
// A fragment of 16 rows and 8 * kTiles columns is float x[kTiles][4] in each thread. With g = lane / 4 and q = lane %
// 4, entry x[t][j] is row g + 8 * (j / 2) and column 8 * t + 2 * q + j % 2. So a thread has two rows, r = 0 (row g) and
// r = 1 (row g + 8), and four threads share a row.
#pragma once
#include "hardware.h"
#include "visibility.h"

namespace fused_attn::gpu {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// A thread's place in its warp: its number, and the g and q of the layout above.
struct Lane {
  int32_t index;  // within the warp
  int32_t g;
  int32_t q;
};

GPU_DEVICE Lane lane_of(int32_t thread) {
  const uint32_t index = static_cast<uint32_t>(thread) % 32;  // unsigned: divisions are shifts
  return {static_cast<int32_t>(index), static_cast<int32_t>(index / 4), static_cast<int32_t>(index % 4)};
}
GPU_DEVICE Lane this_lane() { return lane_of(thread_index()); }

// Sets all entries of this thread to `value`.
template <int kTiles>
GPU_DEVICE void fill(float (&x)[kTiles][4], float value) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) { GPU_UNROLL for (int j = 0; j < 4; ++j) x[t][j] = value; }
}

// Multiplies the two rows of this thread by a factor each.
template <int kTiles>
GPU_DEVICE void scale_rows(float (&x)[kTiles][4], const float (&factor)[2]) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) { GPU_UNROLL for (int j = 0; j < 4; ++j) x[t][j] *= factor[j / 2]; }
}

// The maximum, or the sum, of x over the four threads that share a row. All lanes of the warp call this.
GPU_DEVICE float row_maximum(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
GPU_DEVICE float row_total(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Sets hidden scores to -inf, in row r and in columns 32 * word ... 32 * word + 31. Bit c of `visible` is set if the
// row sees column 32 * word + c.
template <int kTiles>
GPU_DEVICE void hide_word(float (&scores)[kTiles][4], int r, int word, uint32_t visible, Lane lane) {
  const uint32_t bits = visible >> (2 * lane.q);
  GPU_UNROLL for (int t = 0; t < 4; ++t) {
    GPU_UNROLL for (int j = 0; j < 2; ++j) {
      if (!(bits >> (8 * t + j) & 1)) scores[4 * word + t][2 * r + j] = -kInfinity;
    }
  }
}

// Sets hidden scores to -inf, in both rows and all columns.
template <int kTiles>
GPU_DEVICE void hide(float (&scores)[kTiles][4], const VisibleColumns<8 * kTiles>& visible, Lane lane) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) {
      const uint32_t bits = visible.words[j / 2][t / 4] >> (2 * lane.q);
      if (!(bits >> (8 * (t % 4) + j % 2) & 1)) scores[t][j] = -kInfinity;
    }
  }
}

// Rounds columns 16 * k ... 16 * k + 15 of a fragment to T, as the left factor of a product. The layout of a result is
// also the layout of a left factor, so no thread needs entries of another thread.
template <class T, int kTiles>
GPU_DEVICE void left_factor(uint32_t (&a)[4], const float (&x)[kTiles][4], int k) {
  GPU_UNROLL for (int i = 0; i < 4; ++i) a[i] =
      pack<T>(x[2 * k + i / 2][2 * (i % 2)], x[2 * k + i / 2][2 * (i % 2) + 1]);
}

// Transposes words among the four threads that share a row: word i of thread q changes places with word q of thread i.
// Before, a thread has one word of each of four tiles; afterwards, it has all four words of one tile (or the other way
// round). All lanes of the warp call this.
GPU_DEVICE void exchange_in_row(uint32_t (&words)[4], Lane lane) {
  // A 4 x 4 transpose, first within pairs of threads and tiles, then between the pairs.
  GPU_UNROLL for (int i = 0; i < 4; i += 2) {
    const bool is_odd = lane.q & 1;
    const uint32_t received = shuffle_xor(is_odd ? words[i] : words[i + 1], 1);
    words[i] = is_odd ? received : words[i];
    words[i + 1] = is_odd ? words[i + 1] : received;
  }
  GPU_UNROLL for (int i = 0; i < 2; ++i) {
    const bool is_upper = lane.q & 2;
    const uint32_t received = shuffle_xor(is_upper ? words[i] : words[i + 2], 2);
    words[i] = is_upper ? received : words[i];
    words[i + 2] = is_upper ? words[i + 2] : received;
  }
}

// Writes four tiles of a row to global memory, from tile `first` on. Each thread has 4 bytes of every tile. The four
// threads of the row exchange these bytes, in `words`, so that each thread writes 16 bytes at once. is_row says whether
// the row exists; memory has `columns` of its columns, a multiple of 8. All lanes of the warp call this.
template <class T>
GPU_DEVICE void store_words(T* row, uint32_t (&words)[4], int first, bool is_row, int columns, Lane lane) {
  exchange_in_row(words, lane);
  const int column = 8 * (first + lane.q);
  if (is_row && column < columns)
    store_global(reinterpret_cast<Vec4*>(row + column), Vec4{words[0], words[1], words[2], words[3]});
}

// Writes row r of the fragment, multiplied by `factor` and rounded to T, to global memory. is_row and columns: see
// store_words. All lanes of the warp call this.
template <class T, int kTiles>
GPU_DEVICE void store_row(T* row, const float (&x)[kTiles][4], int r, float factor, bool is_row, int columns,
                          Lane lane) {
  GPU_UNROLL for (int t = 0; t < kTiles; t += 4) {
    uint32_t words[4];
    GPU_UNROLL for (int i = 0; i < 4; ++i) words[i] = pack<T>(x[t + i][2 * r] * factor, x[t + i][2 * r + 1] * factor);
    store_words(row, words, t, is_row, columns, lane);
  }
}

}  // namespace fused_attn::gpu
