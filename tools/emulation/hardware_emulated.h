// The definitions that csrc/cuda/hardware.h lists, for a CPU. g++ compiles this in place of hardware_gpu.h.
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

// Stands for the class of runtime_gpu.h. There is one device, so nothing has to be made current.
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

// As many blocks as run side by side, so that persistent kernels take several tiles for each block.
inline int num_multiprocessors() { return emulation::session_options().resident_blocks; }

// Every kernel can be loaded, because it is part of this library.
template <class... Parameters>
void check_loadable(void (*)(Parameters...)) {}

// Runs a kernel, and returns the fault that the emulation has found, or an empty text. The kernel has ended when this
// returns, so the stream does not matter.
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchShape& shape, void*, const Arguments&... arguments) {
  const std::string error =
      emulation::check_shared_limit(reinterpret_cast<const void*>(kernel), shape.shared_bytes, shape.most_shared_bytes);
  if (!error.empty()) return error;
  return emulation::launch({{shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, uint32_t(shape.shared_bytes)},
                           emulation::session_options(), &emulation::session_statistics(),
                           [&] { kernel(arguments...); });
}

}  // namespace fused_attn::gpu

#include "primitives_emulated.h"
