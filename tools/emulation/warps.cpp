#include "warps.h"

#include <cstring>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {
namespace {

// Most calls pass the same literal, so that the addresses tell.
bool is_other(const char* name, const char* other) { return name != other && strcmp(name, other) != 0; }

}  // namespace

void Warps::reset(int warps, int warpgroups) {
  warps_.assign(warps, Meeting{});
  warpgroups_.assign(warpgroups, Meeting{});
}

// The current thread arrives with its operand. All lanes except the last one to arrive wait here.
void** Warps::meet_in_warp(const char* name, void* operand) {
  Block& b = block();
  Meeting& meeting = warps_[b.current->warp];
  if (meeting.num_arrived && is_other(meeting.name, name))
    fail("DIVERGENCE: %s, while %d other lanes of the warp are in %s", name, meeting.num_arrived, meeting.name);
  meeting.name = name;
  meeting.operands[b.current->lane] = operand;
  b.statistics.warp_operations += meeting.num_arrived == 0;
  if (++meeting.num_arrived < kWarpSize) {
    b.scheduler.wait({Wait::kWarp, name, uint32_t(b.current->warp)});
    return nullptr;
  }
  meeting.num_arrived = 0;
  return meeting.operands;
}

void** Warps::meet_in_warpgroup(const char* name, void* operand) {
  Block& b = block();
  const int warpgroup = b.current->warpgroup;
  if ((warpgroup + 1) * kWarpgroupSize > int(b.threads.size()))
    fail("%s: the block has %d threads, so that this warpgroup is incomplete", name, int(b.threads.size()));
  Meeting& meeting = warpgroups_[warpgroup];
  if (meeting.num_arrived && is_other(meeting.name, name))
    fail("DIVERGENCE: %s, while %d other threads of the warpgroup are in %s", name, meeting.num_arrived, meeting.name);
  meeting.name = name;
  meeting.operands[b.current->index % kWarpgroupSize] = operand;
  if (++meeting.num_arrived < kWarpgroupSize) {
    b.scheduler.wait({Wait::kWarpgroup, name, uint32_t(warpgroup)});
    return nullptr;
  }
  meeting.num_arrived = 0;
  return meeting.operands;
}

void Warps::release_warp() {
  Block& b = block();
  Thread* lanes = &b.threads[b.current->warp * kWarpSize];
  for (int i = 0; i < kWarpSize; i++)
    if (&lanes[i] != b.current) b.scheduler.make_ready(lanes[i]);
}

void Warps::release_warpgroup() {
  Block& b = block();
  Thread* threads = &b.threads[b.current->warpgroup * kWarpgroupSize];
  for (int i = 0; i < kWarpgroupSize; i++)
    if (&threads[i] != b.current) b.scheduler.make_ready(threads[i]);
}

}  // namespace fused_attn::emulation
