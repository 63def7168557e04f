// Chooses at run time which compiled copy of the CPU kernels runs. There is one copy for each instruction set.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fused_attn::cpu {

std::vector<std::string> compiled_isas();  // the instruction sets of this build
std::vector<std::string> runnable_isas();  // those of them that this machine can run, from the slowest to the fastest

// The fastest instruction set that this machine can run and the compiler knows. A build may lack it.
std::string best_isa();

// The kernels in use: those of the fastest runnable instruction set, unless select_isa chose another one.
const Kernels& kernels();

// Makes kernels() return those of `isa`. Returns false, and changes nothing, if this machine cannot run them.
bool select_isa(const std::string& isa);

}  // namespace fused_attn::cpu
