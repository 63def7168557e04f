// The kernels compiled with -mavx2 -mfma -mf16c, for the processors Haswell, Zen and newer.
#define FUSED_ATTN_ISA avx2
#include "kernels_body.h"
