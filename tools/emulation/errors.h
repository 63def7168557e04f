// How the emulation reports what it finds: the first error ends the launch.
#pragma once
#include <stdexcept>
#include <string>

namespace fused_attn::emulation {

struct EmulationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// Within a kernel, ends the launch with a report: the block, the thread, and this text. Elsewhere, throws
// EmulationError.
[[noreturn]] void fail(const char* text, ...) __attribute__((format(printf, 1, 2)));

}  // namespace fused_attn::emulation
