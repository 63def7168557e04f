// The decode kernel: out = softmax(logits) @ value for few queries and many keys, with cp.async, ldmatrix and mma.sync.
//
// The kernel is bound by memory. So what counts is how many bytes of keys and values are on their way at any time, and
// that no load waits for the softmax. The warps of a program are independent until the end: each visits every
// kWarps-th step of kDecodeKeys keys, and has a ring of its own in shared memory, which it fills kStages - 1 steps
// ahead. No barrier of the block lies in the loop. In the end, the sums of the warps are merged.
#pragma once
#include "../decode.h"
#include "../sm80/tile_memory.h"
#include "../tiles.h"

namespace fused_attn::gpu {

// Sizes of the decode kernel, and where things lie in shared memory (byte offsets). The rings take 96 KiB, so two
// blocks of threads fit into the 227 KiB of sm_90, with 128 to 160 KiB on their way. Memory needs about 40 KiB on their
// way for each multiprocessor: 3.35 TB/s times 700 ns by 132 multiprocessors are 17 KiB on an idle memory system, and
// latency doubles on a busy one. One block fits into the 99 KiB of sm_86.
template <int kHeadDim>
struct DecodePlan {
  static constexpr uint32_t kTileBytes = kDecodeKeys * kHeadDim * 2;
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;  // with head dim 256, four rings of three stages do not fit
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kHeadDim <= 64 ? 6 : kHeadDim <= 96 ? 4 : 3;
  static constexpr uint32_t kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr uint32_t kRingBytes = kStages * kStageBytes;
  static constexpr uint32_t kValid = kWarps * kRingBytes;  // for each warp and stage: a bit for each valid key
  // Queries lie in registers. With head dim 256, the last 64 columns do not fit, and lie in shared memory, in the order
  // of fragments: (step of 16 columns, lane), 16 bytes.
  static constexpr int kQuerySteps = kHeadDim / 16;
  static constexpr int kRegisterSteps = kHeadDim <= 128 ? kQuerySteps : kQuerySteps - 4;
  static constexpr uint32_t kQueries = (kValid + kWarps * kStages * 4 + 15) / 16 * 16;
  static constexpr uint32_t kBytes = kQueries + (kQuerySteps - kRegisterSteps) * 32 * 16;
  static_assert(kBytes <= kMostSharedBytesSm80);
  static_assert(kDecodeRound % (kWarps * kDecodeKeys) == 0);

  // Where the sums of warps are merged, when the rings are not in use any more: (warp, row, column) floats, of which
  // rows are padded, so that the eight rows of a fragment lie in different banks; then (warp, row): reference and
  // row_sum.
  static constexpr int kRowFloats = kHeadDim + 8;
  static constexpr uint32_t kSums = kWarps * kDecodeRows * kRowFloats * 4;
  static_assert(kSums + kWarps * kDecodeRows * 8 <= kValid);
};

// The v of another lane, for eight bytes.
GPU_DEVICE int64_t shuffle_wide(int64_t v, int lane) {
  const uint32_t low = shuffle(static_cast<uint32_t>(v), lane), high = shuffle(static_cast<uint32_t>(v >> 32), lane);
  return static_cast<int64_t>(uint64_t{high} << 32 | low);
}

// Fills the ring of a warp. Each lane looks up one key of a step, number lane % kDecodeKeys: whether it is valid, and
// where its rows lie. What a look-up loads is used one step later, so that no copy waits for it.
template <class T, int kHeadDim>
class KeyLoader {
 public:
  using Plan = DecodePlan<kHeadDim>;
  using Layout = sm80::TileLayout<kHeadDim>;

  // ring: the address of the warp's ring; valid_words: the address of its words of valid keys
  GPU_DEVICE KeyLoader(const Params& p, const DecodeParams& d, const HeadSlice& head_slice, const SplitKeys& keys,
                       uint32_t ring, uint32_t valid_words)
      : p_(p),
        d_(d),
        head_slice_(head_slice),
        keys_(keys),
        ring_(ring),
        valid_words_(valid_words),
        lane_(this_lane()) {}

