#include "global_memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <vector>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {
namespace {

constexpr uintptr_t kHandle = uintptr_t(1) << 62;
constexpr uint32_t kManyPolls = 1 << 20;  // of one address in a row, before it is taken for a loop that never ends

// The last write to four bytes during a launch, which is enough to tell most cases of blocks that get into each other's
// way. What is missed is a write after another block's read.
struct LastWrite {
  int32_t block = -1;
  bool is_atomic = false;
};

struct Buffer {
  uintptr_t begin, end;  // the host's
  bool is_writable;
  std::vector<LastWrite> last_writes;
};

std::vector<Buffer> buffers;
std::map<const int*, std::set<int>> published_with_counter;

// The buffer with these bytes; buffers may overlap, being views of one tensor.
Buffer& find(uintptr_t handle, size_t bytes, size_t alignment, bool is_write, const char* what) {
  if (handle % alignment) fail("%s: global address %#zx is not a multiple of %zu", what, size_t(handle), alignment);
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

// Another block's write that the current one has no order with, or null.
const LastWrite* unordered_write(const LastWrite& last) {
  return last.block >= 0 && last.block != block().linear_index && !block().known_blocks.count(last.block) ? &last
                                                                                                          : nullptr;
}

template <class T>
T add_to(T* handle, T value, const char* what) {
  char* p = global_write(handle, sizeof(T), sizeof(T), what, Write::kAtomic);
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
  for (Buffer& buffer : buffers)
    if (buffer.is_writable) buffer.last_writes.assign((buffer.end - buffer.begin + 3) / 4 + 1, LastWrite{});
}

const char* global_read(const void* handle, size_t bytes, size_t alignment, const char* what) {
  Block& b = block();
  const uintptr_t address = reinterpret_cast<uintptr_t>(handle);
  Buffer& buffer = find(address, bytes, alignment, false, what);
  if (b.current) {
    Thread& thread = *b.current;
    thread.polls = handle == thread.polled ? thread.polls + 1 : 0;
    thread.polled = handle;
    if (thread.polls > kManyPolls)
      fail(
          "%s: the thread reads one address in global memory again and again. Nobody else runs meanwhile; to wait "
          "for another block there is wait_until_equal",
          what);
  }
  const uintptr_t p = address - kHandle;
  if (buffer.is_writable && b.options.race_detection)
    for (size_t i = (p - buffer.begin) / 4; i <= (p + bytes - 1 - buffer.begin) / 4; i++)
      if (const LastWrite* last = unordered_write(buffer.last_writes[i]))
        fail("RACE: %s reads global memory that block number %d of the same launch wrote", what, last->block);
  return reinterpret_cast<const char*>(p);
}

char* global_write(void* handle, size_t bytes, size_t alignment, const char* what, Write kind) {
  Block& b = block();
  const uintptr_t address = reinterpret_cast<uintptr_t>(handle);
  Buffer& buffer = find(address, bytes, alignment, true, what);
  const uintptr_t p = address - kHandle;
  const bool is_atomic = kind == Write::kAtomic;
  if (b.options.race_detection)
    for (size_t i = (p - buffer.begin) / 4; i <= (p + bytes - 1 - buffer.begin) / 4; i++) {
      LastWrite& last = buffer.last_writes[i];
      if (!(is_atomic && last.is_atomic) && unordered_write(last))
        fail("RACE: %s to global memory that block number %d of the same launch writes too", what, last.block);
      last = {b.linear_index, is_atomic};
    }
  return reinterpret_cast<char*>(p);
}

int atomic_fetch_add(int* counter, int value) {
  const int before = add_to(counter, value, "atomic_fetch_add");
  block().scheduler.yield();  // such a counter deals out work: let others have their share
  return before;
}

void atomic_add(float* sum, float value) { add_to(sum, value, "atomic_add"); }

void add_release(int* counter, int value) {
  const Block& b = block();
  add_to(counter, value, "add_release");
  std::set<int>& published = published_with_counter[counter];
  published.insert(b.known_blocks.begin(), b.known_blocks.end());
  published.insert(b.linear_index);
  for (Block* running : running_blocks())
    for (Thread& thread : running->threads)
      if (thread.wait.what == Wait::kCounter) running->scheduler.make_ready(thread);
}

void wait_until_equal(const int* counter, int value) {
  Block& b = block();
  const uintptr_t handle = reinterpret_cast<uintptr_t>(counter);
  find(handle, sizeof(int), sizeof(int), false, "wait_until_equal");
  Wait wait = {Wait::kCounter, "wait_until_equal"};
  wait.counter = reinterpret_cast<const int*>(handle - kHandle);
  wait.value = value;
  while (*wait.counter != value) b.scheduler.wait(wait);
  const std::set<int>& published = published_with_counter[counter];
  b.known_blocks.insert(published.begin(), published.end());
}

}  // namespace fused_attn::emulation
