// What the host code of the CUDA kernels throws besides the exceptions of the standard library.
#pragma once
#include <stdexcept>

namespace fused_attn::gpu {

// The GPU has not enough memory to create a context, or to load or launch a kernel. The Python module turns this into
// torch.OutOfMemoryError, which training loops catch in order to go on with a smaller batch.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An error that stays for as long as the process runs: the driver, the GPU or this binary would have to be another one.
struct LastingError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fused_attn::gpu
