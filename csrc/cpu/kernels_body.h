// Defines the kernel table of one instruction set: all CPU kernels, compiled with the flags of the file that includes
// this header. That file defines FUSED_ATTN_ISA, which becomes the suffix of the table's name.
#include "attention_module.h"
#include "backward.h"
#include "element_dropout.h"
#include "forward.h"

namespace fused_attn::cpu {

extern const Kernels kernels_avx512;

namespace {

#if defined(__AMX_BF16__)

// AMX multiplies blocks of queries, for bfloat16 and float32. All else runs the kernels of AVX-512.
void forward(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: return forward_with_policy<LanePolicy<AmxFloatPolicy>, AmxFloatPolicy>(p);
    case DType::kBFloat16: return forward_with_policy<AmxDecodePolicy, AmxPolicy>(p);
    default: return kernels_avx512.forward(p);
  }
}

void backward(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: return backward_with_policy<AmxFloatPolicy>(p);
    case DType::kBFloat16: return backward_with_policy<AmxPolicy>(p);
    default: return kernels_avx512.backward(p);
  }
}

void attention_module(const AttentionModuleParams& m) {
  m.attention.dtype == DType::kBFloat16 ? attention_module_with_policy<AmxDecodePolicy, AmxPolicy>(m)
                                        : kernels_avx512.attention_module(m);
}

void linear(const LinearParams& p) {
  p.finish.dtype == DType::kBFloat16 ? linear_with_policy<AmxDecodePolicy>(p) : kernels_avx512.linear(p);
}

// Tiles do not help with these.
void finish_rows(const FinishParams& p) { kernels_avx512.finish_rows(p); }
void dropout(const DropoutParams& p) { kernels_avx512.dropout(p); }

#elif defined(__AVX512BF16__)

// With AVX512_BF16, one instruction multiplies and adds pairs of bfloat16, so a lane holds two elements. The
// instruction set adds nothing for other dtypes, which run the kernels of AVX-512: to compile them again would take
// half a minute.
using BFloat16Policy = ElementPolicy<BFloat16, float, 2>;

void forward(const AttentionParams& p) {
  p.dtype == DType::kBFloat16 ? forward_with_policy<BFloat16Policy>(p) : kernels_avx512.forward(p);
}

void backward(const AttentionParams& p) {
  p.dtype == DType::kBFloat16 ? backward_with_policy<BFloat16Policy>(p) : kernels_avx512.backward(p);
}

void attention_module(const AttentionModuleParams& m) {
  m.attention.dtype == DType::kBFloat16 ? attention_module_with_policy<BFloat16Policy>(m)
                                        : kernels_avx512.attention_module(m);
}

void linear(const LinearParams& p) {
  p.finish.dtype == DType::kBFloat16 ? linear_with_policy<BFloat16Policy>(p) : kernels_avx512.linear(p);
}

// AVX512_BF16 would turn denormal numbers into zero.
void finish_rows(const FinishParams& p) { kernels_avx512.finish_rows(p); }
void dropout(const DropoutParams& p) { kernels_avx512.dropout(p); }

#else

// Calls `kernel` with the policy for a dtype.
template <class Kernel>
void with_policy(DType dtype, const Kernel& kernel) {
  switch (dtype) {
    case DType::kFloat32: return kernel(ElementPolicy<float, float, 1>{});
    case DType::kFloat64: return kernel(ElementPolicy<double, double, 1>{});
    case DType::kFloat16: return kernel(ElementPolicy<Float16, float, 1>{});
    case DType::kBFloat16: return kernel(ElementPolicy<BFloat16, float, 1>{});
  }
}

// The kernels of the table.
void forward(const AttentionParams& p) {
  with_policy(p.dtype, [&](auto policy) { forward_with_policy<decltype(policy)>(p); });
}

void backward(const AttentionParams& p) {
  with_policy(p.dtype, [&](auto policy) { backward_with_policy<decltype(policy)>(p); });
}

void attention_module(const AttentionModuleParams& m) {
  with_policy(m.attention.dtype, [&](auto policy) { attention_module_with_policy<decltype(policy)>(m); });
}

void linear(const LinearParams& p) {
  with_policy(p.finish.dtype, [&](auto policy) { linear_with_policy<decltype(policy)>(p); });
}

void finish_rows(const FinishParams& p) {
  with_policy(p.dtype, [&](auto policy) {
    using Policy = decltype(policy);
    finish_rows<typename Policy::Lane, typename Policy::Storage>(p);
  });
}

void dropout(const DropoutParams& p) {
  with_policy(p.dtype, [&](auto policy) {
    using Policy = decltype(policy);
    dropout_of<typename Policy::Storage, typename Policy::Lane>(p);
  });
}

#endif

#define FUSED_ATTN_JOIN_(a, b) a##b
#define FUSED_ATTN_JOIN(a, b) FUSED_ATTN_JOIN_(a, b)
#define FUSED_ATTN_TEXT_(a) #a
#define FUSED_ATTN_TEXT(a) FUSED_ATTN_TEXT_(a)

}  // namespace

extern const Kernels FUSED_ATTN_JOIN(kernels_, FUSED_ATTN_ISA);
const Kernels FUSED_ATTN_JOIN(kernels_, FUSED_ATTN_ISA) = {
    FUSED_ATTN_TEXT(FUSED_ATTN_ISA), forward, backward, attention_module, linear, finish_rows, dropout};

}  // namespace fused_attn::cpu
