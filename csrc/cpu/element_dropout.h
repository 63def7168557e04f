// Dropout of the elements of any tensor, as layers apply it to the output of a block, and of attention weights.
#pragma once
#include "elements.h"
#include "kernels.h"
#include "parallel.h"
#include "random_words.h"

namespace fused_attn::cpu {
namespace {

// The elements of a chunk. A pair of elements, e / 2 = r, of chunk c belongs to word r / 64 of the counter
// (c, r % 64, 0, 0), because philox_rows makes words in this order. The even element has the low half of the word.
constexpr int64_t kDropoutChunk = 2 * 4 * kBlockQ;
constexpr int64_t kChunksOfItem = 32;

constexpr double kFlopsOfElement = 8;  // the instructions of Philox count as flops

// All bits of a lane are set if the random number of its element is at least the threshold, and otherwise none. The
// halves of words lie in memory in the order of the elements. `element`: the first one, counted within the chunk
template <class Lane>
FA_INLINE IntVec<Lane> survivors(const uint32_t (&words)[4][kBlockQ], int64_t element, uint32_t threshold) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes<Lane> * sizeof(uint16_t))));
  Halves halves;
  memcpy(&halves, reinterpret_cast<const char*>(words) + element * sizeof(uint16_t), sizeof(halves));
  return __builtin_convertvector(halves, IntVec<Lane>) >= static_cast<LaneInt<Lane>>(threshold);
}

// Multiplies each element by `scale` if it survives, and otherwise by 0. So infinity and NaN are not hidden.
template <class Storage, class Lane>
void drop_elements(const DropoutParams& p) {
  const auto* const x = static_cast<const Storage*>(p.x);
  auto* const out = static_cast<Storage*>(p.out);
  const Vec<Lane> scale = broadcast<Lane>(static_cast<Lane>(p.scale));
  const int64_t chunks = (p.elements + kDropoutChunk - 1) / kDropoutChunk;
  const int64_t items = (chunks + kChunksOfItem - 1) / kChunksOfItem;
  const double flops = kFlopsOfElement * static_cast<double>(p.elements);
  parallel_for(choose_threads(p.num_threads, items, flops), items, [&](int64_t item, int) {
    const int64_t end = chunks < (item + 1) * kChunksOfItem ? chunks : (item + 1) * kChunksOfItem;
    for (int64_t chunk = item * kChunksOfItem; chunk < end; ++chunk) {
      uint32_t words[4][kBlockQ];
      philox_rows(p.seed, 0, 0, 0, static_cast<uint32_t>(chunk), kBlockQ, words);
      const int64_t first = chunk * kDropoutChunk;
      const int64_t count = p.elements - first < kDropoutChunk ? p.elements - first : kDropoutChunk;
      for (int64_t e = 0; e < count; e += kLanes<Lane>) {
        const int n = count - e < kLanes<Lane> ? static_cast<int>(count - e) : kLanes<Lane>;
        const Vec<Lane> zero = {}, input = load_as<Lane>(x + first + e, n);
        const Vec<Lane> factor = select_or_zero<Lane>(survivors<Lane>(words, e, p.threshold), scale);
        store_as<Lane>(out + first + e, (p.relu ? select<Lane>(input < zero, zero, input) : input) * factor, n);
      }
    }
  });
}

