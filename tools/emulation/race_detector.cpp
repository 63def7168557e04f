#include "race_detector.h"

#include "errors.h"

namespace fused_attn::emulation {

// The name of an agent in reports.
std::string Agents::name(int agent) const {
  if (agent < threads) return format("thread %d (warp %d)", agent, agent / 32);
  if (is_wgmma(agent)) return format("wgmma of warpgroup %d", (agent - threads) / kWarpsPerWarpgroup);
  if (agent < mbarrier_loads(0)) return format("a bulk store of warp %d", agent - bulk_stores(0));
  return format("a TMA load (mbarrier number %d)", agent - mbarrier_loads(0));
}

void RaceDetector::reset(uint32_t shared_bytes, const Agents& agents) {
  agents_ = agents;
  cells_.assign((shared_bytes + 3) / 4, Cell{});
  more_reads_.clear();
  free_more_reads_.clear();
}

void RaceDetector::begin_copy(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; i++) cells_[i].is_copied_to = true;
}

void RaceDetector::end_copy(uint32_t offset, uint32_t bytes, Epoch access) {
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; i++) {
    cells_[i].is_copied_to = false;
    cells_[i].write = access;
  }
}

void RaceDetector::protect_mbarrier(uint32_t offset) {
  cells_[offset / 4].is_mbarrier = cells_[offset / 4 + 1].is_mbarrier = true;
}

// Remembers a read of a cell. A cell has room for kInlineReads readers. Further readers get an entry of more_reads_,
// which has one tick for each agent.
void RaceDetector::add_reader(Cell& cell, const Epoch& access) {
  for (int r = 0; r < cell.num_reads; r++)
    if (cell.reads[r].agent == access.agent) {
      cell.reads[r] = access;
      return;
    }
  if (cell.num_reads < kInlineReads) {
    cell.reads[cell.num_reads++] = access;
    return;
  }
  if (cell.more_reads < 0) {
    if (free_more_reads_.empty()) {
      free_more_reads_.push_back(int32_t(more_reads_.size()));
      more_reads_.emplace_back(agents_.count(), 0);
    }
    cell.more_reads = free_more_reads_.back();
    free_more_reads_.pop_back();
  }
  more_reads_[cell.more_reads][access.agent] = access.tick;
}

void RaceDetector::report(uint32_t cell, const char* what, const char* how, const Epoch& earlier) const {
  fail("RACE: %s at shared offset %u %s %s", what, cell * 4, how, agents_.name(earlier.agent).c_str());
}

}  // namespace fused_attn::emulation
