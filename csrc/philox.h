// Philox4x32-10 (Salmon et al., 2011), the counter-based generator behind dropout, for host and device code.
//
// The random word of an entry depends on the seed and on its position alone, never on tile sizes, threads or backend:
//   key = (seed low, seed high), counter = (j >> 2, i, head, batch), and word j & 3 of the result decides.
#pragma once
#include <cstdint>

namespace fused_attn {
namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

}  // namespace
}  // namespace fused_attn
