// mbarriers: barriers in shared memory. In each phase, they count arrivals of threads and bytes of asynchronous copies.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>

#include "vector_clock.h"

namespace fused_attn::emulation {

// The mbarriers of the current block of threads, by address.
class Mbarriers {
 public:
  void reset() { mbarriers_.clear(); }

  // The primitives, for the current thread.
  void init(uint32_t address, int arrivals);
  void fence_init();
  void arrive(uint32_t address, uint32_t expected_bytes);
  void wait(uint32_t address, uint32_t parity);

  // begin_copy: the current thread issues copy number `tick` of the block, which will complete on this mbarrier.
  // Returns the agent of the copy.
  // complete_copy: `bytes` bytes of the copy have arrived. A thread that waits for the mbarrier joins `clock`.
  int begin_copy(uint32_t address, uint32_t tick);
  void complete_copy(uint32_t address, uint32_t bytes, const VectorClock& clock);

  // Fails if a block ends while an mbarrier expects bytes.
  void check_no_bytes_are_missing() const;
  // Fails if a block has ended and no thread has waited for some copy. On a GPU, such a copy may still write to the
  // block's shared memory when this memory belongs to another block.
  void check_copies_were_waited_for() const;
  std::string describe(uint32_t address) const;

 private:
  struct Mbarrier {
    int expected = 0;           // arrivals a phase
    int pending = 0;            // arrivals that the current phase still lacks
    int64_t missing_bytes = 0;  // bytes that the current phase still lacks
    uint32_t phase = 0;         // how many phases are complete
    VectorClock arriving;       // what the threads know that arrived in the current phase
    VectorClock completed;      // what the threads know that arrived in the last complete phase
    int agent = 0;              // the agent of copies that complete on this mbarrier
    uint32_t last_copy = 0;     // the number of the last one; 0 = none
    int init_thread = 0;        // thread that called mbarrier_init, at init_tick of its clock
    uint32_t init_tick = 0;
    uint32_t fence_tick = 0;  // the tick of init_thread when it fenced its inits; 0 = not yet
  };

  // The mbarrier at an address; fails if it is not initialised, or if nothing orders the current thread after
  // mbarrier_init.
  Mbarrier& find(uint32_t address, const char* what);
  // Begins the next phase and wakes the waiting threads, if neither arrivals nor bytes are missing.
  void complete_phase_if_due(uint32_t address, Mbarrier& mbarrier);

  std::unordered_map<uint32_t, Mbarrier> mbarriers_;
};

}  // namespace fused_attn::emulation
