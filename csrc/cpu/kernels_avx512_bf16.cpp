// As kernels_avx512.cpp with -mavx512bf16: Cooper Lake, Sapphire Rapids, Zen 4 and newer.
#define FUSED_ATTN_ISA avx512_bf16
#include "kernels_body.h"
