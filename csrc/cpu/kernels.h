// The table of the CPU kernels of one instruction set. cpu/dispatch.cpp chooses one of these tables at run time.
#pragma once
#include "../common/attention_params.h"

namespace fused_attn::cpu {

// A layer norm over the features. Both tensors have the dtype of the call.
struct LayerNormParams {
  const void* weight = nullptr;  // (E,)
  const void* bias = nullptr;    // (E,); null = none
  double eps = 0;                // is added to the variance
};

// What stands around an attention module in a layer of a Transformer:
//
//   kNone       nothing: out = module(x)
//   kNormFirst  out = x + module(norm(x))
//   kNormLast   out = norm(x + module(x))
enum class Residual { kNone, kNormFirst, kNormLast };

// Where the keys and values of an attention module come from:
//
//   kProjected  they are projections of x
//   kAppended   they are those of a cache. The projection of x is appended to them first.
//   kGiven      they are those of a cache. x is projected to queries only.
enum class ModuleKeys { kProjected, kAppended, kGiven };

// The arguments of a whole attention module: out = attention(x . in_weight^T + in_bias) . out_weight^T + out_bias. All
// tensors but those of a cache are contiguous. value_dim = head_dim = D.
struct AttentionModuleParams {
  // With kProjected, only key_padding is a tensor, and seqlen_k = seqlen_q = L. Otherwise key and value are those of
  // the cache, and L is 1. With kAppended, key_lengths counts the new row already.
  AttentionParams attention;
  ModuleKeys keys = ModuleKeys::kProjected;
  Residual residual = Residual::kNone;
  LayerNormParams norm;
  int64_t features = 0;     // E
  const void* x = nullptr;  // (B, L, E)
  // ((H + 2 Hkv) D, E): the rows of all query heads, then those of key and of value, which kGiven does not need
  const void* in_weight = nullptr;
  const void* in_bias = nullptr;     // ((H + 2 Hkv) D,); null = none
  const void* out_weight = nullptr;  // (E, H D)
  const void* out_bias = nullptr;    // (E,); null = none
  void* out = nullptr;               // (B, L, E)
};

// The arguments of what follows the product x of a linear layer: out = norm(residual + relu(x + bias)), without what is
// not given. All tensors are contiguous. out may be x.
struct FinishParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t features = 0;
  const void* x = nullptr;     // (rows, features)
  const void* bias = nullptr;  // (features,); null = none
  bool relu = false;
  const void* residual = nullptr;  // (rows, features); null = none
  LayerNormParams norm;            // without a weight, there is no norm
  void* out = nullptr;             // (rows, features)
  int32_t num_threads = 1;
};

// The arguments of a linear layer for few rows: out = norm(residual + relu(x . weight^T + bias)), without what is not
// given. All tensors are contiguous.
struct LinearParams {
  FinishParams finish;  // all but x, since the product is written to out
  int64_t in = 0;
  const void* x = nullptr;       // (rows, in)
  const void* weight = nullptr;  // (features, in)
};

// The arguments of dropout: out = x * scale where the random number of an element is at least the threshold, and x * 0
// elsewhere. All tensors are contiguous. x and out may be the same one. The numbers are those of elements in a line, as
// in element_dropout.h, or those of attention weights, as in philox.h.
struct DropoutParams {
  DType dtype = DType::kFloat32;
  int64_t elements = 0;
  const void* x = nullptr;
  void* out = nullptr;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  double scale = 1;
  // The sizes of attention weights (.., num_heads, seqlen_q, seqlen_k); num_heads = 0 = elements in a line
  int64_t num_heads = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  bool relu = false;  // max(x, 0) takes the place of x; not with attention weights
  // The result of a relu and dropout. If it is given, out is the gradient of its input, and x that of the result: x *
  // scale where the result is positive or NaN, and 0 elsewhere. So no random number is needed.
  const void* result = nullptr;
  int32_t num_threads = 1;
};

struct Kernels {
  const char* isa;  // the name of the instruction set
  void (*forward)(const AttentionParams&);
  void (*backward)(const AttentionParams&);
  void (*attention_module)(const AttentionModuleParams&);
  void (*linear)(const LinearParams&);
  void (*finish_rows)(const FinishParams&);
  void (*dropout)(const DropoutParams&);
};

}  // namespace fused_attn::cpu
