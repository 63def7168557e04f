// wgmma: asynchronous matrix products of a warpgroup. The right factor, and perhaps the left one, lie in shared memory
// and are given by descriptors.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

namespace fused_attn::emulation {

struct Wgmma;  // one instruction in flight

// The products in flight of each warpgroup. All 128 threads of a warpgroup call each function but forget.
class WgmmaPipelines {
 public:
  void reset(int warpgroups) { pipelines_.assign(warpgroups, Pipeline{}); }

  void fence();
  // Issues the product d = a * b, or d += a * b if accumulate; d has n columns. The left factor is either in the four
  // registers `a`, or, if `a` is null, in shared memory at a_descriptor.
  void issue(float* d, int n, bool is_bf16, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
             bool is_a_transposed, bool is_b_transposed, bool accumulate);
  void commit();
  void wait(int groups_left);
  void check_none_is_in_flight() const;

  // The primitive forget_registers of the current thread: fills the registers with NaN. Fails if one of them is an
  // accumulator in flight.
  void forget(float* registers, int count) const;

 private:
  // Accumulators of at least one product in flight. The kernel's registers hold NaN until the products are complete;
  // the sums are here.
  struct Accumulators {
    int n;
    int num_in_flight = 0;
    float* registers[128];   // registers[t]: the n / 2 accumulators of thread t
    std::vector<float> sum;  // 64 x n
  };
  struct Pipeline {
    bool is_fenced = false;  // wgmma_fence has been called since the last commit or wait
    uint32_t groups_committed = 0;
    std::vector<std::shared_ptr<Wgmma>> open;  // products since the last commit
    std::deque<std::vector<std::shared_ptr<Wgmma>>> committed;
    std::unordered_map<float*, Accumulators> accumulators;  // the key is the address of the first thread's ones
  };

  // Fails if the kernel has written to accumulators in flight: they no longer hold the NaN that they got when their
  // first product was issued.
  void check_untouched(const Accumulators& accumulators, const char* name) const;
  // carry_out computes a product, and finish makes its result visible in the registers of the kernel.
  void carry_out(Pipeline& pipeline, Wgmma& wgmma);
  void finish(Pipeline& pipeline, Wgmma& wgmma);
  Pipeline& current();

  std::vector<Pipeline> pipelines_;
};

}  // namespace fused_attn::emulation
