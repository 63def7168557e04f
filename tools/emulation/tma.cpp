#include "tma.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "block.h"
#include "errors.h"
#include "float16.h"
#include "global_memory.h"

namespace fused_attn::emulation {
namespace {

constexpr uint32_t kChunk = 16;  // bytes that swizzling keeps together
constexpr uint32_t kTmaAlignment = 128;

// One row of a box. Bytes begin ... end - 1 of the row lie within the tensor, and `global` is the address of the first
// of them. For the other bytes, a load writes zeros, and a store writes nothing.
struct Row {
  char* global;
  int begin, end;
};

struct Box {
  std::vector<Row> rows;
  int row_bytes;
  int swizzle_bytes;
  uint32_t bytes() const { return uint32_t(rows.size()) * row_bytes; }
};

// Calls f(address, begin, end, global) for each 16-byte chunk of a box at the shared address `shared`. The chunk itself
// is at `address`, where the swizzle puts it. Its bytes begin ... end - 1 lie within the tensor, and `global` is the
// address of the first of them there.
template <class F>
void for_each_chunk(const Box& box, uint32_t shared, const F& f) {
  for (size_t r = 0; r < box.rows.size(); r++) {
    const Row& row = box.rows[r];
    for (int at = 0; at < box.row_bytes; at += kChunk) {
      const uint32_t address = swizzle(shared + uint32_t(r) * box.row_bytes + at, box.swizzle_bytes);
      const int begin = std::clamp(row.begin - at, 0, int(kChunk)), end = std::clamp(row.end - at, 0, int(kChunk));
      f(address, begin, end, row.global + (at + begin - row.begin));
    }
  }
}

void check_map(const TensorMap& map, int num_coordinates, const char* what) {
  if (map.valid != TensorMap::kValid) fail("%s: the tensor map was not made by encode_tensor_map", what);
  if (num_coordinates != map.rank)
    fail("%s: %d coordinates for a tensor map of rank %d", what, num_coordinates, map.rank);
  if (reinterpret_cast<uintptr_t>(&map) % alignof(TensorMap))
    fail("%s: the tensor map is not aligned to 64 bytes", what);
}

void check_shared_address(const TensorMap& map, uint32_t address, const char* what) {
  const int row_bytes = map.box[0] * map.element_bytes;
  if (address % kTmaAlignment) fail("%s: shared address %u is not a multiple of %u", what, address, kTmaAlignment);
  if (const int repeat = 8 * map.swizzle_bytes; repeat && address % repeat)
    fail("%s: shared address %u is not a multiple of %d, after which the %d-byte swizzle repeats", what, address,
         repeat, map.swizzle_bytes);
  if (map.swizzle_bytes && row_bytes != map.swizzle_bytes)
    fail("%s: rows of %d bytes under a swizzle of %d are not emulated", what, row_bytes, map.swizzle_bytes);
}

// Fails if the box does not begin at a multiple of 16 bytes within its rows. An H100 then stops with an illegal
// instruction.
void check_first_coordinate(const TensorMap& map, int coordinate, const char* what) {
  const int64_t bytes = int64_t(coordinate) * map.element_bytes;
  if (bytes % kChunk)
    fail("%s: coordinate 0 is %d, which is %lld bytes, not a multiple of %u", what, coordinate, (long long)bytes,
         kChunk);
}

// Fails if a box that is written begins before the tensor; only a box that is read may (CUDA C++ Programming Guide,
// "Negative indices and out of bounds"). An H100 then stops with an illegal instruction, whichever coordinate is
// negative.
void check_begins_inside(const int* coordinates, int num_coordinates, const char* what) {
  for (int i = 0; i < num_coordinates; i++) {
    if (coordinates[i] < 0)
      fail("%s: coordinate %d is %d: only a box that is read may begin before the tensor", what, i, coordinates[i]);
  }
}

// The rows of the box at `coordinates`. access(handle, bytes) checks that the bytes may be accessed, and returns their
// host address.
template <class F>
Box box_of(const TensorMap& map, const int* coordinates, const F& access) {
  Box box;
  box.row_bytes = map.box[0] * map.element_bytes;
  box.swizzle_bytes = map.swizzle_bytes;
  int num_rows = 1;
  for (int i = 1; i < map.rank; i++) num_rows *= map.box[i];
  const int64_t first = coordinates[0], size = map.sizes[0];
  const int begin = int(std::clamp<int64_t>(-first, 0, map.box[0])) * map.element_bytes;
  const int end = int(std::clamp<int64_t>(size - first, 0, map.box[0])) * map.element_bytes;
  for (int r = 0; r < num_rows; r++) {
    char* handle = map.base + first * map.element_bytes;
    bool is_inside = begin < end;
    int rest = r;
    for (int i = 1; i < map.rank; i++) {
      const int64_t at = coordinates[i] + int64_t(rest % map.box[i]);
      rest /= map.box[i];
      is_inside &= at >= 0 && at < map.sizes[i];
      handle += at * map.stride_bytes[i];
    }
    if (is_inside)
      box.rows.push_back({access(handle + begin, size_t(end - begin)), begin, end});
    else
      box.rows.push_back({nullptr, 0, 0});
  }
  return box;
}

// Issues a load of a box to shared memory, which completes on an mbarrier, now or later (completes_late).
void load(uint32_t destination, Box box, uint32_t mbarrier, const char* what) {
  Block& b = block();
  b.statistics.tma_loads++;
  const uint32_t bytes = box.bytes();
  b.shared.at(destination, bytes, kChunk, what);
  const uint32_t tick = uint32_t(b.statistics.tma_loads);
  const Epoch epoch = {uint16_t(b.mbarriers.begin_copy(mbarrier, tick)), true, tick};
  VectorClock clock = b.current->clock;
  if (b.options.race_detection) {
    b.races.write(destination - kSharedBase, bytes, epoch, b.current->known(), what);
    b.races.begin_copy(destination - kSharedBase, bytes);
    clock.learn(epoch.agent, epoch.tick);
  }
  if (b.options.poison) b.shared.fill_with_poison(destination, bytes);
  // The bytes arrive when somebody calls job->complete(): at once, or later from the queue of the block.
  auto job = std::make_shared<TmaJob>();
  job->carry_out = [=, box = std::move(box)] {
    for_each_chunk(box, destination, [&](uint32_t address, int begin, int end, const char* global) {
      char* chunk = block().shared.at(address, kChunk, kChunk, what);
      memset(chunk, 0, kChunk);
      if (begin < end) memcpy(chunk + begin, global, end - begin);
    });
    if (block().options.race_detection) block().races.end_copy(destination - kSharedBase, bytes, epoch);
    block().mbarriers.complete_copy(mbarrier, bytes, clock);
  };
  if (b.completes_late())
    b.tma.push(std::move(job));
  else
    job->complete();
}

// Adds numbers in shared memory to numbers in global memory.
void add(char* global, const char* shared, int bytes, bool is_float32, bool is_bf16) {
  for (int i = 0; i < bytes; i += is_float32 ? 4 : 2) {
    if (is_float32) {
      float sum, x;
      memcpy(&sum, global + i, 4);
      memcpy(&x, shared + i, 4);
      sum += x;
      memcpy(global + i, &sum, 4);
    } else {
      uint16_t sum, x;
      memcpy(&sum, global + i, 2);
      memcpy(&x, shared + i, 2);
      sum = to_16_bits(from_16_bits(sum, is_bf16) + from_16_bits(x, is_bf16), is_bf16);
      memcpy(global + i, &sum, 2);
    }
  }
}

// The epoch of the bulk store that the current thread issues next.
Epoch next_store() {
  const Block& b = block();
  return {uint16_t(b.agents.bulk_stores(b.current->warp)), true, uint32_t(b.statistics.tma_stores) + 1};
}

// Issues a bulk store or addition of a box from shared memory, which is carried out now or later (completes_late).
void write(Box box, uint32_t source, BulkWrite write, bool is_float32, bool is_bf16, const char* what) {
  Block& b = block();
  const Epoch epoch = next_store();
  b.statistics.tma_stores++;
  const uint32_t bytes = box.bytes();
  b.shared.at(source, bytes, kChunk, what);
  if (b.options.race_detection) b.races.read(source - kSharedBase, bytes, epoch, b.current->known(), what);
  struct Piece {
    char* global;
    int bytes;
    char data[kChunk];
  };
  auto pieces = std::make_shared<std::vector<Piece>>();
  auto job = std::make_shared<TmaJob>();
  job->read_source = [=, box = std::move(box)] {
    for_each_chunk(box, source, [&](uint32_t address, int begin, int end, char* global) {
      if (begin >= end) return;
      Piece& piece = pieces->emplace_back(Piece{global, end - begin, {}});
      memcpy(piece.data, block().shared.at(address, kChunk, kChunk, what) + begin, end - begin);
    });
  };
  job->carry_out = [=] {
    for (const Piece& piece : *pieces) {
      if (write == BulkWrite::kAdd)
        add(piece.global, piece.data, piece.bytes, is_float32, is_bf16);
      else
        memcpy(piece.global, piece.data, piece.bytes);
    }
  };
  b.current->bulk_stores.open.push_back({job, epoch.tick});
  if (b.completes_late())
    b.tma.push(std::move(job));
  else
    job->complete();
}

// Contiguous memory as a box of one row.
Box contiguous(char* global, uint32_t bytes) { return {{{global, 0, int(bytes)}}, int(bytes), 0}; }

void check_bulk_bytes(uint32_t bytes, const char* what) {
  if (bytes == 0 || bytes % kChunk) fail("%s: %u bytes, expected a multiple of %u", what, bytes, kChunk);
}

}  // namespace

void TmaQueue::complete_one() {
  const size_t i = block().options.seed ? block().random() % jobs_.size() : 0;
  const std::shared_ptr<TmaJob> job = jobs_[i];
  jobs_.erase(jobs_.begin() + i);
  job->complete();
}

void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier, const int* coordinates,
              int num_coordinates) {
  const char* what = "tma_load";
  check_map(map, num_coordinates, what);
  check_shared_address(map, destination, what);
  check_first_coordinate(map, coordinates[0], what);
  Box box = box_of(map, coordinates, [&](char* handle, size_t bytes) {
    return const_cast<char*>(global_read(handle, bytes, 1, what, /*is_async=*/true));
  });
  load(destination, std::move(box), mbarrier, what);
}

