// Takes the place of csrc/cuda/attention.cu in a module whose calls fail: test_errors.py.
#include <stdexcept>

#include "cuda/attention.h"

namespace fused_attn::gpu {

int64_t workspace_bytes(WorkspaceNeeds) { return 256; }

std::string unusable_reason(int device) {
  if (device == 1) throw OutOfMemory("CUDA out of memory");
  if (device == 3) throw std::runtime_error("the device is busy");
  return device == 2 ? "the driver is too old" : "";
}

bool runs_on_cpu() { return true; }

void forward(const Call& call) {
  if (call.architecture == 90) throw OutOfMemory("CUDA out of memory");
  throw std::runtime_error("invalid device function");
}

void backward(const Call& call) { forward(call); }

}  // namespace fused_attn::gpu
