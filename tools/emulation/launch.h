// Runs a kernel's blocks, a few at a time.
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

// Returns the first error, or an empty text. Adds to `statistics`.
std::string launch(const LaunchShape& shape, const Options& options, Statistics* statistics,
                   const std::function<void()>& kernel);

// For launches by kernels' host code (hardware_emulated.h): the options that the test has set last, and the statistics
// since.
Options& session_options();
Statistics& session_statistics();

}  // namespace fused_attn::emulation
