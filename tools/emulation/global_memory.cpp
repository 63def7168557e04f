#include "global_memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {
namespace {

constexpr uintptr_t kHandle = uintptr_t(1) << 62;  // added to a host address; no address of x86-64 has this bit
constexpr uint32_t kManyPolls = 1 << 20;  // of one address in a row, before it is taken for a loop that never ends

// The last write to two bytes of global memory in a launch, or the last ordinary read since then. The emulation
// remembers no other accesses to them. This finds most races between threads and blocks, but not a write after a read
// that was not the last one, or was one by TMA, nor a missing proxy fence within a block.
struct LastAccess {
  int32_t block = -1;
  Epoch access{};  // of a bulk store: its agent, and its number in the block
  Write kind = Write::kPlain;

  bool operator==(const LastAccess& other) const {
    return block == other.block && access.agent == other.access.agent && access.is_async == other.access.is_async &&
           access.tick == other.access.tick && kind == other.kind;
  }
};

// The bytes for which one last access is remembered. Two threads may write to the two halves of a word.
constexpr uintptr_t kCellBytes = 2;

struct Buffer {
  uintptr_t begin, end;  // addresses of the host
  bool is_writable;
  std::vector<LastAccess> last_writes;  // one for each kCellBytes
  std::vector<LastAccess> last_reads;   // likewise; empty if there was no read
};

std::vector<Buffer> buffers;

// releases[block][n - 1] is what the block's release number n, and the releases before, have made known.
// published_with_counter tells for each counter which releases a thread acquires that waits for the counter: for each
// block, the number of its last release that the counter stands for.
std::map<int, std::vector<VectorClock>> releases;
std::map<const int*, GlobalClock::Ticks> published_with_counter;

// The buffer that contains these bytes; fails if there is none. Buffers may overlap, because they may be views of one
// tensor.
Buffer& find(uintptr_t handle, size_t bytes, size_t alignment, bool is_write, const char* what) {
  check_global_alignment(reinterpret_cast<const void*>(handle), alignment, what);
  const uintptr_t p = handle - kHandle;
  const Buffer* nearest = nullptr;
  ptrdiff_t least_distance = 0;
  bool is_read_only = false;
  for (Buffer& buffer : buffers) {
    if (p >= buffer.begin && p + bytes <= buffer.end) {
      if (!is_write || buffer.is_writable) return buffer;
      is_read_only = true;
    }
    const ptrdiff_t distance =
        p < buffer.begin ? ptrdiff_t(p - buffer.begin) : std::max<ptrdiff_t>(0, p + bytes - buffer.end);
    if (nearest == nullptr || std::abs(distance) < std::abs(least_distance)) {
      nearest = &buffer;
      least_distance = distance;
    }
  }
  if (is_read_only) fail("%s: to a buffer in global memory that the kernel is only to read", what);
  if (nearest == nullptr || std::abs(least_distance) > ptrdiff_t(1) << 40)
    fail("%s: %#zx is no address in global memory", what, size_t(handle));
  fail("%s: %zu bytes of global memory that reach %td bytes %s the nearest buffer, which has %zu", what, bytes,
       std::abs(least_distance), least_distance < 0 ? "before" : "past the end of",
       size_t(nearest->end - nearest->begin));
}

// Returns why the access of the current thread is not ordered after the access `last`, or an empty text if it is. The
// reason names the primitive that is missing. is_async: the access is one of the async proxy (TMA).
std::string missing_order(const LastAccess& last, bool is_async) {
  const Block& b = block();
  const VectorClock& clock = b.current->clock;
  const Epoch& access = last.access;
  const int source = GlobalClock::own_bulk_stores(access.agent);
  if (last.block == b.linear_index) {
    if (access.is_async)
      return clock.global.get(kOrdinary, source) >= access.tick ? ""
                                                                : "no tma_store_wait for that bulk store comes before";
    return access.agent == b.current->index || clock.get(kOrdinary, access.agent) >= access.tick
               ? ""
               : "nothing orders the two threads";
  }
  const uint32_t acquired = clock.global.get(kOrdinary, last.block);
  if (acquired == 0) return "no add_release of that block has been acquired by a wait_until_equal";
  const std::vector<VectorClock>& published = releases[last.block];
  const VectorClock& known = published[acquired - 1];
  if (known.get(kOrdinary, access.agent) < access.tick)
    return access.is_async ? "that block's add_release does not come after a tma_store_wait for the bulk store"
                           : "that block's add_release does not come after the access";
  if (access.is_async && known.global.get(kOrdinary, source) < access.tick)
    return "before that block's add_release, tma_store_wait_read has waited for the bulk store's source alone, and no "
           "tma_store_wait for its completion";
  if (access.is_async && known.global.get(kFenced, source) < access.tick)
    return "no fence_async_proxy_global lies between that block's tma_store_wait and its add_release";
  if (!is_async) return "";
  const uint32_t fenced = clock.global.get(kFenced, last.block);
  const VectorClock* visible = fenced ? &published[fenced - 1] : nullptr;
  if (visible &&
      (access.is_async ? visible->global.get(kFenced, source) : visible->get(kOrdinary, access.agent)) >= access.tick)
    return "";
  return "no fence_async_proxy_global lies between the wait_until_equal and this access by the async proxy";
}

// Names the agent or block of an access in a report.
std::string name_of_agent(const LastAccess& last) {
  const Block& b = block();
  const std::string agent = b.agents.name(last.access.agent);
  return last.block == b.linear_index ? agent + " of the same block"
                                      : format("block number %d of the same launch", last.block);
}

// How many last accesses of each kind a buffer has.
size_t num_cells(const Buffer& buffer) { return (buffer.end - buffer.begin + kCellBytes - 1) / kCellBytes + 1; }

// The range of `accesses`, last_writes or last_reads of the buffer, for these bytes.
std::pair<LastAccess*, LastAccess*> cells_of(const Buffer& buffer, std::vector<LastAccess>& accesses, uintptr_t p,
                                             size_t bytes) {
  LastAccess* first = accesses.data();
  return {first + (p - buffer.begin) / kCellBytes, first + (p + bytes - 1 - buffer.begin) / kCellBytes + 1};
}

// Calls f for each different one of the last accesses in this range.
template <class F>
void for_each_access(const std::pair<LastAccess*, LastAccess*>& range, const F& f) {
  const auto [begin, end] = range;
  for (const LastAccess* last = begin; last < end; last++)
    if (last->block >= 0 && (last == begin || !(*last == last[-1]))) f(*last);
}

// Adds to a number in global memory, and returns the number before.
template <class T>
T add_to(T* handle, T value, Write kind, const char* what) {
  char* p = global_write(handle, sizeof(T), sizeof(T), what, block().current->epoch(), kind);
  T before;
  memcpy(&before, p, sizeof(T));
  const T after = before + value;
  memcpy(p, &after, sizeof(T));
  return before;
}

}  // namespace

