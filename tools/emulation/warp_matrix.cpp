#include "warp_matrix.h"

#include <cstring>

#include "block.h"
#include "errors.h"
#include "float16.h"

namespace fused_attn::emulation {
namespace {

constexpr int kRows = 8;  // of the matrices that ldmatrix and stmatrix move
constexpr uint32_t kRowBytes = 16;

// What a lane passes to load_matrix or store_matrix: its registers, one for each matrix, and the address of one row.
struct MatrixOperand {
  uint32_t* r;
  uint32_t address;
};

// What a lane passes to mma_m16n8k16: its registers of the result and of both factors.
struct MmaOperand {
  float* c;
  const uint32_t *a, *b;
};

// The lower half of a register (half = 0) or the upper one.
uint16_t half_of(uint32_t pair, int half) { return uint16_t(pair >> (16 * half)); }

// The name of the primitive, for reports.
const char* matrix_name(bool is_load, int matrices, bool is_transposed) {
  if (!is_load) return is_transposed ? "store_matrix_x4_transposed" : "store_matrix_x4";
  if (matrices == 2) return is_transposed ? "load_matrix_x2_transposed" : "load_matrix_x2";
  return is_transposed ? "load_matrix_x4_transposed" : "load_matrix_x4";
}

// Counts the bank conflicts of one instruction. Only the lanes whose addresses name a row take part.
void count_conflicts(void** lanes, int matrices) {
  uint32_t addresses[kWarpSize] = {};
  for (int i = 0; i < kRows * matrices; i++) addresses[i] = static_cast<MatrixOperand*>(lanes[i])->address;
  block().bank_conflicts.add(addresses, kRows * matrices, kRowBytes);
}

// Gathers the factors from the registers of all lanes, multiplies, and writes the results. PTX ISA, "Matrix fragments
// for mma.m16n8k16", says which element lies where.
template <bool kIsBf16>
void multiply(void** lanes) {
  using Row = float __attribute__((vector_size(8 * sizeof(float))));  // of the right factor, and of the sum
  float left[16][16];
  Row right[16], sum[16];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const MmaOperand& own = *static_cast<MmaOperand*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++)
        left[group + 8 * (i & 1)][pair + half + 8 * (i >> 1)] = from_16_bits(half_of(own.a[i], half), kIsBf16);
      for (int i = 0; i < 2; i++) right[pair + half + 8 * i][group] = from_16_bits(half_of(own.b[i], half), kIsBf16);
    }
    for (int i = 0; i < 4; i++) sum[group + 8 * (i >> 1)][pair + (i & 1)] = own.c[i];
  }
  for (int row = 0; row < 16; row++) {
    Row of_row = sum[row];
    for (int k = 0; k < 16; k++) of_row += left[row][k] * right[k];
    sum[row] = of_row;
  }
  for (int lane = 0; lane < kWarpSize; lane++) {
    const MmaOperand& own = *static_cast<MmaOperand*>(lanes[lane]);
    for (int i = 0; i < 4; i++) own.c[i] = sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
  }
}

}  // namespace

// The last lane of the warp to arrive does the work of all.
void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, bool is_bf16) {
  Block& block_ = block();
  MmaOperand operand = {c, a, b};
  void** lanes = block_.warps.meet_in_warp(is_bf16 ? "mma_m16n8k16<bf16>" : "mma_m16n8k16<f16>", &operand);
  if (lanes == nullptr) return;
  block_.statistics.mma++;
  is_bf16 ? multiply<true>(lanes) : multiply<false>(lanes);
  block_.warps.release_warp();
}

// Lane i gives the address of row i % 8 of matrix i / 8. Lanes beyond the last matrix give none. The last lane of the
// warp to arrive reads all matrices. Each lane gets two neighbouring elements of row lane / 4 of each matrix, or, if
// is_transposed, of column lane / 4.
void load_matrix(uint32_t* r, uint32_t address, int matrices, bool is_transposed) {
  Block& b = block();
  const char* name = matrix_name(/*is_load=*/true, matrices, is_transposed);
  MatrixOperand operand = {r, address};
  if (b.current->lane < kRows * matrices) read_shared(address, kRowBytes, name);
  void** lanes = b.warps.meet_in_warp(name, &operand);
  if (lanes == nullptr) return;
  if (b.options.count_bank_conflicts) count_conflicts(lanes, matrices);
  for (int i = 0; i < matrices; i++) {
    uint16_t matrix[kRows][8];
    for (int row = 0; row < kRows; row++)
      memcpy(matrix[row], b.shared.at(static_cast<MatrixOperand*>(lanes[kRows * i + row])->address, kRowBytes, 1, name),
             kRowBytes);
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int group = lane / 4, pair = 2 * (lane % 4);
      const uint16_t lo = is_transposed ? matrix[pair][group] : matrix[group][pair];
      const uint16_t hi = is_transposed ? matrix[pair + 1][group] : matrix[group][pair + 1];
      static_cast<MatrixOperand*>(lanes[lane])->r[i] = lo | uint32_t(hi) << 16;
    }
  }
  b.warps.release_warp();
}

// The opposite of load_matrix, with the same addresses and the same places of the elements.
void store_matrix(uint32_t address, const uint32_t* r, int matrices, bool is_transposed) {
  Block& b = block();
  const char* name = matrix_name(/*is_load=*/false, matrices, is_transposed);
  MatrixOperand operand = {const_cast<uint32_t*>(r), address};
  if (b.current->lane < kRows * matrices) write_shared(address, kRowBytes, name);
  void** lanes = b.warps.meet_in_warp(name, &operand);
  if (lanes == nullptr) return;
  if (b.options.count_bank_conflicts) count_conflicts(lanes, matrices);
  for (int i = 0; i < matrices; i++) {
    uint16_t matrix[kRows][8];
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int group = lane / 4, pair = 2 * (lane % 4);
      const uint32_t values = static_cast<MatrixOperand*>(lanes[lane])->r[i];
      for (int half = 0; half < 2; half++)
        (is_transposed ? matrix[pair + half][group] : matrix[group][pair + half]) = half_of(values, half);
    }
    for (int row = 0; row < kRows; row++)
      memcpy(b.shared.at(static_cast<MatrixOperand*>(lanes[kRows * i + row])->address, kRowBytes, 1, name), matrix[row],
             kRowBytes);
  }
  b.warps.release_warp();
}

}  // namespace fused_attn::emulation
