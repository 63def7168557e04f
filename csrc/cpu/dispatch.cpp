// Which instruction sets were compiled, which of them this machine can run, and which one is in use.
#include "dispatch.h"

#include <atomic>

#include "processor.h"

namespace fused_attn::cpu {

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;

namespace {

// The kernels of this build. CMake defines FUSED_ATTN_HAVE_<ISA> for each instruction set that it compiles.
const Kernels* const kCompiled[] = {
    &kernels_baseline,
#if defined(FUSED_ATTN_HAVE_AVX2)
    &kernels_avx2,
#endif
#if defined(FUSED_ATTN_HAVE_AVX512)
    &kernels_avx512,
#endif
#if defined(FUSED_ATTN_HAVE_AVX512_BF16)
    &kernels_avx512_bf16,
#endif
#if defined(FUSED_ATTN_HAVE_AMX)
    &kernels_amx,
#endif
};

// The instruction sets that this machine can run, from the slowest to the fastest one. A build may lack some.
const std::vector<std::string>& machine_isas() {
  static const std::vector<std::string> names = instruction_sets_of_machine();
  return names;
}

// The kernels that this machine can run, from the slowest to the fastest instruction set.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
  for (const std::string& isa : machine_isas())
    for (const Kernels* kernels : kCompiled)
      if (isa == kernels->isa) found.push_back(kernels);
  return found;
}

// The kernels in use, as a variable. It is atomic, because one thread may select others while another thread calls
// them.
std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{runnable().back()};
  return kernels;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : kCompiled) names.emplace_back(kernels->isa);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.emplace_back(kernels->isa);
  return names;
}

std::string best_isa() { return machine_isas().back(); }

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const std::string& isa) {
  for (const Kernels* kernels : runnable()) {
    if (isa == kernels->isa) {
      selected().store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fused_attn::cpu
