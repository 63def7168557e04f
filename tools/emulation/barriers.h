// The sixteen named barriers of a block (barrier 0 is sync_threads), and the synchronisation of a warp.
#pragma once
#include <string>
#include <vector>

#include "vector_clock.h"

namespace fused_attn::emulation {

constexpr int kNumBarriers = 16;

// The named barriers of the current block of threads.
class Barriers {
 public:
  // Makes all barriers fresh, at the start of a block. `agents` is the size of vector clocks.
  void reset(int agents);
  // Each lane of a warp calls this. The warp arrives at barrier `id`, at which `threads` threads meet. If is_sync, the
  // lanes wait until all of these threads have arrived. `name` is the primitive's name, for reports.
  void arrive(int id, int threads, bool is_sync, const char* name);
  // Fails if some threads have arrived at a barrier, and others have not, when the block ends.
  void check_none_is_open() const;
  std::string describe(int id) const;

 private:
  struct Barrier {
    int arrived = 0;                 // threads that have arrived
    int expected = 0;                // threads that meet at the barrier
    std::vector<int> waiting_warps;  // warps that have arrived and wait
    VectorClock clock;               // the clocks of the threads that have arrived, joined
  };
  Barrier barriers_[kNumBarriers];
  int agents_ = 0;
};

// Each lane of a warp calls this, and waits for the other lanes. Afterwards, the vector clock of every lane contains
// what any of the lanes knew before.
void sync_warp();

}  // namespace fused_attn::emulation
