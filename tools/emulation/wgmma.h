// wgmma: matrix products of a warpgroup, asynchronous, from descriptors of shared memory.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

namespace fused_attn::emulation {

struct Wgmma;  // one instruction in flight

class WgmmaPipelines {
 public:
  void reset(int warpgroups) { pipelines_.assign(warpgroups, Pipeline{}); }

  void fence();
  // a: four registers; null = the descriptor a_descriptor.
  void issue(float* d, int n, bool is_bf16, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
             bool is_a_transposed, bool is_b_transposed, bool accumulate);
  void commit();
  void wait(int groups_left);
  void check_none_is_in_flight() const;

  // From now on, nobody may use what these registers of the current thread hold. None of them may be in flight.
  void forget(float* registers, int count) const;

 private:
  struct Accumulators {
    int n;
    int num_in_flight = 0;
    float* registers[128];   // of each thread: n / 2
    std::vector<float> sum;  // 64 x n
  };
  struct Pipeline {
    bool is_fenced = false;
    uint32_t groups_committed = 0;
    std::vector<std::shared_ptr<Wgmma>> open;
    std::deque<std::vector<std::shared_ptr<Wgmma>>> committed;
    std::unordered_map<float*, Accumulators> accumulators;  // by those of the first thread
  };

  // Checks that the registers still hold the poison that they got when their first instruction was issued.
  void check_untouched(const Accumulators& accumulators, const char* name) const;
  void carry_out(Pipeline& pipeline, Wgmma& wgmma);
  void finish(Pipeline& pipeline, Wgmma& wgmma);
  Pipeline& current();

  std::vector<Pipeline> pipelines_;
};

}  // namespace fused_attn::emulation
