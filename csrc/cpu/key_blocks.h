// Which keys a block of queries sees: a stream of blocks of valid keys, each key with a bit per query.
#pragma once
#include "../common/attention_params.h"
#include "../common/band.h"
#include "memory.h"
#include "tiles.h"

namespace fused_attn::cpu {
namespace {

// Where sequence b lies: everything below counts positions from these offsets.
struct Sequence {
  int64_t q_offset;
  int64_t k_offset;
  int64_t seqlen_q;
  int64_t seqlen_k;
};

FA_INLINE Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s = {0, 0, p.seqlen_q, p.seqlen_k};
  if (p.cu_seqlens_q != nullptr) {
    s.q_offset = p.cu_seqlens_q[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.q_offset;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_offset = p.cu_seqlens_k[b];
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.k_offset;
  }
  return s;
}

// The element of a view at (b, h, row).
template <class T>
FA_INLINE T* row_of(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(view.data) + (b * view.stride_batch + h * view.stride_head + row * view.stride_row);
}

// Up to kBlockK valid keys in ascending order. Behind them lie kTileKeys copies of the last key that no query sees, so that
// the last tile is computed whole.
struct KeyBlock {
  int count;
  bool contiguous;  // index[k] == index[0] + k
  bool partial;     // some key is hidden from some query
  int32_t index[kBlockK + kTileKeys];
  uint64_t word[kBlockK + kTileKeys];  // bit q: query q of the block sees the key
};

// The keys that key padding leaves, made once per call and shared by the heads.
struct ValidKeys {
  const int32_t* index = nullptr;  // ascending; null = all
  int64_t count = 0;
};

FA_INLINE int64_t valid_keys_bytes(const AttentionParams& p) {
  if (p.key_padding.data == nullptr) return 0;
  return p.batch * static_cast<int64_t>(sizeof(ValidKeys)) + kCacheLine +
         p.batch * p.seqlen_k * static_cast<int64_t>(sizeof(int32_t));
}

// Returns one ValidKeys per batch entry in `memory`, or null without key padding.
inline const ValidKeys* make_valid_keys(const AttentionParams& p, char* memory) {
  if (p.key_padding.data == nullptr) return nullptr;
  Arena arena(memory);
  ValidKeys* valid_keys = arena.take<ValidKeys>(p.batch);
  int32_t* index = arena.take<int32_t>(p.batch * p.seqlen_k);
  for (int64_t b = 0; b < p.batch; ++b, index += p.seqlen_k) {
    const int64_t length = sequence_of(p, b).seqlen_k;
    const uint8_t* is_padding = row_of<const uint8_t>(p.key_padding, b, 0, 0);
    int64_t count = 0;
    for (int64_t j = 0; j < length; ++j) {
      index[count] = static_cast<int32_t>(j);
      count += is_padding[j * p.key_padding.stride_col] == 0;
    }
    valid_keys[b].index = index;
    valid_keys[b].count = count;
  }
  return valid_keys;
}

// Bits [first, last] of a word; empty when first > last.
FA_INLINE uint64_t bit_range(int64_t first, int64_t last) {
  first = first < 0 ? 0 : first;
  last = last > 63 ? 63 : last;
  if (first > last) return 0;
  return (~uint64_t{0} << first) & (~uint64_t{0} >> (63 - last));
}

// Bit k of the result: byte bytes[k * stride] is not zero, for k < count <= 64.
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
      x = ((((x & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | x) >> 7) & 0x0101010101010101ull;
      bits |= ((x * 0x0102040810204080ull) >> 56) << (8 * i);  // gathers the eight low bits (little endian)
    }
    return bits;
#endif
  }
  uint64_t bits = 0;
  for (int k = 0; k < count; ++k) bits |= static_cast<uint64_t>(bytes[k * stride] != 0) << k;
  return bits;
}

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

// Bit j of row i becomes bit i of row j.
FA_INLINE void transpose_bits(uint64_t (&rows)[64]) {
  exchange_bits<32>(rows, 0x00000000ffffffffull);
  exchange_bits<16>(rows, 0x0000ffff0000ffffull);
  exchange_bits<8>(rows, 0x00ff00ff00ff00ffull);
  exchange_bits<4>(rows, 0x0f0f0f0f0f0f0f0full);
  exchange_bits<2>(rows, 0x3333333333333333ull);
  exchange_bits<1>(rows, 0x5555555555555555ull);
}

// The words of 64 neighbouring keys from the dense byte mask: made on the fly, so nothing of size L x S is ever stored.
class MaskWords {
 public:
  MaskWords(const TensorView& view, int64_t b, int64_t h, int64_t q_begin, int nq, int64_t seqlen_k)
      : bytes_(view.data == nullptr ? nullptr : row_of<const uint8_t>(view, b, h, q_begin)),
        stride_row_(view.stride_row),
        stride_col_(view.stride_col),
        nq_(nq),
        seqlen_k_(seqlen_k) {}

