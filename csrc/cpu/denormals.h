// Denormal numbers: those nearer to zero than 2^-126 (float) or 2^-1022 (double). Instructions that produce them are
// slow on x86 processors, so the kernels turn such results into zero.
#pragma once
#include "elements.h"
#include "sequence.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fused_attn::cpu {
namespace {

// While an object of this class exists, denormal results of its thread become zero, if `flushes`.
//
// An instruction with a denormal result takes many times as long. A sharply peaked softmax has many: probs near the
// smallest normal number, times values. For logits with a standard deviation of 32, forward took 29 times as long
// with them (AVX-512, 512 queries and keys). Denormal numbers of the caller keep their value, because only results are
// flushed. Conversions of float16 ignore the setting, and products of bfloat16 pairs (AVX512_BF16, AMX) always take
// denormal numbers for zero. ARM processors compute denormal results at full speed, so nothing happens there.
class FlushDenormalResults {
 public:
#if defined(__x86_64__)
  explicit FlushDenormalResults(bool flushes = true) : before_(_mm_getcsr()) {
    if (flushes) _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON);
  }
  ~FlushDenormalResults() { _mm_setcsr(before_); }
#else
  explicit FlushDenormalResults(bool = true) {}
  ~FlushDenormalResults() {}
#endif
  FlushDenormalResults(const FlushDenormalResults&) = delete;
  FlushDenormalResults& operator=(const FlushDenormalResults&) = delete;

#if defined(__x86_64__)
 private:
  unsigned before_;  // the control register of the thread, which belongs to torch's operators as well
#endif
};

// Whether backward can flush denormal results: some gradient of the outputs is far above them, 2^-80 or more (double:
// 2^-900). Where all are tinier, the gradients of scores, which are products of them, would lose precision. The first
// row usually decides, so the loops end soon.
template <class Lane, class Storage>
bool can_flush_gradients(const AttentionParams& p) {
#if !defined(__x86_64__)
  return true;  // nothing is flushed
#endif
  constexpr Lane kSmallest = static_cast<Lane>(sizeof(Lane) == 4 ? 0x1p-80 : 0x1p-900);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence seq = sequence_of(p, b);
    for (int64_t h = 0; h < p.num_heads; ++h) {
      for (int64_t i = 0; i < seq.seqlen_q; ++i) {
        const Storage* row = row_of<const Storage>(p.dout, b, h, seq.q_offset + i);
        Vec<Lane> largest = {};
        for (int64_t d = 0; d < p.value_dim; d += kLanes<Lane>) {
          const Vec<Lane> x = load_as<Lane>(row + d, static_cast<int>(p.value_dim - d));
          largest = max<Lane>(x, max<Lane>(-x, largest));
        }
        if (max_lanes<Lane>(largest) >= kSmallest) return true;
      }
    }
  }
  return false;
}

}  // namespace
}  // namespace fused_attn::cpu
