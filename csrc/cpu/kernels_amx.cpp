// The kernels for bfloat16 and float32 compiled with the flags of kernels_avx512_bf16.cpp, -mamx-tile and -mamx-bf16,
// for the processors Sapphire Rapids and newer. Their table names the kernels of kernels_avx512.cpp for all else.
#define FUSED_ATTN_ISA amx
#include "kernels_body.h"