  bool present() const { return bytes_ != nullptr; }

  uint64_t word(int64_t j) {
    if (j >> 6 != chunk_) load(j >> 6);
    return words_[j & 63];
  }

 private:
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
      for (int q = nq_; q < 64; ++q) words_[q] = all;  // a row that does not exist must not spoil the two short cuts
      if (any != 0 && all != ~uint64_t{0}) transpose_bits(words_);
    }
  }

  const uint8_t* bytes_;
  int64_t stride_row_, stride_col_;
  int nq_;
  int64_t seqlen_k_;
  int64_t chunk_ = -1;
  uint64_t words_[64];
};

// Yields the valid keys of [key_begin, key_end) for queries [q_begin, q_begin + nq) of one head.
class KeyStream {
 public:
  KeyStream(const AttentionParams& p, const Sequence& seq, const ValidKeys* valid_keys, int64_t b, int64_t h,
            int64_t q_begin, int nq, int64_t key_begin, int64_t key_end)
      : band_{p.window_left, p.window_right, p.diagonal_offset},
        mask_(p.mask, b, h, q_begin, nq, seq.seqlen_k),
        q_begin_(q_begin),
        q_last_(q_begin + nq - 1),
        valid_queries_(bit_range(0, nq - 1)) {
    const int64_t first = band_.first_key(q_begin_);
    const int64_t last = band_.last_key(q_last_);
    next_ = first > key_begin ? first : key_begin;
    end_ = last < key_end - 1 ? last + 1 : key_end;
    if (p.window_left + p.window_right < 0) end_ = key_begin;  // otherwise some query sees each key of [next_, end_)
    if (valid_keys != nullptr) {
      valid_keys_ = valid_keys[b];
      // From here on next_ counts entries of the list: find the first at or behind it.
      int64_t low = 0, high = valid_keys_.count;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (valid_keys_.index[middle] < next_) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      next_ = low;
    }
  }

  // The bits of the queries that exist.
  uint64_t valid_queries() const { return valid_queries_; }

  // False when no key is left.
  bool next(KeyBlock& block) {
    int count = 0;
    uint64_t common = valid_queries_;
    if (valid_keys_.index == nullptr && !mask_.present()) {
      count = next_ < end_ ? static_cast<int>(end_ - next_ < kBlockK ? end_ - next_ : kBlockK) : 0;
      const bool full = band_.all_visible(q_begin_, q_last_, next_, next_ + count - 1);
      for (int k = 0; k < count; ++k) {
        block.index[k] = static_cast<int32_t>(next_ + k);
        block.word[k] = full ? valid_queries_ : visible_bits(next_ + k);
        common &= block.word[k];
      }
      next_ += count;
    } else {
      while (count < kBlockK) {
        int64_t j = next_;
        if (valid_keys_.index != nullptr) {
          if (next_ >= valid_keys_.count) break;
          j = valid_keys_.index[next_];
        }
        if (j >= end_) break;
        ++next_;
        uint64_t word = visible_bits(j);
        if (mask_.present() && word != 0) word &= mask_.word(j);
        if (word == 0) continue;
        block.index[count] = static_cast<int32_t>(j);
        block.word[count] = word;
        common &= word;
        ++count;
      }
    }
    if (count == 0) return false;
    block.count = count;
    block.partial = common != valid_queries_;
    block.contiguous = block.index[count - 1] - block.index[0] == count - 1;
    for (int k = count; k < count + kTileKeys; ++k) {
      block.index[k] = block.index[count - 1];
      block.word[k] = 0;
    }
    return true;
  }

 private:
  uint64_t visible_bits(int64_t j) const {
    return valid_queries_ & bit_range(band_.first_query(j) - q_begin_, band_.last_query(j) - q_begin_);
  }

  Band band_;
  MaskWords mask_;
  ValidKeys valid_keys_;
  int64_t q_begin_, q_last_;
  uint64_t valid_queries_;
  int64_t next_ = 0, end_ = 0;
};

// What a tile of kTileKeys keys, from key k of the block on, reaches; `partial` tells whether it needs its words.
template <class Lane>
FA_INLINE VectorRange tile_range(const KeyBlock& block, int k, uint64_t valid_queries, int vectors, bool& partial) {
  partial = block.partial || k + kTileKeys > block.count;
  if (!partial) return {0, vectors};
  uint64_t any = 0, all = ~uint64_t{0};
  for (int r = 0; r < kTileKeys; ++r) {
    any |= block.word[k + r];
    all &= block.word[k + r];
  }
  partial = all != valid_queries;
  return {__builtin_ctzll(any) / kLanes<Lane>, (63 - __builtin_clzll(any)) / kLanes<Lane> + 1};
}

}  // namespace
}  // namespace fused_attn::cpu
