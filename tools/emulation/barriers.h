// The sixteen named barriers of a block (barrier 0 is sync_threads), and the synchronisation of a warp.
#pragma once
#include <string>
#include <vector>

#include "vector_clock.h"

namespace fused_attn::emulation {

constexpr int kNumBarriers = 16;

class Barriers {
 public:
  void reset(int agents);
  // A warp arrives. If is_sync, it waits for the others.
  void arrive(int id, int threads, bool is_sync, const char* name);
  void check_none_is_open() const;
  std::string describe(int id) const;

 private:
  struct Barrier {
    int arrived = 0;  // threads
    int expected = 0;
    std::vector<int> waiting_warps;
    VectorClock clock;  // what the threads that arrived know
  };
  Barrier barriers_[kNumBarriers];
  int agents_ = 0;
};

void sync_warp();

}  // namespace fused_attn::emulation
