// The product of linear.h with AMX. Vectors need a multiply-add of each row for each vector of the weight, so the time
// grows with the rows. A tile has 16 rows, and the weight is read from the tensor as it is:
//
//   products[output][row] = weight . x^T        then transposed
#pragma once
#include "amx.h"
#include "elements.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// Without AMX: nothing.
template <class Policy, bool kUsesAmx = Policy::kUsesAmx>
struct LinearTiles {
  using Storage = typename Policy::Storage;
  static constexpr bool fits(int64_t /*rows*/, int64_t /*in*/, int64_t /*out*/) { return false; }
  static void project(const Storage* /*x*/, int64_t /*rows*/, int64_t /*in*/, const Storage* /*weight*/,
                      const Storage* /*bias*/, int64_t /*out*/, int /*num_threads*/, Storage* /*y*/) {}
};

#if defined(__AMX_BF16__)

template <class Policy>
struct LinearTiles<Policy, true> {
  using Storage = typename Policy::Storage;

  static constexpr int64_t kStepColumns = 32;         // of a tile of the weight
  static constexpr int64_t kOutputs = 2 * kAmxRows;   // of a work item: 2 tiles of weight
  static constexpr int64_t kPassRows = 2 * kAmxRows;  // of x that are multiplied at once
  static constexpr int64_t kLeastRows = 3;

  // Whether project() can compute the product, and is faster than vectors.
  static bool fits(int64_t rows, int64_t in, int64_t out) {
    return rows >= kLeastRows && in % kStepColumns == 0 && out >= kOutputs;
  }

  static void project(const Storage* x, int64_t rows, int64_t in, const Storage* weight, const Storage* bias,
                      int64_t out, int num_threads, Storage* y) {
    const int64_t steps = in / kStepColumns;
    const int64_t tile_row_bytes = steps * kAmxTileBytes;  // of 16 rows of x
    const int64_t row_tiles = (rows + kAmxRows - 1) / kAmxRows;
    const Buffer memory(row_tiles * tile_row_bytes);
    const double elements = static_cast<double>(rows) * static_cast<double>(in);
    parallel_for(choose_threads(num_threads, row_tiles, elements), row_tiles, [&](int64_t tile, int) {
      for (int64_t step = 0; step < steps; ++step)
        make_tile(x + tile * kAmxRows * in + step * kStepColumns, rows - tile * kAmxRows, in,
                  memory.data() + tile * tile_row_bytes + step * kAmxTileBytes);
    });
    const int64_t items = (out + kOutputs - 1) / kOutputs;
    const double flops = 2.0 * elements * static_cast<double>(out);
    parallel_for(choose_threads(num_threads, items, flops), items, [&](int64_t item, int) {
      // The last item begins earlier if it has fewer outputs, and computes some of them a second time. Two threads may
      // then write the same numbers to the same place.
      const int64_t first = out - item * kOutputs < kOutputs ? out - kOutputs : item * kOutputs;
      const AmxRegisters registers;
      const int64_t row_bytes = in * static_cast<int64_t>(sizeof(Storage));
      const AmxMatrix<const char> left = {reinterpret_cast<const char*>(weight + first * in), row_bytes,
                                          kAmxRows * row_bytes, kAmxRowBytes, 0};
      alignas(kCacheLine) float products[kOutputs * kPassRows];
      constexpr int64_t kProductRowBytes = kPassRows * sizeof(float);
      for (int64_t r = 0; r < rows; r += kPassRows) {
        const int64_t count = rows - r < kPassRows ? rows - r : kPassRows;
        const AmxMatrix<const char> right = {memory.data() + r / kAmxRows * tile_row_bytes, kAmxRowBytes,
                                             tile_row_bytes, kAmxTileBytes, 0};
        multiply_amx<1>(left, right, static_cast<int>(steps), 2, count > kAmxRows ? 2 : 1,
                        {reinterpret_cast<char*>(products), kProductRowBytes, kAmxRows * kProductRowBytes, 0, 0},
                        /*accumulates=*/false);
        store_products(products, count, bias == nullptr ? nullptr : bias + first, out, y + r * out + first);
      }
    });
  }

 private:
  // Writes 32 columns of up to 16 rows of x as the right factor of a product. Rows behind the last one are zero.
  static void make_tile(const Storage* x, int64_t rows, int64_t in, char* tile) {
    Vec<float> pairs[kAmxRows] = {};
    for (int64_t r = 0; r < (rows < kAmxRows ? rows : kAmxRows); ++r) memcpy(&pairs[r], x + r * in, kAmxRowBytes);
    transpose<float>(pairs);
    memcpy(tile, pairs, sizeof(pairs));
  }

  // y[row][output] = products[output][row] + bias[output], for the outputs of an item.
  static void store_products(const float* products, int64_t rows, const Storage* bias, int64_t out, Storage* y) {
    for (int64_t o = 0; o < kOutputs; o += kAmxRows) {
      const Vec<float> offset = bias != nullptr ? load_as<float>(bias + o) : Vec<float>{};
      for (int64_t r = 0; r < rows; r += kAmxRows) {
        Vec<float> sums[kAmxRows];
        FA_UNROLL
        for (int i = 0; i < kAmxRows; ++i) sums[i] = load<float>(products + (o + i) * kPassRows + r);
        transpose<float>(sums);
        const int64_t count = rows - r < kAmxRows ? rows - r : kAmxRows;
        for (int64_t i = 0; i < count; ++i) store_as<float>(y + (r + i) * out + o, sums[i] + offset);
      }
    }
  }
};

#endif

}  // namespace
}  // namespace fused_attn::cpu