void tma_write(const TensorMap& map, uint32_t source, const int* coordinates, int num_coordinates, BulkWrite kind) {
  const bool is_add = kind == BulkWrite::kAdd;
  const char* what = is_add ? "tma_reduce_add" : "tma_store";
  check_map(map, num_coordinates, what);
  check_shared_address(map, source, what);
  check_first_coordinate(map, coordinates[0], what);
  check_begins_inside(coordinates, num_coordinates, what);
  Box box = box_of(map, coordinates, [&](char* handle, size_t bytes) {
    return global_write(handle, bytes, 1, what, next_store(), is_add ? Write::kSum : Write::kPlain);
  });
  write(std::move(box), source, kind, map.is_float32, map.is_bf16, what);
}

void tma_prefetch(const TensorMap& map) { check_map(map, map.rank, "tma_prefetch"); }

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier) {
  const char* what = "bulk_load";
  check_bulk_bytes(bytes, what);
  char* global = const_cast<char*>(global_read(source, bytes, kChunk, what, /*is_async=*/true));
  load(destination, contiguous(global, bytes), mbarrier, what);
}

void bulk_store(float* destination, uint32_t source, uint32_t bytes) {
  const char* what = "bulk_store";
  check_bulk_bytes(bytes, what);
  char* global = global_write(destination, bytes, kChunk, what, next_store());
  write(contiguous(global, bytes), source, BulkWrite::kStore, /*is_float32=*/true, /*is_bf16=*/false, what);
}

