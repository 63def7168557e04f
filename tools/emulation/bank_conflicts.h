// Counts the cycles that a warp's accesses to shared memory take. There are 32 banks of four bytes, and each bank
// serves one word in a cycle.
//
// The emulation runs the threads of a warp one after another, but on a GPU their accesses are one instruction. Two
// accesses of different lanes belong to the same instruction if they come from the same place of the program, and if
// both lanes have been there equally often.
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
  // Counts one instruction of a warp, given the address of each lane that takes part.
  void add(const uint32_t* addresses, int lanes, uint32_t bytes);
  // Adds the access of the current thread to its instruction, and counts the instruction when all lanes have added
  // theirs. `site` is the place in the program.
  void add_lane(const void* site, uint32_t address, uint32_t bytes);
  // At the end of a block, counts the instructions that only some lanes of a warp have executed.
  void finish();

 private:
  // An instruction of a warp that not all lanes have executed yet.
  struct Instruction {
    uint32_t bytes;
    std::vector<uint32_t> addresses;
  };
  // A place in the program, for one warp.
  struct Site {
    std::vector<int> executed = std::vector<int>(32, 0);  // how often each lane has been at this place
    int counted = 0;  // instructions that have been counted, and removed from `open`
    std::deque<Instruction> open;
  };
  std::map<std::pair<int, const void*>, Site> sites_;
};

}  // namespace fused_attn::emulation
