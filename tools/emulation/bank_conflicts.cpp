#include "bank_conflicts.h"

#include <algorithm>
#include <set>

#include "block.h"

namespace fused_attn::emulation {
namespace {

constexpr int kBanks = 32;
constexpr int kWord = 4;

}  // namespace

void BankConflicts::add(const uint32_t* addresses, int lanes, uint32_t bytes) {
  Statistics& statistics = block().statistics;
  statistics.shared_accesses++;
  // The hardware takes as many lanes at once as 128 bytes need.
  const int lanes_at_once = std::min<int>(kWarpSize, kBanks * kWord / bytes);
  for (int first = 0; first < lanes; first += lanes_at_once) {
    std::set<uint32_t> words_of_bank[kBanks];
    for (int lane = first; lane < std::min(lanes, first + lanes_at_once); lane++)
      for (uint32_t at = addresses[lane] / kWord; at <= (addresses[lane] + bytes - 1) / kWord; at++)
        words_of_bank[at % kBanks].insert(at);
    size_t cycles = 1;
    for (const auto& words : words_of_bank) cycles = std::max(cycles, words.size());
    statistics.shared_wavefronts += cycles;
    statistics.ideal_wavefronts++;
  }
}

// executed[lane] says how often the current lane has been at this place before. So the access belongs to the warp's
// instruction of that number at this place. When all lanes have executed an instruction, the function counts it.
void BankConflicts::add_lane(const void* site, uint32_t address, uint32_t bytes) {
  const Thread& thread = *block().current;
  Site& here = sites_[{thread.warp, site}];
  const int index = here.executed[thread.lane]++ - here.counted;
  while (int(here.open.size()) <= index) here.open.push_back({bytes, {}});
  here.open[index].addresses.push_back(address);
  while (!here.open.empty() && here.open.front().addresses.size() == kWarpSize) {
    add(here.open.front().addresses.data(), kWarpSize, bytes);
    here.open.pop_front();
    here.counted++;
  }
}

void BankConflicts::finish() {
  for (auto& [key, site] : sites_)
    for (const Instruction& instruction : site.open)
      if (!instruction.addresses.empty())
        add(instruction.addresses.data(), int(instruction.addresses.size()), instruction.bytes);
  sites_.clear();
}

}  // namespace fused_attn::emulation
