// What csrc/cuda/hardware.h promises, on a CPU: for kernels that g++ compiles.
#pragma once
#include <string>

#include "emulated_call.h"
#include "launch.h"
#include "tensor_map.h"

#define GPU_DEVICE inline
#define GPU_KERNEL inline
#define GPU_LAUNCH_BOUNDS(threads, blocks)
#define GPU_GRID_CONSTANT
#define GPU_UNROLL
#define GPU_NO_UNROLL

namespace fused_attn::gpu {

using TensorMap = emulation::TensorMap;

constexpr bool kRunsOnCpu = true;

// There is one device.
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline int num_multiprocessors() { return emulation::session_options().resident_blocks; }

template <class... Parameters>
std::string why_not_loadable(void (*)(Parameters...)) {
  return "";
}

// Returns what the emulation found, or an empty text. The stream is not read: the kernel has ended when this returns.
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchShape& shape, void*, const Arguments&... arguments) {
  return emulation::launch({{shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, uint32_t(shape.shared_bytes)},
                           emulation::session_options(), &emulation::session_statistics(),
                           [&] { kernel(arguments...); });
}

}  // namespace fused_attn::gpu

#include "primitives_emulated.h"
