// The kernels compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c, for the processors Skylake-SP, Zen
// 4 and newer.
#define FUSED_ATTN_ISA avx512
#include "kernels_body.h"
