// The kernels compiled without flags, for every x86-64 (SSE2) or arm64 (NEON) processor.
#define FUSED_ATTN_ISA baseline
#include "kernels_body.h"
