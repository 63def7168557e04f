// The kernels for bfloat16 compiled with the flags of kernels_avx512.cpp and -mavx512bf16, for the processors Cooper
// Lake, Sapphire Rapids, Zen 4 and newer. Their table names the kernels of kernels_avx512.cpp for the other dtypes.
#define FUSED_ATTN_ISA avx512_bf16
#include "kernels_body.h"
