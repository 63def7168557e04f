// Chooses what kernels run on: a GPU, or in tests the emulation of a GPU on a CPU (tools/emulation). No other file of
// the product knows about the emulation. The header that is chosen defines:
//
//   macros      GPU_DEVICE, GPU_KERNEL, GPU_LAUNCH_BOUNDS, GPU_GRID_CONSTANT, GPU_UNROLL, GPU_NO_UNROLL
//   TensorMap   what TMA knows of a tensor (tensor_map.h)
//   functions   all that primitives.h declares
//   host code   kRunsOnCpu, on_device, launch, DeviceGuard, num_multiprocessors, check_loadable
#pragma once

namespace fused_attn::gpu {

// How many blocks and threads a launch has.
struct LaunchShape {
  int grid_x, grid_y, grid_z;  // blocks
  int threads;                 // in each block
  int shared_bytes;            // dynamic shared memory of each block
  // The most that any launch of the same kernel takes. All launches of a kernel have to agree about it: it is set for
  // the kernel, and another thread of the host may launch the kernel with another shared_bytes at the same time.
  int most_shared_bytes = shared_bytes;
};

}  // namespace fused_attn::gpu

#if defined(FUSED_ATTN_EMULATION)
#include "emulation/hardware_emulated.h"
#else
#include "hardware_gpu.h"
#endif
