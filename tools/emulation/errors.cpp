#include "errors.h"

#include <cstdarg>
#include <cstdio>

#include "block.h"

namespace fused_attn::emulation {
namespace {

std::string format_list(const char* text, va_list arguments) {
  char buffer[2048];
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  return buffer;
}

}  // namespace

std::string format(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  std::string result = format_list(text, arguments);
  va_end(arguments);
  return result;
}

void fail(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  const std::string message = format_list(text, arguments);
  va_end(arguments);
  if (running_blocks().empty() || block().current == nullptr) throw EmulationError(message);
  const Block& b = block();
  const Thread& thread = *b.current;
  block().scheduler.stop(format("[block %d, %d, %d; thread %d, warp %d, lane %d] ", b.index.x, b.index.y, b.index.z,
                                thread.index, thread.warp, thread.lane) +
                         message);
}

}  // namespace fused_attn::emulation
