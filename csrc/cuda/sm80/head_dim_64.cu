#include "launchers.h"

namespace fused_attn::gpu::sm80 {
template void launch_forward<64>(const Params&, bool, Stream);
template void launch_backward<64>(const Params&, bool, Stream);
template void launch_bias_gradient<64>(const Params&, const BiasGradientParams&, bool, Stream);
}  // namespace fused_attn::gpu::sm80
