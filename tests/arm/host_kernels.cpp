// The part that this process runs: kernels that hand the address of their arguments to the emulation (arm.py). Linked
// with the product's bindings, they become a module `_C` whose kernels run on an emulated ARM processor.
#include "cpu/kernels.h"

namespace fused_attn::cpu {
namespace {

using Emulate = void (*)(const char* function, const void* params);

Emulate emulate;

void forward(const AttentionParams& params) { emulate("forward", &params); }
void backward(const AttentionParams& params) { emulate("backward", &params); }
void attention_module(const AttentionModuleParams& params) { emulate("attention_module", &params); }
void linear(const LinearParams& params) { emulate("linear", &params); }
void finish_rows(const FinishParams& params) { emulate("finish_rows", &params); }
void dropout(const DropoutParams& params) { emulate("dropout", &params); }

}  // namespace

extern const Kernels kernels_baseline;
const Kernels kernels_baseline = {"baseline", forward, backward, attention_module, linear, finish_rows, dropout};

}  // namespace fused_attn::cpu

// arm.py calls this function before any kernel runs.
extern "C" __attribute__((visibility("default"))) void set_emulation(fused_attn::cpu::Emulate function) {
  fused_attn::cpu::emulate = function;
}
