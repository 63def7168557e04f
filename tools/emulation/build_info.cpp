// What the Python module says about its build if its kernels run in the emulation.
#include "cuda/attention.h"

namespace fused_attn::gpu {

BuildInfo build_info() { return {"emulation", "g++ " __VERSION__, ""}; }

}  // namespace fused_attn::gpu
