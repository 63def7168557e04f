// The dense mask as words of bits: one word for each key, one bit for each of 64 queries.
#pragma once
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

// The words of one query block: word(j) has bit q set if the dense mask lets query q of the block see key j. The class
// converts the bytes of the mask for 64 keys at a time, when they are needed, so it needs no memory of size L x S.
class MaskWords {
 public:
  MaskWords(const TensorView& view, int64_t b, int64_t h, int64_t q_begin, int nq, int64_t seqlen_k)
      : bytes_(view.data == nullptr ? nullptr : row_of<const uint8_t>(view, b, h, q_begin)),
        stride_row_(view.stride_row),
        stride_col_(view.stride_col),
        nq_(nq),
        seqlen_k_(seqlen_k) {}

  // Whether the call has a dense mask. Without one, word() must not be called.
  bool present() const { return bytes_ != nullptr; }

  uint64_t word(int64_t j) {
    if (j >> 6 != chunk_) load(j >> 6);
    return words_[j & 63];
  }

 private:
  // Fills words_ for the keys 64 * chunk to 64 * chunk + 63. There are three branches:
  //
  //   stride_row_ is 0   the mask is the same for all queries, so each word has all bits set or none
  //   stride_row_ is 1   neighbouring queries are neighbours in memory, so the function reads one key at a time
  //   otherwise          the function reads one query at a time, and transposes the bits
  FA_NOINLINE void load(int64_t chunk) {
    chunk_ = chunk;
    const uint8_t* bytes = bytes_ + chunk * 64 * stride_col_;
    const int keys = seqlen_k_ - chunk * 64 < 64 ? static_cast<int>(seqlen_k_ - chunk * 64) : 64;
    if (stride_row_ == 0) {
      const uint64_t row = bits_of_bytes(bytes, stride_col_, keys);
      for (int k = 0; k < 64; ++k) words_[k] = -(row >> k & 1);
    } else if (stride_row_ == 1) {
      for (int k = 0; k < keys; ++k) words_[k] = bits_of_bytes(bytes + k * stride_col_, 1, nq_);
    } else {
      uint64_t all = ~uint64_t{0}, any = 0;
      for (int q = 0; q < nq_; ++q) {
        words_[q] = bits_of_bytes(bytes + q * stride_row_, stride_col_, keys);
        all &= words_[q];
        any |= words_[q];
      }
      // If all bits are equal, a transposition would change nothing, and is left out. Rows that do not exist get the
      // bits `all`: zeros if all bits are zero, and ones if all bits are one.
      for (int q = nq_; q < 64; ++q) words_[q] = all;
      if (any != 0 && all != ~uint64_t{0}) transpose_bits(words_);
    }
  }

  const uint8_t* bytes_;
  int64_t stride_row_, stride_col_;
  int nq_;
  int64_t seqlen_k_;
  int64_t chunk_ = -1;  // which 64 keys words_ holds
  uint64_t words_[64];
};

}  // namespace
}  // namespace fused_attn::cpu