void* register_buffer(const void* memory, size_t bytes, bool is_writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  buffers.push_back({begin, begin + bytes, is_writable, {}});
  return reinterpret_cast<void*>(begin + kHandle);
}

void clear_buffers() { buffers.clear(); }

void forget_accesses() {
  published_with_counter.clear();
  releases.clear();
  for (Buffer& buffer : buffers)
    if (buffer.is_writable) {
      buffer.last_writes.assign(num_cells(buffer), LastAccess{});
      buffer.last_reads.clear();
    }
}

void check_global_alignment(const void* handle, size_t alignment, const char* what) {
  const size_t address = reinterpret_cast<size_t>(handle);
  if (address % alignment) fail("%s: global address %#zx is not a multiple of %zu", what, address, alignment);
}

const char* global_read(const void* handle, size_t bytes, size_t alignment, const char* what, bool is_async) {
  Block& b = block();
  const uintptr_t address = reinterpret_cast<uintptr_t>(handle);
  Buffer& buffer = find(address, bytes, alignment, /*is_write=*/false, what);
  Thread& thread = *b.current;
  thread.polls = handle == thread.polled ? thread.polls + 1 : 0;
  thread.polled = handle;
  if (thread.polls > kManyPolls)
    fail(
        "%s: the thread reads one address in global memory again and again. Nobody else runs meanwhile; to wait "
        "for another block there is wait_until_equal",
        what);
  const uintptr_t p = address - kHandle;
  if (buffer.is_writable && b.options.race_detection) {
    for_each_access(cells_of(buffer, buffer.last_writes, p, bytes), [&](const LastAccess& last) {
      if (const std::string problem = missing_order(last, is_async); !problem.empty())
        fail("RACE: %s reads global memory that %s wrote: %s", what, name_of_agent(last).c_str(), problem.c_str());
    });
    if (!is_async) {
      if (buffer.last_reads.empty()) buffer.last_reads.resize(num_cells(buffer));
      const auto cells = cells_of(buffer, buffer.last_reads, p, bytes);
      std::fill(cells.first, cells.second, LastAccess{b.linear_index, thread.epoch()});
    }
  }
  return reinterpret_cast<const char*>(p);
}

