// Runs the blocks of a kernel: options.resident_blocks of them side by side.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "block.h"
#include "options.h"

namespace fused_attn::emulation {

struct LaunchShape {
  Index grid;
  int threads;
  uint32_t shared_bytes;
};

// Runs a kernel, and returns the first fault, or an empty text. `kernel` is called once in each thread. Adds to
// `statistics`.
std::string launch(const LaunchShape& shape, const Options& options, Statistics* statistics,
                   const std::function<void()>& kernel);

// For launches by the product's host code (hardware_emulated.h), which knows nothing of options: those that the test
// has set last, and the statistics since then.
Options& session_options();
Statistics& session_statistics();

}  // namespace fused_attn::emulation