  // Looks up the step whose first key is first_key, for the next call of `load`.
  GPU_DEVICE void look_up(int32_t first_key) {
    const int32_t key = first_key + lane_.index % kDecodeKeys;
    is_in_range_ = key >= keys_.begin && key < keys_.end;
    row_ = is_in_range_ ? key : keys_.begin;
    padding_ = 0;
    if (d_.padding != nullptr)
      padding_ = load_global(d_.padding + head_slice_.batch * d_.padding_stride_batch + row_ * d_.padding_stride_key);
    if (p_.pages.table != nullptr) {
      entry_ = listed_page(p_.pages, head_slice_.batch, row_);
      row_ %= p_.pages.size;
    }
  }

  // Starts to copy the keys and values that were looked up last.
  GPU_DEVICE void load(int slot) const {
    const uint32_t valid = warp_ballot(is_in_range_ && padding_ == 0);
    if (lane_.index == 0) store_shared(valid_words_ + slot * 4, valid);
    const uint32_t stage = ring_ + slot * Plan::kStageBytes;
    copy_tile(stage, p_.k, valid);
    copy_tile(stage + Plan::kTileBytes, p_.v, valid);
  }

 private:
  // Copies a tile of keys or values. Rows that are not valid become zeros: see sm80::copy_rows.
  GPU_DEVICE void copy_tile(uint32_t tile, const Rows& x, uint32_t valid) const {
    const int64_t entry = p_.pages.table != nullptr ? existing_page(p_.pages, entry_) : head_slice_.batch;
    const int64_t own_offset =
        entry * x.stride_batch + head_slice_.kv_head * x.stride_head + (head_slice_.k_offset + row_) * x.stride_row;
    constexpr int kRowsAtOnce = 32 / Layout::kGroup;
    const int first_row = lane_.index / Layout::kGroup, chunk = lane_.index % Layout::kGroup;
    GPU_UNROLL for (int i = 0; i < kDecodeKeys; i += kRowsAtOnce) {
      const int row = first_row + i;
      const T* const source = static_cast<const T*>(x.data) + shuffle_wide(own_offset, row) + chunk * 8;
      const bool is_valid = valid >> row & 1;
      GPU_UNROLL for (int column = 0; column < kHeadDim; column += Layout::kGroup * 8) {
        copy_async_16(tile + Layout::offset(row, chunk) + column * 2, source + column,
                      is_valid && column + chunk * 8 < x.columns);
      }
    }
  }

  const Params& p_;
  const DecodeParams& d_;
  const HeadSlice& head_slice_;
  const SplitKeys& keys_;
  uint32_t ring_;
  uint32_t valid_words_;
  Lane lane_;
  // The key that this lane has looked up.
  bool is_in_range_;
  uint8_t padding_;
  int32_t entry_;  // its page, if keys are paged
  int32_t row_;    // its row, within the page or the batch entry
};

// The two rows of a tile that a thread has in fragments. Rows beyond the last one repeat the last one, but zeros are
// loaded as their queries, and they are not stored.
struct DecodeRowPair {
  HeadSlice first_head;  // of the head group
  int32_t heads[2];      // within the head group
  int32_t queries[2];
  bool exist[2];

  GPU_DEVICE DecodeRowPair(const Params& p, const HeadSlice& first_head, int32_t first_row, Lane lane)
      : first_head(first_head) {
    const int32_t count = first_head.seqlen_q * p.group_size;
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      const int32_t own = first_row + lane.g + 8 * r, row = min(own, count - 1);
      heads[r] = row % p.group_size;
      queries[r] = row / p.group_size;
      exist[r] = own < count;
    }
  }

  GPU_DEVICE HeadSlice head_slice(int r) const {
    HeadSlice own = first_head;
    // Without keep_computed, the compiler would compute addresses before the loop over keys, and keep them in
    // registers.
    own.head = keep_computed(own.head + heads[r]);
    return own;
  }
};

