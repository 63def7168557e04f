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

// Returns the first error, or an empty text. `statistics` are added up.
std::string launch(const LaunchShape& shape, const Options& options, Statistics* statistics,
                   const std::function<void()>& kernel);

// Of launches by hardware_emulated.h: what the test has set last, and what has happened since.
Options& session_options();
Statistics& session_statistics();

}  // namespace fused_attn::emulation
