// Prints the instruction sets that this machine can run, from the slowest to the fastest, as a list of CMake.
#include "../csrc/cpu/processor.h"

#include <cstdio>

int main() {
  const char* separator = "";
  for (const auto& name : fused_attn::cpu::instruction_sets_of_machine()) {
    std::printf("%s%s", separator, name.c_str());
    separator = ";";
  }
}
