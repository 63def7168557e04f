// Tiles of 16-bit rows in shared memory: their layout, how cp.async fills them, and how mma.sync reads fragments of
// them.
#pragma once
#include <type_traits>

#include "../fragments.h"
#include "../head_slice.h"

namespace fused_attn::gpu::sm80 {

// The layout of a tile. Rows follow one another. Within a row, chunks of 16 bytes are permuted (a swizzle), in a way
// that depends on the row. ldmatrix reads the same chunk of eight neighbouring rows at once. The swizzle places these
// eight chunks in different groups of banks, so that there is no bank conflict. Tiles start at multiples of 128 bytes.
template <int kHeadDim>
struct TileLayout {
  static constexpr int kRowBytes = 2 * kHeadDim;
  // Chunks are permuted within groups of kGroup chunks. If the bytes of a row are no multiple of 128, every second row
  // starts 64 bytes further on in the banks anyway, and groups of 4 are enough.
  static constexpr int kGroup = kHeadDim % 64 == 0 ? 8 : 4;

  // The byte offset of chunk `chunk` of row `row` in the tile. The chunk number is below kGroup.
  static GPU_DEVICE uint32_t offset(int row, int chunk) {
    const int swizzle = kGroup == 8 ? row & 7 : row >> 1 & 3;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  }

  // Takes the address of chunk 0 or 1 of a row, and returns the address of the chunk that lies 2 * pairs chunks further
  // on. If `pairs` is a constant, this takes one exclusive-or, because the swizzle itself is an exclusive-or with the
  // number of the chunk. `offset` would need a register for the address of each chunk.
  static GPU_DEVICE uint32_t advance(uint32_t address, int pairs) {
    constexpr int kPairs = kGroup / 2;
    return (address ^ pairs % kPairs * 32) + pairs / kPairs * (kPairs * 32);
  }
};

// A number of columns, for lambdas that copy tiles with either head dim.
template <int kColumns>
using Columns = std::integral_constant<int, kColumns>;

// The chunks of a tile that one of kThreads threads copies: chunks `chunk`, chunk + kGroup and so on of every
// kRowsAtOnce-th row from first_row on.
template <int kHeadDim, int kRows, int kThreads>
struct CopiedChunks {
  using Layout = TileLayout<kHeadDim>;
  static constexpr int kRowsAtOnce = kThreads / Layout::kGroup;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0 && 32 % kRowsAtOnce == 0);
  const int first_row = thread_index() / Layout::kGroup, chunk = thread_index() % Layout::kGroup;
  const uint32_t address;

  GPU_DEVICE explicit CopiedChunks(uint32_t tile) : address(tile + Layout::offset(first_row, chunk)) {}

  // Starts to copy this thread's chunks of row first_row + row of the tile. source: the first of these chunks
  template <bool kChecksColumns, class T>
  GPU_DEVICE void copy(int row, const T* source, int32_t columns, bool is_inside) const {
    GPU_UNROLL for (int column = 0; column < kHeadDim; column += Layout::kGroup * 8) {
      copy_async_16(address + row * Layout::kRowBytes + column * 2, source + column,
                    is_inside && (!kChecksColumns || column + chunk * 8 < columns));
    }
  }
};

// Starts to copy kRows rows of x from `source` on into a tile. All threads of the block call this, and each copies its
// chunks of some rows. Row first + offset is read if is_valid(first, offset) is true. Otherwise its chunks become
// zeros: memory may hold NaN there, and NaN times a probability of 0 is NaN. `offset` is a constant, and rows first and
// first + offset lie in the same 32 rows. With kChecksColumns, x may have fewer columns than kHeadDim, and the missing
// columns become zeros.
template <int kHeadDim, int kRows, int kThreads, bool kChecksColumns, class T, class IsValid>
GPU_DEVICE void copy_rows(uint32_t tile, const Rows& x, const T* source, IsValid is_valid) {
  const CopiedChunks<kHeadDim, kRows, kThreads> own(tile);
  source += own.first_row * x.stride_row + own.chunk * 8;
  GPU_UNROLL for (int row = 0; row < kRows; row += own.kRowsAtOnce) {
    own.template copy<kChecksColumns>(row, source, x.columns, is_valid(own.first_row, row));
    source += own.kRowsAtOnce * x.stride_row;
  }
}

// As copy_rows, for the keys or values of a head slice that lie in pages: key first_key and the following ones.
template <int kHeadDim, int kRows, int kThreads, class T, class IsValid>
GPU_DEVICE void copy_paged_rows(uint32_t tile, const Rows& x, const Pages& pages, const HeadSlice& head_slice,
                                int32_t first_key, IsValid is_valid) {
  const CopiedChunks<kHeadDim, kRows, kThreads> own(tile);
  const T* const head = static_cast<const T*>(x.data) + head_slice.kv_head * x.stride_head;
  GPU_UNROLL for (int row = 0; row < kRows; row += own.kRowsAtOnce) {
    const bool is_inside = is_valid(own.first_row, row);
    const int32_t key = is_inside ? first_key + own.first_row + row : 0;  // the table may end before other keys
    const int64_t page = existing_page(pages, listed_page(pages, head_slice.batch, key));
    const T* const source = head + page * x.stride_batch + key % pages.size * x.stride_row + own.chunk * 8;
    own.template copy<true>(row, source, x.columns, is_inside);
  }
}

// The addresses that this lane gives to ldmatrix for the first 16 columns of a tile at `shared`. Other tiles and other
// columns lie at constant distances from these.
//
//   left               the warp's 16 rows, as a left factor
//   right              the first 16 rows, as a right factor; ldmatrix transposes them
//   right_transposed   the first 16 rows, as the transpose of a right factor
//
// ldmatrix fills four registers. For a right factor, two of them hold the first 8 columns of the result and two the
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

// scores += left @ right^T over the head dim, for this warp's rows of the tile `left` and all rows of the tile `right`.
// Both are given as byte distances from the tile of the corners. All lanes of a warp call this.
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

// acc += left @ right, where `left` is in registers: as left factors (fragments.h), or as floats, which are rounded to
// T here. `right` is the byte distance of a tile from the tile of the corners. All lanes of a warp call this.
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
