// Matrix operations of one warp: mma.sync, ldmatrix, stmatrix. Fragments are laid out as csrc/cuda/primitives.h says.
#pragma once
#include <cstdint>

namespace fused_attn::emulation {

// Each lane of a warp calls these with its own registers or address. load_matrix and store_matrix move `matrices` 8x8
// matrices of 16-bit numbers.
void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, bool is_bf16);
void load_matrix(uint32_t* r, uint32_t address, int matrices, bool is_transposed);
void store_matrix(uint32_t address, const uint32_t* r, int matrices, bool is_transposed);

}  // namespace fused_attn::emulation
