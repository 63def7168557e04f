// Finds races in shared memory: two accesses that nothing orders, of which one is a write. A race is found even if the
// accesses happen to run in the right order.
//
// An agent is whatever can access memory by itself:
//
//   - each thread
//   - the wgmma pipeline of a warpgroup: four agents, because a warp that waits learns about its own part only
//   - the bulk stores of each warp
//   - the loads that complete on each mbarrier
//
// Every four bytes of shared memory remember their last writer and all readers since that write, each with a tick of
// its agent's clock. An access is a race if the vector clock of the accessing agent has not reached such a tick. If
// ordinary instructions have written, an access by the async proxy (TMA, wgmma) needs the tick in the fenced plane
// (vector_clock.h).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "vector_clock.h"

namespace fused_attn::emulation {

constexpr int kWarpsPerWarpgroup = 4;
constexpr int kMaxMbarriers = 48;

// The numbers of agents of a block: first threads, then wgmma pipelines, bulk stores, and loads of mbarriers.
struct Agents {
  int threads = 0;
  int warps = 0;
  int warpgroups = 0;

  int wgmma(int warpgroup) const { return threads + kWarpsPerWarpgroup * warpgroup; }  // the first of four
  bool is_wgmma(int agent) const { return agent >= threads && agent < wgmma(warpgroups); }
  int bulk_stores(int warp) const { return wgmma(warpgroups) + warp; }
  int mbarrier_loads(int mbarrier) const { return bulk_stores(warps) + mbarrier; }
  int count() const { return mbarrier_loads(kMaxMbarriers); }
  std::string name(int agent) const;
};

// An access: which agent made it, at which tick of its clock.
struct Epoch {
  uint16_t agent;
  bool is_async;  // an access by the async proxy
  uint32_t tick;
};

class RaceDetector {
 public:
  void reset(uint32_t shared_bytes, const Agents& agents);

  // Check an access, and remember it. `known(plane, agent)` returns the tick of `agent` up to which the accessing agent
  // knows. Offsets count from the start of shared memory. `what` names the primitive in reports.
  template <class Known>
  void read(uint32_t offset, uint32_t bytes, Epoch access, const Known& known, const char* what);
  template <class Known>
  void write(uint32_t offset, uint32_t bytes, Epoch access, const Known& known, const char* what);

  // Between these two calls, a copy in flight writes the bytes, and any access to them is a fault.
  void begin_copy(uint32_t offset, uint32_t bytes);
  void end_copy(uint32_t offset, uint32_t bytes, Epoch access);

  // From now on, the eight bytes hold an mbarrier, and only mbarrier operations may access them.
  void protect_mbarrier(uint32_t offset);

 private:
  static constexpr uint16_t kNobody = 0xffff;  // agent of a cell that nobody has written
  static constexpr int kInlineReads = 4;       // most cells have few readers, which need no other memory

  struct Cell {  // four bytes of shared memory
    Epoch write{kNobody, /*is_async=*/false, 0};
    Epoch reads[kInlineReads];
    uint8_t num_reads = 0;
    bool is_copied_to = false;
    bool is_mbarrier = false;
    int32_t more_reads = -1;  // index into more_reads_, which has further readers
  };

  // Whether an earlier access comes before the current one, in a plane of the clocks.
  template <class Known>
  bool is_ordered(const Epoch& earlier, Plane plane, const Known& known) const;
  // Fails if the access races with the last write of the cell.
  template <class Known>
  void check_after_write(const Cell& cell, uint32_t index, const Epoch& access, const Known& known, bool is_read,
                         const char* what) const;
  void add_reader(Cell& cell, const Epoch& access);
  [[noreturn]] void report(uint32_t cell, const char* what, const char* how, const Epoch& earlier) const;

  Agents agents_;
  std::vector<Cell> cells_;
  std::vector<std::vector<uint32_t>> more_reads_;  // [index][agent]: tick of the last read; 0 = none
  std::vector<int32_t> free_more_reads_;           // indices of more_reads_ that no cell uses
};

template <class Known>
bool RaceDetector::is_ordered(const Epoch& earlier, Plane plane, const Known& known) const {
  const int agents = agents_.is_wgmma(earlier.agent) ? kWarpsPerWarpgroup : 1;
  for (int i = 0; i < agents; i++)
    if (known(plane, earlier.agent + i) < earlier.tick) return false;
  return true;
}

template <class Known>
void RaceDetector::check_after_write(const Cell& cell, uint32_t index, const Epoch& access, const Known& known,
                                     bool is_read, const char* what) const {
  if (cell.is_copied_to) report(index, what, "touches the destination of a copy in flight, issued by", cell.write);
  if (cell.is_mbarrier) report(index, what, "touches an mbarrier, initialised by", cell.write);
  if (cell.write.agent == kNobody || cell.write.agent == access.agent) return;
  const bool needs_fence = access.is_async && !cell.write.is_async;
  if (is_ordered(cell.write, needs_fence ? kFenced : kOrdinary, known)) return;
  if (needs_fence && is_ordered(cell.write, kOrdinary, known))
    report(index, what, "is by the async proxy, and no fence_async_proxy lies between it and the write of", cell.write);
  report(index, what, is_read ? "reads what is not ordered after the write of" : "is not ordered after the write of",
         cell.write);
}

template <class Known>
void RaceDetector::read(uint32_t offset, uint32_t bytes, Epoch access, const Known& known, const char* what) {
  for (uint32_t i = offset / 4, last = (offset + bytes - 1) / 4; i <= last; i++) {
    check_after_write(cells_[i], i, access, known, /*is_read=*/true, what);
    add_reader(cells_[i], access);
  }
}

template <class Known>
void RaceDetector::write(uint32_t offset, uint32_t bytes, Epoch access, const Known& known, const char* what) {
  for (uint32_t i = offset / 4, last = (offset + bytes - 1) / 4; i <= last; i++) {
    Cell& cell = cells_[i];
    check_after_write(cell, i, access, known, /*is_read=*/false, what);
    for (int r = 0; r < cell.num_reads; r++)
      if (cell.reads[r].agent != access.agent && !is_ordered(cell.reads[r], kOrdinary, known))
        report(i, what, "is not ordered after the read of", cell.reads[r]);
    if (cell.more_reads >= 0) {
      std::vector<uint32_t>& ticks = more_reads_[cell.more_reads];
      for (int agent = 0; agent < agents_.count(); agent++) {
        const Epoch earlier{uint16_t(agent), /*is_async=*/false, ticks[agent]};
        if (ticks[agent] && agent != access.agent && !is_ordered(earlier, kOrdinary, known))
          report(i, what, "is not ordered after the read of", earlier);
        ticks[agent] = 0;
      }
      free_more_reads_.push_back(cell.more_reads);
      cell.more_reads = -1;
    }
    cell.num_reads = 0;
    cell.write = access;
  }
}

}  // namespace fused_attn::emulation
