// The dense mask and the ranges of keys as words of bits: one word for each key, one bit for each of 64 queries.
#pragma once
#include <algorithm>

#include "sequence.h"

namespace fused_attn::cpu {
namespace {

// The word in which the bits first to last are set. No bit is set if first > last. The bounds may lie outside of 0 to
// 63.
FA_INLINE uint64_t bit_range(int64_t first, int64_t last) {
  first = first < 0 ? 0 : first;
  last = last > 63 ? 63 : last;
  if (first > last) return 0;
  return (~uint64_t{0} << first) & (~uint64_t{0} >> (63 - last));
}

// Bit k of the result is set if bytes[k * stride] is not zero, for k < count <= 64.
FA_INLINE uint64_t bits_of_bytes(const uint8_t* bytes, int64_t stride, int count) {
  if (stride == 1 && count == 64) {
#if defined(__AVX512BW__)
    const __m512i v = _mm512_loadu_si512(bytes);
    return _mm512_test_epi8_mask(v, v);
#elif defined(__AVX2__)
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), zero);
    const __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)), zero);
    const uint64_t zeros = static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
                           static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
    return ~zeros;
#else
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      uint64_t x;
      memcpy(&x, bytes + 8 * i, 8);
      // Set bit 0 of each byte if the byte is not zero, and clear its other bits. The addition sets bit 7 of a byte if
      // one of its lower bits is set. The product then moves bit 0 of all eight bytes into the top byte.
      x = ((((x & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | x) >> 7) & 0x0101010101010101ull;
      bits |= ((x * 0x0102040810204080ull) >> 56) << (8 * i);
    }
    return bits;
#endif
  }
  uint64_t bits = 0;
  for (int k = 0; k < count; ++k) bits |= static_cast<uint64_t>(bytes[k * stride] != 0) << k;
  return bits;
}

// One step of the transposition of a 64 x 64 matrix of bits: in each square of 2 kStep x 2 kStep bits, exchanges the
// upper right and the lower left quarter.
template <int kStep>
FA_INLINE void exchange_bits(uint64_t (&rows)[64], uint64_t mask) {
  for (int base = 0; base < 64; base += 2 * kStep) {
    for (int k = base; k < base + kStep; ++k) {
      const uint64_t t = ((rows[k] >> kStep) ^ rows[k + kStep]) & mask;
      rows[k] ^= t << kStep;
      rows[k + kStep] ^= t;
    }
  }
}

// Transposes a 64 x 64 matrix of bits: bit j of row i becomes bit i of row j.
FA_INLINE void transpose_bits(uint64_t (&rows)[64]) {
  exchange_bits<32>(rows, 0x00000000ffffffffull);
  exchange_bits<16>(rows, 0x0000ffff0000ffffull);
  exchange_bits<8>(rows, 0x00ff00ff00ff00ffull);
  exchange_bits<4>(rows, 0x0f0f0f0f0f0f0f0full);
  exchange_bits<2>(rows, 0x3333333333333333ull);
  exchange_bits<1>(rows, 0x5555555555555555ull);
}

// Whether a call has a dense mask or ranges of keys.
FA_INLINE bool has_score_mask(const AttentionParams& p) {
  return p.mask.data != nullptr || p.key_ranges.data != nullptr;
}

// Whether the dense mask or the ranges of keys may differ among the heads of a batch entry.
FA_INLINE bool has_score_mask_of_heads(const AttentionParams& p) {
  return (p.mask.data != nullptr && p.mask.stride_head != 0) ||
         (p.key_ranges.data != nullptr && p.key_ranges.stride_head != 0);
}

// The words of one query block: the word of key j has bit q set if the dense mask and the ranges of keys let query q of
// the block see key j. The class makes the bits of 64 keys at a time, when they are needed, so it needs no memory of
// size L x S.
class MaskWords {
 public:
  MaskWords(const AttentionParams& p, const QueryBlock& queries, int64_t seqlen_k)
      : bytes_(p.mask.data == nullptr ? nullptr : rows_of<const uint8_t>(p.mask, queries)),
        stride_row_(p.mask.stride_row),
        stride_col_(p.mask.stride_col),
        ranges_(p.key_ranges.data == nullptr ? nullptr : rows_of<const int32_t>(p.key_ranges, queries)),
        stride_ranges_(p.key_ranges.stride_row),
        num_ranges_(p.num_ranges),
        nq_(queries.count),
        seqlen_k_(seqlen_k) {}

  // Whether the call has a dense mask or ranges. With neither, no other function but narrow() must be called.
  bool present() const { return bytes_ != nullptr || ranges_ != nullptr; }

  // The words of the 64 keys around key j: 64 * (j / 64) and the following ones.
  const uint64_t* words(int64_t j) {
    if (j >> 6 != chunk_) load(j >> 6);
    return words_;
  }

  // Whether no query of the block sees any of the 64 keys around key j.
  bool hides_chunk(int64_t j) {
    words(j);
    return is_empty_;
  }

