#include "copy_async.h"

#include <cstring>
#include <utility>

#include "block.h"
#include "errors.h"
#include "global_memory.h"

namespace fused_attn::emulation {
namespace {

constexpr uint32_t kBytes = 16;
constexpr char kName[] = "copy_async_16";

// Copies the bytes of a copy that copy_async_16 has issued.
void carry_out(const CopyAsync& copy) {
  char* destination = block().shared.at(copy.destination, kBytes, kBytes, kName);
  if (copy.source)
    memcpy(destination, copy.source, kBytes);
  else
    memset(destination, 0, kBytes);
}

}  // namespace

// Until the thread has waited for the copy, every access to its destination is a race, and the destination holds NaN if
// the copy is late. The source must be aligned in any case: PTX makes no exception for a copy that reads nothing.
void copy_async_16(uint32_t destination, const void* source, bool is_inside) {
  Block& b = block();
  check_global_alignment(source, kBytes, kName);
  b.statistics.async_copies++;
  write_shared(destination, kBytes, kName);
  CopyAsync copy = {destination, is_inside ? global_read(source, kBytes, kBytes, kName) : nullptr, false};
  if (b.completes_late()) {
    if (b.options.poison) b.shared.fill_with_poison(destination, kBytes);
  } else {
    carry_out(copy);
    copy.is_done = true;
  }
  if (b.options.race_detection) b.races.begin_copy(destination - kSharedBase, kBytes);
  b.current->copies.open.push_back(copy);
}

void copy_async_commit() {
  CopyAsyncGroups& copies = block().current->copies;
  copies.committed.push_back(std::exchange(copies.open, {}));
}

void copy_async_wait(int groups_left) {
  Block& b = block();
  auto& committed = b.current->copies.committed;
  for (; int(committed.size()) > groups_left; committed.pop_front()) {
    for (const CopyAsync& copy : committed.front()) {
      if (!copy.is_done) carry_out(copy);
      if (b.options.race_detection) b.races.end_copy(copy.destination - kSharedBase, kBytes, b.current->epoch());
    }
  }
}

void check_no_copies_left(const Thread& thread) {
  bool is_any_left = !thread.copies.open.empty();
  for (const auto& group : thread.copies.committed) is_any_left |= !group.empty();
  if (is_any_left) fail("the thread ended before its copy_async_16 were waited for");
}

}  // namespace fused_attn::emulation
