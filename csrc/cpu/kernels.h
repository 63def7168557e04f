// The CPU kernels of one instruction set, as a table that cpu/dispatch.cpp chooses from at run time.
#pragma once
#include "../attention_params.h"

namespace fused_attn::cpu {

struct Kernels {
  const char* isa;
  void (*forward)(const AttentionParams&);
  void (*backward)(const AttentionParams&);
};

}  // namespace fused_attn::cpu