// Loads a tile of queries as left factors. Columns beyond those of the tensor are zeros.
template <class T, int kSteps>
GPU_DEVICE void load_queries(uint32_t (&q)[kSteps][4], const Params& p, const DecodeRowPair& rows, Lane lane) {
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const T* const source = rows.head_slice(r).query_row<const T>(p.q, rows.queries[r]);
    // Of four tiles of eight columns, each of the four threads of a row reads one.
    GPU_UNROLL for (int t = 0; t < 2 * kSteps; t += 4) {
      const int column = 8 * (t + lane.q);
      Vec4 read{0, 0, 0, 0};
      if (rows.exist[r] && column < p.q.columns) read = load_global(reinterpret_cast<const Vec4*>(source + column));
      uint32_t words[4] = {read.x, read.y, read.z, read.w};
      exchange_in_row(words, lane);
      GPU_UNROLL for (int i = 0; i < 4; ++i) q[(t + i) / 2][2 * ((t + i) % 2) + r] = words[i];
    }
  }
}

// Adds relative bias and bias to the scores of a step.
template <class T>
GPU_DEVICE void add_biases(float (&scores)[2][4], const Params& p, const DecodeRowPair& rows, int32_t first_key) {
  const LogitParams& x = p.logits;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const HeadSlice own = rows.head_slice(r);
    GPU_UNROLL for (int i = 0; i < 4; ++i) {
      const int64_t key = min(first_key + 8 * (i / 2) + i % 2, own.seqlen_k - 1);  // hidden if it is another key
      float& score = scores[i / 2][2 * r + i % 2];
      if (x.relative_bias != nullptr)
        score += load_global(x.relative_bias + own.head * x.relative_bias_stride_head +
                             (key - rows.queries[r] + p.seqlen_q - 1));
      if (x.bias.data != nullptr) {
        const int64_t offset = own.batch * x.bias.stride_batch + own.head * x.bias.stride_head +
                               rows.queries[r] * x.bias.stride_query + key * x.bias.stride_key;
        score += x.is_bias_float ? load_float(static_cast<const float*>(x.bias.data) + offset)
                                 : load_float(static_cast<const T*>(x.bias.data) + offset);
      }
    }
  }
}

// Clears the bits of keys that the dense mask hides from a row. `visible` has a bit for each key of a step.
GPU_DEVICE uint32_t masked(uint32_t visible, const ScoreTensor& mask, HeadSlice own, int32_t query, int32_t first_key,
                           Lane lane) {
  const uint8_t* const source = static_cast<const uint8_t*>(mask.data) + own.batch * mask.stride_batch +
                                own.head * mask.stride_head + query * mask.stride_query;
  GPU_UNROLL for (int i = 0; i < 4; ++i) {
    const int column = 2 * lane.q + 8 * (i / 2) + i % 2;
    const uint32_t bit = 1u << column;
    if ((visible & bit) != 0 && load_global(source + (first_key + column) * mask.stride_key) == 0) visible &= ~bit;
  }
  return visible;
}

