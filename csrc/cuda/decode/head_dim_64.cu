#include "launcher.h"

namespace fused_attn::gpu {
template void launch_decode<64>(const Params&, const DecodeParams&, bool, Stream);
}  // namespace fused_attn::gpu
