// How the emulation reports a fault: the first one ends the launch.
#pragma once
#include <stdexcept>
#include <string>

namespace fused_attn::emulation {

// A fault that was found outside of a kernel's threads.
struct EmulationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// printf into a std::string.
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// Within a kernel, ends the launch with a report: the block, the thread, and this text. Elsewhere, throws
// EmulationError.
[[noreturn]] void fail(const char* text, ...) __attribute__((format(printf, 1, 2)));

}  // namespace fused_attn::emulation
