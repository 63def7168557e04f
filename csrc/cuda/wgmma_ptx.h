// The instruction wgmma.mma_async for the widths N that the kernels use. The text of the instruction names each of the
// N / 2 accumulators as an operand. Macros put this text together, so a new width is one more line at the end (and
// names for its operands).
#pragma once
#include "primitives.h"

namespace fused_attn::gpu {

template <class T, int N>
struct Wgmma;  // an N that is not listed below

// WGMMA_NAMES_i: the operands %i to %(i + 7). WGMMA_OUT_8(i): the accumulators d[i] to d[i + 7] behind them.
#define WGMMA_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_NAMES_72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_NAMES_88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_NAMES_104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES_112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_NAMES_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_OUT_8(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

#define WGMMA_NAMES_OF_16 WGMMA_NAMES_0 ", " WGMMA_NAMES_8
#define WGMMA_OUT_16 WGMMA_OUT_8(0), WGMMA_OUT_8(8)
#define WGMMA_NAMES_OF_32 WGMMA_NAMES_OF_16 ", " WGMMA_NAMES_16 ", " WGMMA_NAMES_24
#define WGMMA_OUT_32 WGMMA_OUT_16, WGMMA_OUT_8(16), WGMMA_OUT_8(24)
#define WGMMA_NAMES_OF_40 WGMMA_NAMES_OF_32 ", " WGMMA_NAMES_32
#define WGMMA_OUT_40 WGMMA_OUT_32, WGMMA_OUT_8(32)
#define WGMMA_NAMES_OF_48 WGMMA_NAMES_OF_40 ", " WGMMA_NAMES_40
#define WGMMA_OUT_48 WGMMA_OUT_40, WGMMA_OUT_8(40)
#define WGMMA_NAMES_OF_64 WGMMA_NAMES_OF_48 ", " WGMMA_NAMES_48 ", " WGMMA_NAMES_56
#define WGMMA_OUT_64 WGMMA_OUT_48, WGMMA_OUT_8(48), WGMMA_OUT_8(56)
#define WGMMA_NAMES_OF_88 WGMMA_NAMES_OF_64 ", " WGMMA_NAMES_64 ", " WGMMA_NAMES_72 ", " WGMMA_NAMES_80
#define WGMMA_OUT_88 WGMMA_OUT_64, WGMMA_OUT_8(64), WGMMA_OUT_8(72), WGMMA_OUT_8(80)
#define WGMMA_NAMES_OF_96 WGMMA_NAMES_OF_88 ", " WGMMA_NAMES_88
#define WGMMA_OUT_96 WGMMA_OUT_88, WGMMA_OUT_8(88)
#define WGMMA_NAMES_OF_128 \
  WGMMA_NAMES_OF_96 ", " WGMMA_NAMES_96 ", " WGMMA_NAMES_104 ", " WGMMA_NAMES_112 ", " WGMMA_NAMES_120
#define WGMMA_OUT_128 WGMMA_OUT_96, WGMMA_OUT_8(96), WGMMA_OUT_8(104), WGMMA_OUT_8(112), WGMMA_OUT_8(120)

// WGMMA_SS is the instruction whose factors are both in shared memory. WGMMA_RS is the one whose left factor is in
// registers. A thread has R = N / 2 accumulators. In the text of the asm statement, they are the operands %0 to %(R -
// 1), and p0 to p6 are the numbers of the operands behind them: R to R + 6.
#define WGMMA_SS(TYPE, N, R, p0, p1, p2, p3, p4)                                                                       \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_OF_##R "}, %" #p0 ", %" #p1 ", accumulate, 1, 1, %" #p3       \
                                                                ", %" #p4 ";\n}"                                       \
               : WGMMA_OUT_##R                                                                                         \
               : "l"(a), "l"(b), "r"(accumulate), "n"(TransA), "n"(TransB))
#define WGMMA_RS(TYPE, N, R, p0, p1, p2, p3, p4, p5, p6)                                                               \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_OF_##R "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4   \
                                                                ", accumulate, 1, 1, %" #p6 ";\n}"                     \
               : WGMMA_OUT_##R                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TransB))
#define WGMMA_WIDTH(N, R, p0, p1, p2, p3, p4, p5, p6)                                              \
  template <class T>                                                                               \
  struct Wgmma<T, N> {                                                                             \
    template <int TransA, int TransB>                                                              \
    static GPU_DEVICE void ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {             \
      if constexpr (kIsBf16<T>) {                                                                  \
        WGMMA_SS("bf16", N, R, p0, p1, p2, p3, p4);                                                \
      } else {                                                                                     \
        WGMMA_SS("f16", N, R, p0, p1, p2, p3, p4);                                                 \
      }                                                                                            \
    }                                                                                              \
    template <int TransB>                                                                          \
    static GPU_DEVICE void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      if constexpr (kIsBf16<T>) {                                                                  \
        WGMMA_RS("bf16", N, R, p0, p1, p2, p3, p4, p5, p6);                                        \
      } else {                                                                                     \
        WGMMA_RS("f16", N, R, p0, p1, p2, p3, p4, p5, p6);                                         \
      }                                                                                            \
    }                                                                                              \
  }

WGMMA_WIDTH(32, 16, 16, 17, 18, 19, 20, 21, 22);
WGMMA_WIDTH(64, 32, 32, 33, 34, 35, 36, 37, 38);
WGMMA_WIDTH(80, 40, 40, 41, 42, 43, 44, 45, 46);
WGMMA_WIDTH(96, 48, 48, 49, 50, 51, 52, 53, 54);
WGMMA_WIDTH(128, 64, 64, 65, 66, 67, 68, 69, 70);
WGMMA_WIDTH(176, 88, 88, 89, 90, 91, 92, 93, 94);
WGMMA_WIDTH(192, 96, 96, 97, 98, 99, 100, 101, 102);
WGMMA_WIDTH(256, 128, 128, 129, 130, 131, 132, 133, 134);

template <class T, int N, int TransA, int TransB>
GPU_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T, N>::template ss<TransA, TransB>(d, a, b, accumulate);
}

template <class T, int N, int TransB>
GPU_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<T, N>::template rs<TransB>(d, a, b, accumulate);
}

}  // namespace fused_attn::gpu
