// Tiles of 16-bit rows in shared memory: how they are laid out, filled by cp.async, and read as fragments of mma.sync.
#pragma once
#include "../fragments.h"

namespace fused_attn::gpu::sm80 {

// Rows follow one another; within a row, chunks of 16 bytes are exchanged so that the same chunk of eight neighbouring
// rows, which is what ldmatrix reads at once, lies in eight different groups of banks. Tiles start at multiples of 128
// bytes.
template <int kHeadDim>
struct TileLayout {
  static constexpr int kRowBytes = 2 * kHeadDim;
  // Chunks are exchanged within groups of this many. Where rows are no multiple of 128 bytes, every second one starts
  // 64 bytes on by itself, and groups of 4 do.
  static constexpr int kGroup = kHeadDim % 64 == 0 ? 8 : 4;

  // Of a chunk below kGroup.
  static GPU_DEVICE uint32_t offset(int row, int chunk) {
    const int swizzle = kGroup == 8 ? row & 7 : row >> 1 & 3;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  }

  // 2 * pairs chunks on from chunk 0 or 1. One exclusive-or, where `offset` would keep an address for each chunk in
  // registers.
  static GPU_DEVICE uint32_t advance(uint32_t address, int pairs) {
    constexpr int kPairs = kGroup / 2;
    return (address ^ pairs % kPairs * 32) + pairs / kPairs * (kPairs * 32);
  }
};

// Starts to copy kRows rows from `source` on. Rows that is_valid(first, offset) refuses are not read and become zeros:
// what lies there may be NaN, which not even a probability of 0 would stop. The row is first + offset; `offset` is a
// constant, and both in the same 32 rows.
template <int kHeadDim, int kRows, int kThreads, class T, class IsValid>
GPU_DEVICE void copy_rows(uint32_t tile, const T* source, int64_t stride_row, IsValid is_valid) {
  using Layout = TileLayout<kHeadDim>;
  constexpr int kRowsAtOnce = kThreads / Layout::kGroup;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0 && 32 % kRowsAtOnce == 0);
  const int first_row = thread_index() / Layout::kGroup, chunk = thread_index() % Layout::kGroup;
  const uint32_t address = tile + Layout::offset(first_row, chunk);
  source += first_row * stride_row + chunk * 8;
  GPU_UNROLL for (int row = 0; row < kRows; row += kRowsAtOnce) {
    const bool is_inside = is_valid(first_row, row);
    GPU_UNROLL for (int column = 0; column < kHeadDim; column += Layout::kGroup * 8) {
      copy_async_16(address + row * Layout::kRowBytes + column * 2, source + column, is_inside);
    }
    source += kRowsAtOnce * stride_row;
  }
}

// Where a lane reads the first 16 columns of a tile at `shared`; other tiles are a constant further on. `left`: of the
// warp's 16 rows, as a left factor. Right factors: of the first 16 rows, as they are (ldmatrix then transposes them) or
// as their transpose; of the four registers that ldmatrix fills, two are the first 8 columns of the factor and two the
// next 8.
template <int kHeadDim>
struct Corners {
  uint32_t left;
  uint32_t right;
  uint32_t right_transposed;

  GPU_DEVICE Corners(uint32_t shared, int warp_row, Lane lane) {
    using Layout = TileLayout<kHeadDim>;
    left = shared + Layout::offset(warp_row + lane.index % 16, lane.index / 16);
    right = shared + Layout::offset(lane.index % 16, lane.index / 16);
    right_transposed = shared + Layout::offset(lane.index % 8 + lane.index / 16 * 8, lane.index / 8 % 2);
  }
};

// scores += left @ right^T over the head dim, for the warp's rows of the tile `left` and all rows of the tile `right`,
// which are given by where they lie after the corners' tile.
template <class T, int kHeadDim, int kRowTiles, int kTiles>
GPU_DEVICE void multiply_transposed(float (&scores)[kRowTiles][kTiles][4], const Corners<kHeadDim>& corners,
                                    uint32_t left, uint32_t right) {
  using Layout = TileLayout<kHeadDim>;
  GPU_UNROLL for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kRowTiles][4];
    GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
      load_matrix_x4(a[m], Layout::advance(corners.left, k) + left + 16 * m * Layout::kRowBytes);
    }
    GPU_UNROLL for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t b[4];
      load_matrix_x4(b, Layout::advance(corners.right_transposed, k) + right + 16 * n * Layout::kRowBytes);
      GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<T>(scores[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += left @ right, where `left` is in registers: as left factors (fragments.h), or as numbers to be rounded to T.
template <class T, int kHeadDim, int kRowTiles, int kSteps>
GPU_DEVICE void multiply(float (&acc)[kRowTiles][kHeadDim / 8][4], const uint32_t (&left)[kRowTiles][kSteps][4],
                         const Corners<kHeadDim>& corners, uint32_t right) {
  using Layout = TileLayout<kHeadDim>;
  GPU_UNROLL for (int k = 0; k < kSteps; ++k) {
    GPU_UNROLL for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, Layout::advance(corners.right, n) + right + 16 * k * Layout::kRowBytes);
      GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<T>(acc[m][2 * n], left[m][k], b[0], b[1]);
        mma_m16n8k16<T>(acc[m][2 * n + 1], left[m][k], b[2], b[3]);
      }
    }
  }
}
template <class T, int kHeadDim, int kRowTiles, int kTiles>
GPU_DEVICE void multiply(float (&acc)[kRowTiles][kHeadDim / 8][4], const float (&left)[kRowTiles][kTiles][4],
                         const Corners<kHeadDim>& corners, uint32_t right) {
  uint32_t rounded[kRowTiles][kTiles / 2][4];
  GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
    GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) left_factor<T>(rounded[m][k], left[m], k);
  }
  multiply<T, kHeadDim>(acc, rounded, corners, right);
}

}  // namespace fused_attn::gpu::sm80
