// Prints the instruction sets that this machine can run, from the slowest to the fastest, as a list of CMake.
#include "../csrc/cpu/processor.h"

#include <cstdio>

int main() {
  const char* separator = "";
  for (const auto& isa : fused_attn::cpu::kInstructionSets) {
    if (!isa.runs_here()) continue;
    std::printf("%s%s", separator, isa.name);
    separator = ";";
  }
}
