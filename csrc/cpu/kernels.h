// The table of the CPU kernels of one instruction set. cpu/dispatch.cpp chooses one of these tables at run time.
#pragma once
#include "../common/attention_params.h"

namespace fused_attn::cpu {

// The arguments of a whole self-attention module: out = attention(x . in_weight^T + in_bias) . out_weight^T + out_bias.
// All tensors are contiguous.
struct SelfAttentionParams {
  AttentionParams attention;         // only key_padding is a tensor; seqlen_k = seqlen_q = L, value_dim = head_dim = D
  int64_t features = 0;              // E
  const void* x = nullptr;           // (B, L, E)
  const void* in_weight = nullptr;   // ((H + 2 Hkv) D, E): the rows of all query heads, then those of key and of value
  const void* in_bias = nullptr;     // ((H + 2 Hkv) D,); null = none
  const void* out_weight = nullptr;  // (E, H D)
  const void* out_bias = nullptr;    // (E,); null = none
  void* out = nullptr;               // (B, L, E)
};

// The arguments of a linear layer for few rows: y = x . weight^T + bias. All tensors are contiguous.
struct LinearParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  const void* x = nullptr;       // (rows, in)
  const void* weight = nullptr;  // (out, in)
  const void* bias = nullptr;    // (out,); null = none
  void* y = nullptr;             // (rows, out)
  int32_t num_threads = 1;
};

struct Kernels {
  const char* isa;  // the name of the instruction set
  void (*forward)(const AttentionParams&);
  void (*backward)(const AttentionParams&);
  void (*self_attention)(const SelfAttentionParams&);
  void (*linear)(const LinearParams&);
};

}  // namespace fused_attn::cpu