// Computes one split of the keys for one tile of rows. With one split, writes out and lse, otherwise the sums of the
// split.
template <class T, int kHeadDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(DecodePlan<kHeadDim>::kThreads, 2)
    decode_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT DecodeParams d) {
  using Plan = DecodePlan<kHeadDim>;
  constexpr int kWarps = Plan::kWarps, kStages = Plan::kStages, kThreads = Plan::kThreads;

  // Find the rows and the keys. Tiles of the same keys run side by side, so that all but one find them in the L2 cache.
  int32_t program = block_index_x();
  const int32_t first_row = program % d.row_tiles * kDecodeRows;
  program /= d.row_tiles;
  const int32_t split = program % p.splits.count;
  program /= p.splits.count;
  const int32_t kv_heads = p.num_heads / p.group_size, kv_head = program % kv_heads;
  const HeadSlice head_slice = split_slice_of(p, program / kv_heads, kv_head * p.group_size);
  const int32_t num_rows = head_slice.seqlen_q * p.group_size;
  if (first_row >= num_rows) return;
  const SplitKeys keys = split_keys(p, head_slice, first_row);
  if (p.splits.count > 1 && split >= keys.used_splits) {  // the sums of every split are read
    const int32_t row = first_row + thread_index();
    HeadSlice own = head_slice;
    own.head += row % p.group_size;
    if (row < min(num_rows, first_row + kDecodeRows))
      store_global(p.splits.sums + split_row(p, split, own, row / p.group_size),
                   SplitSum{-kInfinity, 0.0f, -kInfinity});
    return;
  }

  // Load.
  const Lane lane = this_lane();
  const int warp = thread_index() / 32;
  const uint32_t shared = shared_address(shared_memory()), ring = shared + warp * Plan::kRingBytes;
  const uint32_t valid_words = shared + Plan::kValid + warp * kStages * 4;
  constexpr int32_t kStride = kWarps * kDecodeKeys;  // between two steps of a warp
  const int32_t begin = keys.first + split * keys.keys_per_split + warp * kDecodeKeys;
  const int32_t end = min(keys.first + (split + 1) * keys.keys_per_split, keys.end);
  KeyLoader<T, kHeadDim> loader(p, d, head_slice, keys, ring, valid_words);
  if (begin < end) loader.look_up(begin);
  int32_t next_key = begin;
  const auto load_next = [&](int slot) {
    if (next_key < end) loader.load(slot);
    copy_async_commit();
    next_key += kStride;
    if (next_key < end) loader.look_up(next_key);
  };
  GPU_UNROLL for (int slot = 0; slot < kStages - 1; ++slot) load_next(slot);
  const Diagonals band(p, head_slice);
  const DecodeRowPair rows(p, head_slice, first_row, lane);
  uint32_t q[Plan::kQuerySteps][4];
  load_queries<T>(q, p, rows, lane);
  const uint32_t own_queries = shared + Plan::kQueries + lane.index * 16;
  if constexpr (Plan::kRegisterSteps < Plan::kQuerySteps) {
    GPU_UNROLL for (int k = Plan::kRegisterSteps; k < Plan::kQuerySteps; ++k) {
      const uint32_t address = own_queries + (k - Plan::kRegisterSteps) * 32 * 16;
      if (warp == 0) store_shared(address, Vec4{q[k][0], q[k][1], q[k][2], q[k][3]});
    }
    sync_threads();
  }

  // Loop.
  using Layout = sm80::TileLayout<kHeadDim>;
  const sm80::Corners<kHeadDim> corners(ring, 0, lane);
  LazySoftmax softmax;
  softmax.init();
  float acc[1][kHeadDim / 8][4];
  fill(acc[0], 0.0f);
  int slot = 0, free_slot = kStages - 1;
  for (int32_t key = begin; key < end; key += kStride) {
    copy_async_wait<kStages - 2>();
    sync_warp();  // the copies of all lanes have come, and all lanes are done with the step before
    load_next(free_slot);

    const uint32_t stage = slot * Plan::kStageBytes;
    float scores[2][4];
    fill(scores, 0.0f);
    GPU_UNROLL for (int k = 0; k < Plan::kQuerySteps; ++k) {
      if (k >= Plan::kRegisterSteps) {
        const Vec4 own = load_shared<Vec4>(own_queries + (k - Plan::kRegisterSteps) * 32 * 16);
        q[k][0] = own.x, q[k][1] = own.y, q[k][2] = own.z, q[k][3] = own.w;
      }
      uint32_t b[4];
      load_matrix_x4(b, Layout::advance(corners.right_transposed, k) + stage);
      mma_m16n8k16<T>(scores[0], q[k], b[0], b[1]);
      mma_m16n8k16<T>(scores[1], q[k], b[2], b[3]);
    }
    if (!p.logits.is_plain) {
      const bool has_softcap = p.logits.softcap != 0.0f;
      if (has_softcap) apply_softcap(p.logits, scores, NoGradients{});
      const float factor = has_softcap ? 1.0f : p.scale;
      scale_rows(scores, {factor, factor});
      add_biases<T>(scores, p, rows, key + 2 * lane.q);
    }
    const uint32_t valid = load_shared<uint32_t>(valid_words + slot * 4);
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      const int32_t query = rows.queries[r];
      uint32_t visible = valid & column_bits(band.first_key(query) - key, band.last_key(query) + 1 - key, 0);
      if (d.mask.bytes.data != nullptr) visible = masked(visible, d.mask.bytes, rows.head_slice(r), query, key, lane);
      if (d.mask.ranges.data != nullptr && visible != 0) {
        const HeadSlice own = rows.head_slice(r);
        visible &= keys_in_ranges(d.mask.ranges, own.batch, own.head, query, key);
      }
      GPU_UNROLL for (int i = 0; i < 4; ++i) {
        if (!(visible >> (2 * lane.q + 8 * (i / 2) + i % 2) & 1)) scores[i / 2][2 * r + i % 2] = -kInfinity;
      }
    }
    uint32_t probs[1][1][4];
    if (!softmax.try_probs<T>(scores, p.softmax_scale_log2, NoDropout{}, probs[0])) {
      float rescale[2];
      softmax.raise_and_compute_probs<T>(scores, p.softmax_scale_log2, NoDropout{}, probs[0], rescale);
      scale_rows(acc[0], rescale);
    }
    sm80::multiply<T, kHeadDim>(acc, probs, corners, stage + Plan::kTileBytes);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
  }

  // Merge the sums of the warps.
  copy_async_wait<0>();
  sync_threads();  // all warps are done with their rings
  const auto acc_address = [&](int w, int row, int column) {
    return shared + ((w * kDecodeRows + row) * Plan::kRowFloats + column) * 4;
  };
  const auto sums_address = [&](int w, int row) { return shared + Plan::kSums + (w * kDecodeRows + row) * 8; };
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = lane.g + 8 * r;
    const float total = row_total(softmax.row_sum[r]);
    if (!rows.exist[r]) continue;
    if (lane.q == 0) store_shared(sums_address(warp, row), Float2{softmax.reference[r], total});
    GPU_UNROLL for (int t = 0; t < kHeadDim / 8; ++t)
        store_shared(acc_address(warp, row, 8 * t + 2 * lane.q), Float2{acc[0][t][2 * r], acc[0][t][2 * r + 1]});
  }
  sync_threads();  // the sums of all warps are stored
  constexpr int kChunks = kHeadDim / 8;
  for (int i = thread_index(); i < min(num_rows - first_row, kDecodeRows) * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    float reference = -kInfinity, total = 0.0f, sum[8] = {};
    GPU_UNROLL for (int w = 0; w < kWarps; ++w) reference =
        fmaxf(reference, load_shared<Float2>(sums_address(w, row)).x);
    GPU_UNROLL for (int w = 0; w < kWarps; ++w) {
      const Float2 sums = load_shared<Float2>(sums_address(w, row));
      const float factor = LazySoftmax::factor_between(sums.x, reference, p.softmax_scale_log2);
      total = multiply_add(sums.y, factor, total);
      GPU_UNROLL for (int c = 0; c < 8; c += 4) {
        const Float4 x = load_shared<Float4>(acc_address(w, row, column + c));
        sum[c] = multiply_add(x.x, factor, sum[c]);
        sum[c + 1] = multiply_add(x.y, factor, sum[c + 1]);
        sum[c + 2] = multiply_add(x.z, factor, sum[c + 2]);
        sum[c + 3] = multiply_add(x.w, factor, sum[c + 3]);
      }
    }
    HeadSlice own = head_slice;
    own.head += (first_row + row) % p.group_size;
    const int32_t query = (first_row + row) / p.group_size;
    if (p.splits.count == 1) {
      finish_columns<T>(p, own, query, column, reference, total, sum);
      continue;
    }
    const int64_t own_row = split_row(p, split, own, query);
    if (column == 0) store_global(p.splits.sums + own_row, SplitSum{reference, total, -kInfinity});
    if (column >= p.v.columns) continue;
    float* const target = p.splits.acc + own_row * p.v.columns + column;
    store_global(reinterpret_cast<Float4*>(target), Float4{sum[0], sum[1], sum[2], sum[3]});
    store_global(reinterpret_cast<Float4*>(target) + 1, Float4{sum[4], sum[5], sum[6], sum[7]});
  }
}

}  // namespace fused_attn::gpu