  // Whether each of the 64 keys around key j is seen by some query of the block. The answer may be false for the last
  // keys, although they are seen, if these are fewer than 64.
  bool shows_each_key(int64_t j) {
    words(j);
    return shows_each_key_;
  }

  // The first key from j on that lies in a range of the block's queries, at most `end`. Without ranges, it is j.
  int64_t next_in_ranges(int64_t j, int64_t end) const {
    if (ranges_ == nullptr) return j;
    int64_t next = end;
    for (int q = 0; q < (stride_ranges_ == 0 ? 1 : nq_); ++q) {
      const int32_t* ranges = ranges_ + q * stride_ranges_;
      for (int64_t n = 0; n < num_ranges_; ++n) {
        if (ranges[2 * n] >= ranges[2 * n + 1] || ranges[2 * n + 1] <= j) continue;
        next = std::min(next, std::max<int64_t>(ranges[2 * n], j));
      }
    }
    return next;
  }

  // Narrows the keys begin ... end - 1 to those from the first to the last one in the ranges of the block's queries. If
  // none of them lies in a range, end <= begin afterwards.
  void narrow(int64_t& begin, int64_t& end) const {
    if (ranges_ == nullptr) return;
    int64_t first = end, behind = begin;
    for (int q = 0; q < (stride_ranges_ == 0 ? 1 : nq_); ++q) {
      const int32_t* ranges = ranges_ + q * stride_ranges_;
      for (int64_t n = 0; n < num_ranges_; ++n) {
        if (ranges[2 * n] >= ranges[2 * n + 1]) continue;
        first = ranges[2 * n] < first ? ranges[2 * n] : first;
        behind = ranges[2 * n + 1] > behind ? ranges[2 * n + 1] : behind;
      }
    }
    begin = first > begin ? first : begin;
    end = behind < end ? behind : end;
  }

 private:
  // Fills words_ for the keys 64 * chunk to 64 * chunk + 63. There are three branches:
  //
  //   all queries have the same mask and ranges   each word has all bits set or none
  //   stride_row_ is 1, and there are no ranges   neighbouring queries are neighbours in memory, so the function reads
  //                                               one key at a time
  //   otherwise                                   the function reads one query at a time, and transposes the bits
  FA_NOINLINE void load(int64_t chunk) {
    chunk_ = chunk;
    const int keys = seqlen_k_ - chunk * 64 < 64 ? static_cast<int>(seqlen_k_ - chunk * 64) : 64;
    uint64_t any = 0;
    if ((bytes_ == nullptr || stride_row_ == 0) && (ranges_ == nullptr || stride_ranges_ == 0)) {
      const uint64_t row = keys_of_query(0, chunk, keys);
      any = row;
      shows_each_key_ = row == ~uint64_t{0};
      for (int k = 0; k < 64; ++k) words_[k] = -(row >> k & 1);
    } else if (stride_row_ == 1 && ranges_ == nullptr) {
      const uint8_t* bytes = bytes_ + chunk * 64 * stride_col_;
      shows_each_key_ = keys == 64;
      for (int k = 0; k < keys; ++k) {
        any |= words_[k] = bits_of_bytes(bytes + k * stride_col_, 1, nq_);
        shows_each_key_ &= words_[k] != 0;
      }
    } else {
      uint64_t all = ~uint64_t{0};
      for (int q = 0; q < nq_; ++q) {
        words_[q] = keys_of_query(q, chunk, keys);
        all &= words_[q];
        any |= words_[q];
      }
      shows_each_key_ = any == ~uint64_t{0};
      // If all bits are equal, a transposition would change nothing, and is left out. Rows that do not exist get the
      // bits `all`: zeros if all bits are zero, and ones if all bits are one.
      for (int q = nq_; q < 64; ++q) words_[q] = all;
      if (any != 0 && all != ~uint64_t{0}) transpose_bits(words_);
    }
    is_empty_ = any == 0;
  }

  // Bit k is set if query q of the block sees key 64 * chunk + k, for k < keys. Nobody reads the other bits.
  uint64_t keys_of_query(int q, int64_t chunk, int keys) const {
    uint64_t visible = ~uint64_t{0};
    if (bytes_ != nullptr)
      visible = bits_of_bytes(bytes_ + q * stride_row_ + chunk * 64 * stride_col_, stride_col_, keys);
    if (ranges_ == nullptr) return visible;
    uint64_t in_ranges = 0;
    const int32_t* ranges = ranges_ + q * stride_ranges_;
    for (int64_t n = 0; n < num_ranges_; ++n)
      in_ranges |= bit_range(ranges[2 * n] - chunk * 64, int64_t{ranges[2 * n + 1]} - 1 - chunk * 64);
    return visible & in_ranges;
  }

  const uint8_t* bytes_;
  int64_t stride_row_, stride_col_;
  const int32_t* ranges_;
  int64_t stride_ranges_, num_ranges_;
  int nq_;
  int64_t seqlen_k_;
  int64_t chunk_ = -1;  // which 64 keys words_ holds
  bool is_empty_ = false;
  bool shows_each_key_ = false;
  uint64_t words_[64];
};

}  // namespace
}  // namespace fused_attn::cpu