char* global_write(void* handle, size_t bytes, size_t alignment, const char* what, const Epoch& access, Write kind) {
  Block& b = block();
  const uintptr_t address = reinterpret_cast<uintptr_t>(handle);
  Buffer& buffer = find(address, bytes, alignment, /*is_write=*/true, what);
  const uintptr_t p = address - kHandle;
  if (b.options.race_detection) {
    for_each_access(cells_of(buffer, buffer.last_writes, p, bytes), [&](const LastAccess& last) {
      const bool needs_no_order = kind == Write::kCount || (kind == Write::kSum && !b.options.ordered_sums);
      if (kind == last.kind && needs_no_order) return;
      if (const std::string problem = missing_order(last, access.is_async); !problem.empty())
        fail("RACE: %s to global memory that %s %s: %s", what, name_of_agent(last).c_str(),
             kind == Write::kSum && last.kind == kind ? "also adds to" : "writes too", problem.c_str());
    });
    if (!buffer.last_reads.empty()) {
      const auto reads = cells_of(buffer, buffer.last_reads, p, bytes);
      for_each_access(reads, [&](const LastAccess& last) {
        if (const std::string problem = missing_order(last, /*is_async=*/false); !problem.empty())
          fail("RACE: %s to global memory that %s has read: %s", what, name_of_agent(last).c_str(), problem.c_str());
      });
      std::fill(reads.first, reads.second, LastAccess{});
    }
    const auto cells = cells_of(buffer, buffer.last_writes, p, bytes);
    std::fill(cells.first, cells.second, LastAccess{b.linear_index, access, kind});
  }
  return reinterpret_cast<char*>(p);
}

int atomic_fetch_add(int* counter, int value) {
  const int before = add_to(counter, value, Write::kCount, "atomic_fetch_add");
  block().scheduler.yield();  // a counter deals out work: without a pause here, this block would take all of it
  return before;
}

void atomic_add(float* sum, float value) { add_to(sum, value, Write::kSum, "atomic_add"); }

void add_release(int* counter, int value) {
  const Block& b = block();
  Thread& thread = *b.current;
  add_to(counter, value, Write::kCount, "add_release");
  std::vector<VectorClock>& of_block = releases[b.linear_index];
  VectorClock all = thread.clock;
  if (!of_block.empty()) all.join(of_block.back());
  of_block.push_back(std::move(all));
  GlobalClock::Ticks& published = published_with_counter[counter];
  for (const auto& [key, number] : thread.clock.global.ticks())
    if (key.first == kOrdinary && key.second >= 0) published[key] = std::max(published[key], number);
  published[{kOrdinary, b.linear_index}] = uint32_t(of_block.size());
  tick();
  for (Block* running : running_blocks())
    for (Thread& thread : running->threads)
      if (thread.wait.what == Wait::kCounter) running->scheduler.make_ready(thread);
}

// Waits until a counter has this value. From then on, the thread knows what the releases have made known that the
// counter stands for.
void wait_until_equal(const int* counter, int value) {
  Block& b = block();
  const uintptr_t handle = reinterpret_cast<uintptr_t>(counter);
  find(handle, sizeof(int), sizeof(int), /*is_write=*/false, "wait_until_equal");
  Wait wait = {Wait::kCounter, "wait_until_equal"};
  wait.counter = reinterpret_cast<const int*>(handle - kHandle);
  wait.value = value;
  while (*wait.counter != value) b.scheduler.wait(wait);
  const GlobalClock::Ticks& published = published_with_counter[counter];
  VectorClock& clock = b.current->clock;
  clock.global.learn(published);
  // A release by another thread of the same block orders the two threads as a barrier would.
  if (const auto own = published.find({kOrdinary, b.linear_index}); own != published.end())
    clock.join(releases[b.linear_index][own->second - 1]);
}

std::string describe_counter(const int* counter) {
  const uintptr_t p = reinterpret_cast<uintptr_t>(counter);
  for (const Buffer& buffer : buffers)
    if (p >= buffer.begin && p < buffer.end)
      return format("the counter at byte %zu of a buffer of %zu in global memory", size_t(p - buffer.begin),
                    size_t(buffer.end - buffer.begin));
  return "the counter";
}

}  // namespace fused_attn::emulation
