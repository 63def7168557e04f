// Tiles of 16-bit rows in shared memory, in the layout that TMA writes and wgmma reads. A tile consists of panels of 64
// columns, one after another. In a panel, each row has 128 bytes, in the 128-byte swizzle: the hardware permutes the
// 16-byte chunks of a row, so that wgmma has no bank conflicts. If the head dim is no multiple of 64, the last columns
// of the last panel are unused: TMA fills them with zeros.
//
// A tile may also have panels of 32 columns, in the 64-byte swizzle. They are for a product that takes 32 of the
// columns as its right factor: a descriptor begins with a whole panel.
#pragma once
#include "../fragments.h"

namespace fused_attn::gpu::sm90 {

constexpr int kPanelColumns = 64;
constexpr uint32_t kPanelRowBytes = 128;
constexpr uint32_t kSwizzleBytes = 1024;  // eight rows, after which the pattern of the swizzle repeats

// A tensor (batch, head, row, column) as TMA sees it. TMA accepts no stride of 0. So a dimension with stride 0 has one
// entry in the tensor map, and its step is 0: every index becomes index 0.
struct Map {
  TensorMap tensor;
  int32_t head_step;  // 1, or 0 for a dimension with one entry
  int32_t batch_step;
};

// The layout of a tile of kRows rows in panels of kColumns columns, and what can be done with it. `tile` is always its
// address in shared memory.
template <int kHeadDim, int kRows, int kColumns = kPanelColumns>
struct Tile {
  static constexpr int kPanels = (kHeadDim + kColumns - 1) / kColumns;
  static constexpr uint32_t kRowBytes = 2 * kColumns;
  static constexpr uint32_t kPanelBytes = kRows * kRowBytes;
  static constexpr uint32_t kBytes = kPanels * kPanelBytes;
  static constexpr uint32_t kGroupBytes = 8 * kRowBytes;  // eight rows, after which the pattern of the swizzle repeats

  // Descriptor for wgmma of columns 16 * k ... 16 * k + 15, for a product that sums over the columns. Rows begin at
  // first_row, a multiple of 8.
  static GPU_DEVICE uint64_t columns(uint32_t tile, int first_row, int k) {
    constexpr int kStepsPerPanel = kColumns / 16;
    return matrix_descriptor<kRowBytes>(tile + first_row * kRowBytes, 16, kGroupBytes) +
           matrix_descriptor_step(k / kStepsPerPanel * kPanelBytes + k % kStepsPerPanel * 32);
  }

  // Descriptor for wgmma of rows 16 * k ... 16 * k + 15 with all their columns, for a product that sums over the rows.
  static GPU_DEVICE uint64_t rows(uint32_t tile, int k) {
    return matrix_descriptor<kRowBytes>(tile, kPanelBytes, kGroupBytes) + matrix_descriptor_step(16 * k * kRowBytes);
  }

  // Starts to load kRows rows from `row` on, and their columns from `column` on, one panel at a time. One thread calls
  // this. The barrier has to expect as many bytes as the boxes of the map have. These are kBytes bytes if a box has
  // kRows rows.
  static GPU_DEVICE void load(uint32_t tile, const Map& map, uint32_t barrier, int row, int head, int batch,
                              int column = 0) {
    GPU_UNROLL for (int panel = 0; panel < kPanels; ++panel) {
      tma_load_4d(tile + panel * kPanelBytes, &map.tensor, barrier, column + panel * kColumns, row,
                  head * map.head_step, batch * map.batch_step);
    }
  }

  // Starts to copy the tile to kRows rows of a tensor, from `row` on. One thread calls this, and commits the copy.
  // Panels beyond the tensor's columns are left out.
  static GPU_DEVICE void store(const Map& map, uint32_t tile, int row, int head, int batch, int columns) {
    GPU_UNROLL for (int panel = 0; panel < kPanels; ++panel) {
      if (panel * kColumns < columns)
        tma_store_4d(&map.tensor, tile + panel * kPanelBytes, panel * kColumns, row, head * map.head_step,
                     batch * map.batch_step);
    }
  }