// The same for attention weights (B, H, L, S), of which those survive that the attention kernels keep.
template <class Storage, class Lane>
void drop_weights(const DropoutParams& p) {
  constexpr int64_t kColumns = 64;  // one bit of a word for each
  const Vec<Lane> scale = broadcast<Lane>(static_cast<Lane>(p.scale));
  const uint32_t threshold = p.threshold << 16;
  const int64_t row_blocks = (p.seqlen_q + kBlockQ - 1) / kBlockQ;
  const int64_t items = p.elements == 0 ? 0 : p.elements / (p.seqlen_q * p.seqlen_k) * row_blocks;
  const double flops = kFlopsOfElement * static_cast<double>(p.elements);
  parallel_for(choose_threads(p.num_threads, items, flops), items, [&](int64_t item, int) {
    const int64_t head_slice = item / row_blocks, first_row = item % row_blocks * kBlockQ;
    const int count = static_cast<int>(p.seqlen_q - first_row < kBlockQ ? p.seqlen_q - first_row : kBlockQ);
    for (int64_t first = 0; first < p.seqlen_k; first += kColumns) {
      const int64_t columns = p.seqlen_k - first < kColumns ? p.seqlen_k - first : kColumns;
      uint64_t survivor_bits[kBlockQ] = {};  // bit i of a row belongs to column first + i
      for (int64_t column = 0; column < columns; column += kPhiloxKeys) {
        uint32_t words[4][kBlockQ];
        philox_rows(p.seed, static_cast<uint32_t>(head_slice / p.num_heads),
                    static_cast<uint32_t>(head_slice % p.num_heads), static_cast<uint32_t>(first_row),
                    static_cast<uint32_t>((first + column) / kPhiloxKeys), count, words);
        for (int q = 0; q < kBlockQ; ++q) {
          uint32_t bits = 0;
          FA_UNROLL
          for (int i = 0; i < 4; ++i) {
            bits |= static_cast<uint32_t>(words[i][q] << 16 >= threshold) << (2 * i);
            bits |= static_cast<uint32_t>(words[i][q] >= threshold) << (2 * i + 1);
          }
          survivor_bits[q] |= static_cast<uint64_t>(bits) << column;
        }
      }
      for (int q = 0; q < count; ++q) {
        const int64_t offset = (head_slice * p.seqlen_q + first_row + q) * p.seqlen_k + first;
        const auto* const x = static_cast<const Storage*>(p.x) + offset;
        auto* const out = static_cast<Storage*>(p.out) + offset;
        for (int e = 0; e < columns; e += kLanes<Lane>) {
          const int n = columns - e < kLanes<Lane> ? static_cast<int>(columns) - e : kLanes<Lane>;
          const Vec<Lane> factor = select_or_zero<Lane>(lanes_of_bits<Lane>(survivor_bits[q], e), scale);
          store_as<Lane>(out + e, load_as<Lane>(x + e, n) * factor, n);
        }
      }
    }
  });
}

// The gradient of relu and dropout: multiplies each element by `scale` where the result is positive or NaN, and
// otherwise by 0.
template <class Storage, class Lane>
void undrop_elements(const DropoutParams& p) {
  const auto* const x = static_cast<const Storage*>(p.x);
  const auto* const result = static_cast<const Storage*>(p.result);
  auto* const out = static_cast<Storage*>(p.out);
  const Vec<Lane> scale = broadcast<Lane>(static_cast<Lane>(p.scale));
  constexpr int64_t kItem = kChunksOfItem * kDropoutChunk;
  const int64_t items = (p.elements + kItem - 1) / kItem;
  const double flops = 2 * static_cast<double>(p.elements);
  parallel_for(choose_threads(p.num_threads, items, flops), items, [&](int64_t item, int) {
    const int64_t end = p.elements < (item + 1) * kItem ? p.elements : (item + 1) * kItem;
    for (int64_t e = item * kItem; e < end; e += kLanes<Lane>) {
      const int n = end - e < kLanes<Lane> ? static_cast<int>(end - e) : kLanes<Lane>;
      const Vec<Lane> zero = {}, y = load_as<Lane>(result + e, n);
      store_as<Lane>(out + e, select<Lane>(y <= zero, zero, load_as<Lane>(x + e, n) * scale), n);
    }
  });
}

// Runs the kernel of DropoutParams.
template <class Storage, class Lane>
void dropout_of(const DropoutParams& p) {
  if (p.num_heads != 0) return drop_weights<Storage, Lane>(p);
  p.result == nullptr ? drop_elements<Storage, Lane>(p) : undrop_elements<Storage, Lane>(p);
}

}  // namespace
}  // namespace fused_attn::cpu
