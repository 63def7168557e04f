// Chooses, at run time, among the instruction sets that the CPU kernels were compiled for.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fused_attn::cpu {

std::vector<std::string> compiled_isas();  // smallest first
std::vector<std::string> runnable_isas();  // those of them that this machine can execute, best last

// The kernels in use: the best runnable ones, unless select_isa chose others.
const Kernels& kernels();

// Returns false if this machine cannot run `isa`. The choice then stays as it was.
bool select_isa(const std::string& isa);

}  // namespace fused_attn::cpu