void bulk_reduce_add_f32(float* destination, uint32_t source, uint32_t bytes) {
  const char* what = "bulk_reduce_add_f32";
  check_bulk_bytes(bytes, what);
  char* global = global_write(destination, bytes, kChunk, what, next_store(), Write::kSum);
  write(contiguous(global, bytes), source, BulkWrite::kAdd, /*is_float32=*/true, /*is_bf16=*/false, what);
}

void bulk_commit() {
  BulkGroups& stores = block().current->bulk_stores;
  stores.committed.push_back(std::exchange(stores.open, {}));
}

void bulk_wait_read(int groups_left) {
  Block& b = block();
  Thread& thread = *b.current;
  auto& committed = thread.bulk_stores.committed;
  for (int group = 0; group < int(committed.size()) - groups_left; group++) {
    for (BulkGroups::Store& store : committed[group]) {
      store.job->read();
      store.is_free = true;
      thread.clock.learn(b.agents.bulk_stores(thread.warp), store.tick);
    }
  }
}

// Completes all groups except the last groups_left that were committed.
void bulk_wait(int groups_left) {
  bulk_wait_read(groups_left);
  Thread& thread = *block().current;
  const int source = GlobalClock::own_bulk_stores(block().agents.bulk_stores(thread.warp));
  auto& committed = thread.bulk_stores.committed;
  for (; int(committed.size()) > groups_left; committed.pop_front()) {
    for (const BulkGroups::Store& store : committed.front()) {
      store.job->complete();
      thread.clock.global.learn({{{kOrdinary, source}, store.tick}});
    }
  }
}

void check_no_bulk_stores_left(const Thread& thread) {
  bool is_any_left = !thread.bulk_stores.open.empty();
  for (const auto& group : thread.bulk_stores.committed)
    for (const BulkGroups::Store& store : group) is_any_left |= !store.is_free;
  if (is_any_left) fail("the thread ended before its tma stores were waited for, which still read shared memory");
}

}  // namespace fused_attn::emulation
