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

// Returns what is wrong with the limit of shared memory that a launch of `kernel` sets, or an empty text. The limit has
// to be the same for all launches of a kernel, because two threads of the host may set it and launch at the same time.
std::string check_shared_limit(const void* kernel, int shared_bytes, int most_shared_bytes);

// Runs a kernel, and returns the first fault, or an empty text. `kernel` is called once in each thread. Adds to
// `statistics`.
std::string launch(const LaunchShape& shape, const Options& options, Statistics* statistics,
                   const std::function<void()>& kernel);

// The product's host code (hardware_emulated.h) launches kernels without options. Its launches use the options that the
// test has set last (session_options), and add to the statistics since then (session_statistics).
Options& session_options();
Statistics& session_statistics();

}  // namespace fused_attn::emulation
