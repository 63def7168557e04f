// Tiles of a dense bias in shared memory, which TMA loads. A thread then reads the bias of its fragment by ldmatrix,
// eight numbers at a time. Loads from global memory (logits.h) take twice as many instructions, and each warp would
// wait for their data.
//
// Some kernels read a bias from global memory all the same. Of the two kernels of backward.h, the one for dq visits 32
// keys at a time, and a tile of 32 keys would need another swizzle. The kernel for the gradient of one bias has no
// memory for the tiles of another one.
#pragma once
#include "tile_memory.h"

namespace fused_attn::gpu::sm90 {

// A dense bias (batch, head, query, key) as TMA sees it. If all queries share a row of the bias, a tile has this row
// alone.
struct BiasMap {
  Map map;
  int32_t is_used;   // 0 if there is no bias, or if TMA does not accept its strides
  int32_t row_step;  // 1, or 0 if all queries share a row
};

// A tile of the bias of kKeys keys for kQueries queries. `tile` is always its address in shared memory.
template <int kKeys, int kQueries>
struct BiasTile {
  using Layout = Tile<kKeys, kQueries>;
  static constexpr uint32_t kBytes = Layout::kBytes;

  // How many bytes `load` makes the barrier count.
  static GPU_DEVICE uint32_t loaded_bytes(const BiasMap& bias) {
    return bias.row_step != 0 ? kBytes : Layout::kPanels * Layout::kRowBytes;
  }
  // Starts to load the tile. One thread calls this.
  static GPU_DEVICE void load(uint32_t tile, const BiasMap& bias, uint32_t barrier, int query, int key, int head,
                              int batch) {
    Layout::load(tile, bias.map, barrier, query * bias.row_step, head, batch, key);
  }

  // Multiplies scores by `factor`, and adds the bias. The rows of the fragment are the queries from first_query of the
  // tile on. All lanes of a warp call this.
  template <class T, int kTiles>
  static GPU_DEVICE void add(float (&scores)[kTiles][4], float factor, uint32_t tile, const BiasMap& bias,
                             int first_query, Lane lane) {
    static_assert(8 * kTiles == kKeys);
    // If there is one row only, all lanes give its address. The swizzle leaves the first row of a tile as it is.
    const uint32_t own_row =
        bias.row_step != 0 ? Layout::matrix_row(tile, first_query, lane) : tile + lane.index / 16 * 16;
    GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
      uint32_t pairs[4];
      load_matrix_x4(pairs, Layout::matrix_chunk(own_row, k));
      add_pairs<T>(scores, factor, pairs, k);
    }
  }

  // The same for transposed scores: the rows of the fragment are the keys from first_key of the tile on, and the
  // columns are the queries of the tile.
  template <class T, int kTiles>
  static GPU_DEVICE void add_transposed(float (&scores)[kTiles][4], float factor, uint32_t tile, const BiasMap& bias,
                                        int first_key, Lane lane) {
    static_assert(8 * kTiles == kQueries);
    // Each group of eight lanes gives the addresses of eight queries, of which the group loads eight keys.
    const uint32_t first = tile + first_key / kPanelColumns * Layout::kPanelBytes;
    const int chunk = first_key % kPanelColumns / 8 + lane.index / 8 % 2, row = lane.index % 8;
    const uint32_t own_row = bias.row_step != 0
                                 ? first + (lane.index / 16 * 8 + row) * Layout::kRowBytes + (chunk ^ row) * 16
                                 : first + chunk * 16;
    GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
      uint32_t pairs[4];
      load_matrix_x4_transposed(pairs, own_row + k * bias.row_step * (16 * Layout::kRowBytes));
      add_pairs<T>(scores, factor, pairs, k);
    }
  }

 private:
  // Adds what a matrix of ldmatrix gives to each thread: two numbers of the same row.
  template <class T, int kTiles>
  static GPU_DEVICE void add_pairs(float (&scores)[kTiles][4], float factor, const uint32_t (&pairs)[4], int k) {
    GPU_UNROLL for (int i = 0; i < 4; ++i) {
      const Float2 pair = unpack<T>(pairs[i]);
      const int t = 2 * k + i / 2, r = i % 2;
      scores[t][2 * r] = multiply_add(scores[t][2 * r], factor, pair.x);
      scores[t][2 * r + 1] = multiply_add(scores[t][2 * r + 1], factor, pair.y);
    }
  }
};

}  // namespace fused_attn::gpu::sm90