  // A warp writes a fragment to rows first_row ... first_row + 15 by stmatrix, 16 columns at a time. matrix_row is the
  // address that this lane gives for the first 16 columns, and matrix_chunk the one for columns 16 * k and up.
  static GPU_DEVICE uint32_t matrix_row(uint32_t tile, int first_row, Lane lane) {
    static_assert(kColumns == kPanelColumns, "the 64-byte swizzle is another one");
    const int row = first_row + lane.index / 8 % 2 * 8 + lane.index % 8;
    return tile + row * kPanelRowBytes + ((lane.index / 16) ^ (lane.index % 8)) * 16;
  }
  static GPU_DEVICE uint32_t matrix_chunk(uint32_t matrix_row, int k) {
    constexpr int kStepsPerPanel = kPanelColumns / 16;
    return (matrix_row + k / kStepsPerPanel * kPanelBytes) ^ (32 * (k % kStepsPerPanel));
  }

  // Overwrites the rows that are not valid with zeros. All lanes of a warp call this, and each lane writes one chunk of
  // a row. The order of chunks within a row does not matter, because all of them become zeros.
  template <class Valid>
  static GPU_DEVICE void clear_invalid_rows(uint32_t tile, const Valid& valid, Lane lane) {
    static_assert(Valid::kWords * 32 == kRows);
    constexpr int kChunks = kRowBytes / 16;
    GPU_UNROLL for (int word = 0; word < valid.kWords; ++word) {
      for (int row = lane.index / kChunks; row < 32; row += 32 / kChunks) {
        if (valid.word(word) >> row & 1) continue;
        const uint32_t address = tile + (32 * word + row) * kRowBytes + lane.index % kChunks * 16;
        GPU_UNROLL for (int panel = 0; panel < kPanels; ++panel) {
          store_shared(address + panel * kPanelBytes, Vec4{0, 0, 0, 0});
        }
      }
    }
  }
};

// A fragment as one array of registers, as wgmma takes it.
template <int kTiles>
GPU_DEVICE float (&flat(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
}

// Starts scores = left @ right^T over the head dim on the tensor cores: 64 rows of the tile `left` from first_row on,
// and all rows of the tile `right`. The left tile has panels of kLeftColumns columns. All threads of a warpgroup call
// this, between wgmma_fence and wgmma_commit.
template <class T, int kHeadDim, int kLeftRows, int kLeftColumns = kPanelColumns, int kTiles>
GPU_DEVICE void start_multiply_transposed(float (&scores)[kTiles][4], uint32_t left, int first_row, uint32_t right) {
  GPU_UNROLL for (int k = 0; k < kHeadDim / 16; ++k) {
    wgmma_ss<T, 8 * kTiles, 0, 0>(flat(scores), Tile<kHeadDim, kLeftRows, kLeftColumns>::columns(left, first_row, k),
                                  Tile<kHeadDim, 8 * kTiles>::columns(right, 0, k), k > 0);
  }
}

// Starts acc = (accumulate ? acc : 0) + left @ right on the tensor cores. `left` is in registers, `right` is a tile.
// All threads of a warpgroup call this, between wgmma_fence and wgmma_commit.
template <class T, int kHeadDim, int kSteps>
GPU_DEVICE void start_multiply(float (&acc)[kHeadDim / 8][4], const uint32_t (&left)[kSteps][4], uint32_t right,
                               bool accumulate = true) {
  GPU_UNROLL for (int k = 0; k < kSteps; ++k) {
    wgmma_rs<T, kHeadDim, 1>(flat(acc), left[k], Tile<kHeadDim, 16 * kSteps>::rows(right, k), accumulate || k > 0);
  }
}

}  // namespace fused_attn::gpu::sm90
