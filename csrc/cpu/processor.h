// Which instruction sets the processor and the operating system of this machine can run. dispatch.cpp asks at run time.
// cmake/print_isas.cpp asks when the library is built, so both agree.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_attn::cpu {

// Every machine for which the library is built can run the baseline kernels.
inline bool runs_everywhere() { return true; }

#if defined(__x86_64__)
// Whether the AVX2 kernels can run. __builtin_cpu_supports also returns false if the operating system does not save the
// vector registers at a context switch.
inline bool runs_avx2() {
  // F16C is asked for directly, because some versions of Clang do not know "f16c" in __builtin_cpu_supports. The
  // processor is asked once, because in a virtual machine its answer takes microseconds.
  static const bool has_f16c = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & 1u << 29) != 0;
  }();
  return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Whether the AVX-512 kernels can run.
inline bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#if defined(FUSED_ATTN_COMPILES_AVX512_BF16)
// A compiler that is too old for the avx512_bf16 kernels does not know the name "avx512bf16" either.
inline bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(FUSED_ATTN_COMPILES_AMX)
// Whether the AMX kernels can run. A process has to ask Linux for the tile registers before it uses them. Linux refuses
// if it does not save them at a context switch. All threads may use them then.
inline bool runs_amx() {
#if defined(__linux__)
  static const bool has_tiles = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool has_bf16 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & 1u << 22) != 0;
    return has_bf16 && (edx & 1u << 24) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has_tiles && runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}
#endif
#endif

// Whether the avx512_bf16 kernels are slower than the avx512 kernels, which convert bfloat16 to float. On Intel's
// processors, the instruction that multiplies pairs of bfloat16 starts every second cycle, and two multiply-adds of
// float start in each cycle. On an Emerald Rapids Xeon, bfloat16 calls with 128 to 1024 rows took 1.2 to 1.7 times as
// long with avx512_bf16 as with avx512.
inline bool has_slow_avx512_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

// An instruction set, with the test whether this machine can run it.
struct InstructionSet {
  const char* name;
  bool (*runs_here)();
};

// The instruction sets that the compiler knows, each after those that it includes. CMake defines
// FUSED_ATTN_COMPILES_<ISA> for each of them.
constexpr InstructionSet kInstructionSets[] = {
    {"baseline", runs_everywhere},
#if defined(FUSED_ATTN_COMPILES_AVX2)
    {"avx2", runs_avx2},
#endif
#if defined(FUSED_ATTN_COMPILES_AVX512)
    {"avx512", runs_avx512},
#endif
#if defined(FUSED_ATTN_COMPILES_AVX512_BF16)
    {"avx512_bf16", runs_avx512_bf16},
#endif
#if defined(FUSED_ATTN_COMPILES_AMX)
    {"amx", runs_amx},
#endif
};

// The names of the instruction sets that this machine can run, from the slowest to the fastest one.
inline std::vector<std::string> instruction_sets_of_machine() {
  std::vector<std::string> names;
  for (const InstructionSet& known : kInstructionSets)
    if (known.runs_here()) names.emplace_back(known.name);
  const auto bf16 = std::find(names.begin(), names.end(), "avx512_bf16");
  if (bf16 != names.end() && has_slow_avx512_bf16()) std::iter_swap(bf16, bf16 - 1);
  return names;
}

}  // namespace fused_attn::cpu
