#include "launcher.h"

namespace fused_attn::gpu {
template void launch_bias_gradient<256>(const Params&, const BiasGradientParams&, bool, Stream);
}  // namespace fused_attn::gpu
