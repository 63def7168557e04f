// Which instruction sets were compiled, which of them this machine can run, and which one is in use.
#include "dispatch.h"

#include <atomic>

#include "processor.h"

namespace fused_attn::cpu {

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

namespace {

// The kernels of this build, from the slowest to the fastest instruction set. CMake defines FUSED_ATTN_HAVE_<ISA> for
// each instruction set that it compiles.
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
};

// Whether this machine can run an instruction set.
bool runs_here(const std::string& isa) {
  for (const InstructionSet& known : kInstructionSets)
    if (isa == known.name) return known.runs_here();
  return false;
}

// The kernels of the fastest instruction set that this machine can run.
const Kernels* best_runnable() {
  const Kernels* best = nullptr;
  for (const Kernels* kernels : kCompiled)
    if (runs_here(kernels->isa)) best = kernels;
  return best;
}

// The kernels in use, as a variable. It is atomic, because one thread may select others while another thread calls
// them.
std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{best_runnable()};
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
  for (const Kernels* kernels : kCompiled)
    if (runs_here(kernels->isa)) names.emplace_back(kernels->isa);
  return names;
}

std::string best_isa() {
  std::string best;
  for (const InstructionSet& known : kInstructionSets)
    if (known.runs_here()) best = known.name;
  return best;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const std::string& isa) {
  for (const Kernels* kernels : kCompiled) {
    if (isa == kernels->isa && runs_here(isa)) {
      selected().store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fused_attn::cpu
