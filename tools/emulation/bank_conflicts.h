// Counts the cycles that a warp's accesses to shared memory take: its 32 banks of four bytes serve one word each per cycle.
//
// Threads run apart here. What belongs to one instruction of a warp is told by where in the program each lane stands, and how
// often it has been there.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

namespace fused_attn::emulation {

class BankConflicts {
 public:
  void reset() { sites_.clear(); }
  // A whole instruction: one address for each lane that takes part.
  void add(const uint32_t* addresses, int lanes, uint32_t bytes);
  // The current thread's part of an instruction.
  void add_lane(const void* site, uint32_t address, uint32_t bytes);
  // Counts what only a part of a warp executed.
  void finish();

 private:
  struct Instruction {
    uint32_t bytes;
    std::vector<uint32_t> addresses;
  };
  struct Site {                                           // of one warp
    std::vector<int> executed = std::vector<int>(32, 0);  // by each lane
    int counted = 0;                                      // instructions that have left `open`
    std::deque<Instruction> open;
  };
  std::map<std::pair<int, const void*>, Site> sites_;
};

}  // namespace fused_attn::emulation
