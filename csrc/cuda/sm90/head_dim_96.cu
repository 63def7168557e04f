#include "launchers.h"

namespace fused_attn::gpu::sm90 {
template void launch_forward<96>(const Params&, bool, Stream);
template void launch_backward<96>(const Params&, bool, Stream);
template void launch_bias_gradient<96>(const Params&, const BiasGradientParams&, bool, Stream);
}  // namespace fused_attn::gpu::sm90
