// Products of matrices of bfloat16 with AMX. A tile is a register of 16 rows of 64 bytes: 16 x 16 floats, or 16 x 32
// bfloat16. One instruction adds the product of two tiles of bfloat16 to a tile of floats, in 16 cycles, in which other
// instructions for vectors run.
//
//   left    16 rows of 32 elements
//   right   16 rows of 16 pairs: element pair i of a row of `left` meets row i of `right`. A pair is two neighbours in
//           the dimension that the product sums over, as in the lanes of a policy with kPerLane = 2.
//   sum     16 x 16 floats
#pragma once
#include "memory.h"

namespace fused_attn::cpu {
namespace {

// What vectors do while tiles are multiplied: nothing.
struct DoNothing {
  void operator()() const {}
};

}  // namespace
}  // namespace fused_attn::cpu

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace fused_attn::cpu {
namespace {

constexpr int kAmxRows = 16;      // of a tile
constexpr int kAmxRowBytes = 64;  // of a tile
constexpr int kAmxLanes = 16;     // of a row: floats, or pairs of bfloat16
constexpr int kAmxTileBytes = 1024;

// Makes the tile registers usable in the current thread, until the object is destroyed.
class AmxRegisters {
 public:
  AmxRegisters() {
    alignas(kAmxRowBytes) static constexpr Configuration kAllTilesFull = {};
    _tile_loadconfig(&kAllTilesFull);
  }
  ~AmxRegisters() { _tile_release(); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;

 private:
  // What the instruction reads. Registers 8 to 15 do not exist.
  struct Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Configuration) == 64);
};

// A factor, or the sum, of a product: a matrix of tiles in memory. A factor may be a sum of several matrices, its
// parts.
template <class Byte>
struct AmxMatrix {
  Byte* data;
  int64_t row_bytes;  // from one row of a tile to the next one
  int64_t next_tile;  // from one tile to the next one, in bytes; not along the dimension that the product sums over
  int64_t next_step;  // from one tile to the next one along that dimension, in bytes; not for the sum
  int64_t next_part;  // from a tile to the same one of the next part, in bytes; not for the sum
};

// Computes kRows x kColumns tiles of the sum, over `steps` pairs of tiles. They are added to the sum in memory if
// `accumulates`. With 2 x 2 tiles, each one that is loaded serves two multiplications.
//
// If the factors have kParts parts, part i of `left` is multiplied by the parts of `right` before number kParts - i. A
// part is about 2^-8 of the one before it, so these are the largest products.
//
// meanwhile() is called after every few multiplications. Vectors and tiles work at the same time only if their
// instructions alternate that often: there are few registers to rename tiles to, and an instruction that waits for one
// holds up all that follow.
template <int kParts, int kRows, int kColumns, class Meanwhile>
FA_NOINLINE void multiply_tiles(const AmxMatrix<const char>& left, const AmxMatrix<const char>& right, int steps,
                                const AmxMatrix<char>& sum, bool accumulates, const Meanwhile& meanwhile) {
  // The intrinsics that load tiles do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  char* const low = sum.data + sum.next_tile;  // the second row of tiles
  if (accumulates) {
    _tile_loadd(0, sum.data, sum.row_bytes);
    if constexpr (kColumns == 2) _tile_loadd(1, sum.data + kAmxRowBytes, sum.row_bytes);
    if constexpr (kRows == 2) _tile_loadd(2, low, sum.row_bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, low + kAmxRowBytes, sum.row_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step) {
    const char* a = left.data + step * left.next_step;
    FA_UNROLL
    for (int part = 0; part < kParts; ++part, a += left.next_part) {
      const char* b = right.data + step * right.next_step;
      FA_UNROLL
      for (int other = 0; other < kParts - part; ++other, b += right.next_part) {
        _tile_loadd(6, b, right.row_bytes);
        if (other == 0) _tile_loadd(4, a, left.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kRows == 2) {
          if (other == 0) _tile_loadd(5, a + left.next_tile, left.row_bytes);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kColumns == 2) {
          _tile_loadd(7, b + right.next_tile, right.row_bytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
        meanwhile();
      }
    }
  }
  _tile_stored(0, sum.data, sum.row_bytes);
  if constexpr (kColumns == 2) _tile_stored(1, sum.data + kAmxRowBytes, sum.row_bytes);
  if constexpr (kRows == 2) _tile_stored(2, low, sum.row_bytes);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, low + kAmxRowBytes, sum.row_bytes);
}

// Computes rows x columns tiles of the sum. The tiles of a row of the sum lie side by side.
template <int kParts, class Meanwhile = DoNothing>
void multiply_amx(const AmxMatrix<const char>& left, const AmxMatrix<const char>& right, int steps, int rows,
                  int columns, const AmxMatrix<char>& sum, bool accumulates, const Meanwhile& meanwhile = {}) {
  for (int r = 0; r < rows; r += 2) {
    AmxMatrix<const char> a = left;
    a.data += r * left.next_tile;
    for (int c = 0; c < columns; c += 2) {
      AmxMatrix<const char> b = right;
      b.data += c * right.next_tile;
      AmxMatrix<char> target = sum;
      target.data += r * sum.next_tile + c * kAmxRowBytes;
      const auto multiply = [&](auto function) { function(a, b, steps, target, accumulates, meanwhile); };
      if (rows - r > 1) {
        columns - c > 1 ? multiply(multiply_tiles<kParts, 2, 2, Meanwhile>)
                        : multiply(multiply_tiles<kParts, 2, 1, Meanwhile>);
      } else {
        columns - c > 1 ? multiply(multiply_tiles<kParts, 1, 2, Meanwhile>)
                        : multiply(multiply_tiles<kParts, 1, 1, Meanwhile>);
      }
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
#endif
