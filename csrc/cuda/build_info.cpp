// How the Python module was built. CMake defines the texts.
#include "attention.h"

namespace fused_attn::gpu {

BuildInfo build_info() { return {FUSED_ATTN_VERSION, FUSED_ATTN_NVCC, FUSED_ATTN_CUDA_ARCHITECTURES}; }

}  // namespace fused_attn::gpu
