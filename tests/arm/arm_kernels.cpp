// The part that the emulated ARM processor runs: the CPU kernels, as functions whose argument is an address. Nothing
// starts the program or calls the operating system: arm.py sets the registers and lets the processor run from the first
// instruction of a function to `finished`.
#include <stdlib.h>

#include "cpu/kernels.h"

namespace fused_attn::cpu {
extern const Kernels kernels_baseline;
}

namespace {

constexpr size_t kHeapBytes = size_t{256} << 20;
constexpr size_t kAlignment = 64;

alignas(kAlignment) char heap[kHeapBytes];
size_t heap_used;  // 0 at the start of each call: a kernel keeps no memory

}  // namespace

void* operator new(size_t bytes) { return malloc(bytes); }
void* operator new[](size_t bytes) { return malloc(bytes); }
void operator delete(void*, size_t) noexcept {}
void operator delete[](void*) noexcept {}

extern "C" {

// Memory is filled with 0xff, which is NaN as a float, so that a read of uninitialised memory spoils a result.
void* malloc(size_t bytes) {
  const size_t begin = (heap_used + kAlignment - 1) / kAlignment * kAlignment;
  if (bytes > kHeapBytes - begin) return nullptr;
  heap_used = begin + bytes;
  for (size_t i = begin; i < heap_used; ++i) heap[i] = static_cast<char>(0xff);
  return heap + begin;
}

void free(void*) {}

int madvise(void*, size_t, int) { return 0; }

// What the C++ library would have for exceptions. zig compiles that library on each new machine, for two minutes, and no
// exception can leave the emulated program. So these names are one invalid instruction, which stops the emulation.
asm(R"(
  .globl _Unwind_Resume, __gxx_personality_v0, __cxa_allocate_exception, __cxa_free_exception, __cxa_throw
  .globl _ZNSt11logic_errorC2EPKc, _ZNSt12length_errorD1Ev, _ZTISt12length_error, _ZTVSt12length_error
  .globl _ZNSt9bad_allocC1Ev, _ZNSt9bad_allocD1Ev, _ZTISt9bad_alloc
_Unwind_Resume: __gxx_personality_v0: __cxa_allocate_exception: __cxa_free_exception: __cxa_throw:
_ZNSt11logic_errorC2EPKc: _ZNSt12length_errorD1Ev: _ZTISt12length_error: _ZTVSt12length_error:
_ZNSt9bad_allocC1Ev: _ZNSt9bad_allocD1Ev: _ZTISt9bad_alloc:
  udf #0
)");

void forward(const fused_attn::AttentionParams* params) {
  heap_used = 0;
  fused_attn::cpu::kernels_baseline.forward(*params);
}

void backward(const fused_attn::AttentionParams* params) {
  heap_used = 0;
  fused_attn::cpu::kernels_baseline.backward(*params);
}

void attention_module(const fused_attn::cpu::AttentionModuleParams* params) {
  heap_used = 0;
  fused_attn::cpu::kernels_baseline.attention_module(*params);
}

void linear(const fused_attn::cpu::LinearParams* params) {
  heap_used = 0;
  fused_attn::cpu::kernels_baseline.linear(*params);
}

void finish_rows(const fused_attn::cpu::FinishParams* params) {
  heap_used = 0;
  fused_attn::cpu::kernels_baseline.finish_rows(*params);
}

void dropout(const fused_attn::cpu::DropoutParams* params) {
  heap_used = 0;
  fused_attn::cpu::kernels_baseline.dropout(*params);
}

// Where a function returns to.
void finished() {
  for (;;) {
  }
}
}
