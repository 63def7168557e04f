// Which instruction sets were compiled, which of them this machine can run, and which one is in use.
#include "dispatch.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_attn::cpu {

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

namespace {

// Every machine for which the library is built can run the baseline kernels.
bool runs_everywhere() { return true; }

#if defined(__x86_64__)
// Whether processor and operating system can run the AVX2 kernels. __builtin_cpu_supports also returns false if the
// operating system does not save the vector registers at a context switch.
bool runs_avx2() {
  // F16C is asked for directly, because some versions of Clang do not know "f16c" in __builtin_cpu_supports.
  constexpr unsigned kF16c = 1u << 29;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16c) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Whether processor and operating system can run the AVX-512 kernels.
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#if defined(FUSED_ATTN_HAVE_AVX512_BF16)
// Compiled only if there is an avx512_bf16 object, because a compiler that is too old for that object does not know the
// name "avx512bf16" either.
bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

// The kernels of one instruction set, with the test whether this machine can run them.
struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

// The list goes from the slowest to the fastest instruction set. CMake defines FUSED_ATTN_HAVE_<ISA> for each
// instruction set that it compiles.
const Candidate kCandidates[] = {
    {&kernels_baseline, runs_everywhere},
#if defined(FUSED_ATTN_HAVE_AVX2)
    {&kernels_avx2, runs_avx2},
#endif
#if defined(FUSED_ATTN_HAVE_AVX512)
    {&kernels_avx512, runs_avx512},
#endif
#if defined(FUSED_ATTN_HAVE_AVX512_BF16)
    {&kernels_avx512_bf16, runs_avx512_bf16},
#endif
};

// The kernels of the fastest instruction set that this machine can run.
const Kernels* best_runnable() {
  const Kernels* best = nullptr;
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) best = candidate.kernels;
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
  for (const Candidate& candidate : kCandidates) names.emplace_back(candidate.kernels->isa);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) names.emplace_back(candidate.kernels->isa);
  return names;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const std::string& isa) {
  for (const Candidate& candidate : kCandidates) {
    if (isa == candidate.kernels->isa && candidate.runs_here()) {
      selected().store(candidate.kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fused_attn::cpu
