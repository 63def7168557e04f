// Chooses the kernels of a call: the set that is compiled for an architecture and for head dims.
#pragma once
#include <stdexcept>
#include <string>

#include "bias_gradient/plan.h"
#include "decode.h"
#include "kernels.h"
#include "tiles.h"

namespace fused_attn::gpu {

using Launcher = void (*)(const Params&, bool, Stream);

// The launchers for one architecture, and for heads of up to head_dim columns in queries and keys, and of up to
// value_dim columns in values.
struct KernelSet {
  int architecture;
  int head_dim;
  int value_dim;
  Launcher forward;
  int forward_rows[2];  // the rows of a tile of queries in the plain forward kernel, and in the general one
  Launcher backward;
  BiasGradientLauncher bias_gradient;
  BiasGradientTile bias_gradient_tile;
  void (*decode)(const Params&, const DecodeParams&, bool, Stream);
};

// The decode kernel for a head dim: there is none for 192.
template <int kHeadDim>
constexpr int kDecodeHeadDim = kHeadDim == 192 ? 256 : kHeadDim;

// The kernels that an architecture has for these head dims.
template <int kHeadDim, int kValueDim = kHeadDim>
constexpr KernelSet sm80_kernels() {
  using BiasTile = BiasGradientTileSm80<kHeadDim>;
  return {80,
          kHeadDim,
          kValueDim,
          sm80::launch_forward<kHeadDim, kValueDim>,
          {ForwardTileSm80<kHeadDim>::kBlockM, ForwardTileSm80<kHeadDim>::kBlockM},
          sm80::launch_backward<kHeadDim, kValueDim>,
          sm80::launch_bias_gradient<kHeadDim, kValueDim>,
          {BiasTile::kBlockM, BiasTile::kBlockN},
          launch_decode<kDecodeHeadDim<kHeadDim>>};
}
template <int kHeadDim, int kValueDim = kHeadDim>
constexpr KernelSet sm90_kernels() {
  using BiasTile = BiasGradientTileSm90<kHeadDim>;
  return {90,
          kHeadDim,
          kValueDim,
          sm90::launch_forward<kHeadDim, kValueDim>,
          {kForwardRowsSm90<kHeadDim, false>, kForwardRowsSm90<kHeadDim, true>},
          sm90::launch_backward<kHeadDim, kValueDim>,
          sm90::launch_bias_gradient<kHeadDim, kValueDim>,
          {BiasTile::kBlockM, BiasTile::kBlockN},
          launch_decode<kDecodeHeadDim<kHeadDim>>};
}

// CMake can leave an architecture out.
constexpr KernelSet kKernelSets[] = {
#ifndef FUSED_ATTN_WITHOUT_SM80
    sm80_kernels<64>(), sm80_kernels<96>(), sm80_kernels<128>(), sm80_kernels<192, 128>(), sm80_kernels<256>(),
#endif
#ifndef FUSED_ATTN_WITHOUT_SM90
    sm90_kernels<64>(), sm90_kernels<96>(), sm90_kernels<128>(), sm90_kernels<192, 128>(), sm90_kernels<256>(),
#endif
};

// The first kernels that queries and values fit into, and so the smallest ones. Columns beyond the tensors' own are
// zeros.
inline const KernelSet& kernels_for(int architecture, int64_t head_dim, int64_t value_dim) {
  for (const KernelSet& set : kKernelSets) {
    if (set.architecture == architecture && set.head_dim >= head_dim && set.value_dim >= value_dim) return set;
  }
  throw std::invalid_argument("no kernel for head dims " + std::to_string(head_dim) + " and " +
                              std::to_string(value_dim) + " on sm_" + std::to_string(architecture));
}

}  // namespace fused_attn::gpu
