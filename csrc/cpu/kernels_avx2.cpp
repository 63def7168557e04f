// -mavx2 -mfma -mf16c: Haswell, Zen and newer.
#define FUSED_ATTN_ISA avx2
#include "kernels_body.h"
