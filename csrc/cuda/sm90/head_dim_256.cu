#include "launchers.h"

namespace fused_attn::gpu::sm90 {
template void launch_forward<256>(const Params&, bool, Stream);
template void launch_backward<256>(const Params&, bool, Stream);
template void launch_bias_gradient<256>(const Params&, const BiasGradientParams&, bool, Stream);
}  // namespace fused_attn::gpu::sm90
