#include "launcher.h"

namespace fused_attn::gpu {
template void launch_bias_gradient<96>(const Params&, const BiasGradientParams&, bool, Stream);
}  // namespace fused_attn::gpu
