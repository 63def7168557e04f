#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "block.h"
#include "errors.h"
#include "float16.h"
#include "matrix_descriptor.h"

namespace fused_attn::emulation {

constexpr int kM = 64;
constexpr int kK = 16;
constexpr int kMaxN = 256;
constexpr uint32_t kChunkBytes = 16;

struct Wgmma {
  int n;
  bool is_bf16, is_a_in_registers, is_a_transposed, is_b_transposed, accumulate;
  uint64_t a_descriptor, b_descriptor;
  const uint32_t* a_registers[kWarpgroupSize];
  uint32_t a_values[kWarpgroupSize][4];  // their values when the instruction was issued
  float* accumulators;                   // those of the first thread, the key of Pipeline::accumulators
  bool is_done;
};

namespace {

// What one thread has passed to the instruction.
struct Operand {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

// Row and column of accumulator i of a thread of the warpgroup.
int row_of(int thread, int i) { return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i >> 1 & 1); }
int column_of(int thread, int i) { return 8 * (i >> 2) + 2 * (thread % 4) + (i & 1); }

const char* name_of(const Wgmma& wgmma) { return wgmma.is_a_in_registers ? "wgmma_rs" : "wgmma_ss"; }

// What all threads of a warpgroup know: for each agent, the least tick that one of the threads knows. The class
// computes this tick when somebody asks for the agent, because most agents are never asked for.
class CommonKnowledge {
 public:
  CommonKnowledge(const Thread* threads, int agents) : threads_(threads) {
    for (auto& of_plane : least_) of_plane.resize(agents);
  }

  uint32_t operator()(Plane plane, int agent) const {
    Least& least = least_[plane][agent];
    if (!least.is_known) {
      least = {true, UINT32_MAX};
      for (int i = 0; i < kWarpgroupSize; i++) least.tick = std::min(least.tick, threads_[i].clock.get(plane, agent));
    }
    return least.tick;
  }

 private:
  struct Least {
    bool is_known = false;
    uint32_t tick = 0;
  };
  const Thread* threads_;
  mutable std::vector<Least> least_[2];  // [plane][agent]
};

}  // namespace

WgmmaPipelines::Pipeline& WgmmaPipelines::current() { return pipelines_[block().current->warpgroup]; }

void WgmmaPipelines::fence() {
  if (block().warps.meet_in_warpgroup("wgmma_fence", nullptr) == nullptr) return;
  current().is_fenced = true;
  block().warps.release_warpgroup();
}

// The last thread of the warpgroup to arrive does the work of all threads:
//
//   - It checks that the operands of all threads belong to one instruction.
//   - It checks the reads of both factors for races.
//   - It copies the accumulators, and fills the kernel's registers with NaN until the product is complete.
//   - It puts the product into the pipeline. The product is computed at once, or in wait().
void WgmmaPipelines::issue(float* d, int n, bool is_bf16, const uint32_t* a, uint64_t a_descriptor,
                           uint64_t b_descriptor, bool is_a_transposed, bool is_b_transposed, bool accumulate) {
  Block& b = block();
  Operand own = {d, a, a_descriptor, b_descriptor, accumulate};
  void** operands = b.warps.meet_in_warpgroup(a ? "wgmma_rs" : "wgmma_ss", &own);
  if (operands == nullptr) return;
  b.statistics.wgmma++;
  Pipeline& pipeline = current();
  auto wgmma = std::make_shared<Wgmma>();
  *wgmma = {n,  is_bf16, a != nullptr, is_a_transposed, is_b_transposed, accumulate, a_descriptor, b_descriptor, {},
            {}, nullptr, false};
  const char* name = name_of(*wgmma);
  Operand* all[kWarpgroupSize];
  for (int i = 0; i < kWarpgroupSize; i++) {
    all[i] = static_cast<Operand*>(operands[i]);
    if (all[i]->a_descriptor != a_descriptor || all[i]->b_descriptor != b_descriptor ||
        all[i]->accumulate != accumulate)
      fail("%s: the threads of the warpgroup have different descriptors, or only some of them accumulate", name);
    if (a) {
      wgmma->a_registers[i] = all[i]->a;
      memcpy(wgmma->a_values[i], all[i]->a, sizeof(wgmma->a_values[i]));
    }
  }
  if (!pipeline.is_fenced) fail("%s: no wgmma_fence since the last commit or wait", name);

  // A race exists if one of the threads does not know of a write to a factor.
  const MatrixDescriptor left(a_descriptor), right(b_descriptor);
  right.check(name);
  if (!a) left.check(name);
  const CommonKnowledge known(&b.threads[b.current->warpgroup * kWarpgroupSize], b.agents.count());
  const Epoch epoch = {uint16_t(b.agents.wgmma(b.current->warpgroup)), true, pipeline.groups_committed + 1};
  const auto check_read = [&](uint32_t address, int, int) {
    b.shared.at(address, kChunkBytes, kChunkBytes, name);
    if (b.options.race_detection) b.races.read(address - kSharedBase, kChunkBytes, epoch, known, name);
  };
  right.for_each_chunk(n, is_b_transposed, check_read);
  if (!a) left.for_each_chunk(kM, is_a_transposed, check_read);

  wgmma->accumulators = all[0]->d;
  Accumulators& accumulators = pipeline.accumulators[wgmma->accumulators];
  if (accumulators.num_in_flight == 0) {
    accumulators.n = n;
    accumulators.sum.resize(kM * n);
    for (int thread = 0; thread < kWarpgroupSize; thread++) {
      accumulators.registers[thread] = all[thread]->d;
      for (int i = 0; i < n / 2; i++) {
        if (accumulate && b.options.poison && bits_of(all[thread]->d[i]) == kPoison)
          fail("%s: accumulates onto register %d of thread %d, which was forgotten or never written", name, i,
               b.current->warpgroup * kWarpgroupSize + thread);
        accumulators.sum[row_of(thread, i) * n + column_of(thread, i)] = all[thread]->d[i];
      }
    }
  } else {
    if (accumulators.n != n)
      fail("%s: of width %d on accumulators on which one of width %d is in flight", name, n, accumulators.n);
    check_untouched(accumulators, name);
  }
  accumulators.num_in_flight++;
  if (b.options.poison)
    for (int thread = 0; thread < kWarpgroupSize; thread++)
      for (int i = 0; i < n / 2; i++) memcpy(&all[thread]->d[i], &kPoison, sizeof(float));

  // Products complete in order: a product completes early only if all products before it are complete.
  bool is_early = !b.completes_late();
  for (const auto& group : pipeline.committed)
    for (const auto& earlier : group) is_early &= earlier->is_done;
  for (const auto& earlier : pipeline.open) is_early &= earlier->is_done;
  if (is_early) carry_out(pipeline, *wgmma);
  pipeline.open.push_back(std::move(wgmma));
  b.warps.release_warpgroup();
}

void WgmmaPipelines::check_untouched(const Accumulators& accumulators, const char* name) const {
  if (!block().options.poison) return;
  const int first = block().current->warpgroup * kWarpgroupSize;
  for (int thread = 0; thread < kWarpgroupSize; thread++)
    for (int i = 0; i < accumulators.n / 2; i++)
      if (bits_of(accumulators.registers[thread][i]) != kPoison)
        fail("%s: thread %d wrote accumulator %d while it was in flight", name, first + thread, i);
}

// Computes a product: reads both factors, and adds to the sums of the accumulators.
void WgmmaPipelines::carry_out(Pipeline& pipeline, Wgmma& wgmma) {
  static float left[kM][kK], right[kK][kMaxN];
  const char* name = name_of(wgmma);
  const auto element = [&](const char* p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return from_16_bits(bits, wgmma.is_bf16);
  };
  const auto chunk_at = [&](uint32_t address) { return block().shared.at(address, kChunkBytes, kChunkBytes, name); };
  MatrixDescriptor(wgmma.b_descriptor)
      .for_each_chunk(wgmma.n, wgmma.is_b_transposed, [&](uint32_t address, int n, int k) {
        const char* chunk = chunk_at(address);
        for (int i = 0; i < 8; i++)
          (wgmma.is_b_transposed ? right[k][n + i] : right[k + i][n]) = element(chunk + 2 * i);
      });
  if (wgmma.is_a_in_registers) {
    for (int thread = 0; thread < kWarpgroupSize; thread++)
      for (int i = 0; i < 8; i++) {  // two elements in each of four registers, laid out as accumulators of width 16
        const uint32_t pair = wgmma.a_values[thread][i / 2];
        left[row_of(thread, i)][column_of(thread, i)] = from_16_bits(uint16_t(pair >> 16 * (i % 2)), wgmma.is_bf16);
      }
  } else {
    MatrixDescriptor(wgmma.a_descriptor).for_each_chunk(kM, wgmma.is_a_transposed, [&](uint32_t address, int m, int k) {
      const char* chunk = chunk_at(address);
      for (int i = 0; i < 8; i++) (wgmma.is_a_transposed ? left[m + i][k] : left[m][k + i]) = element(chunk + 2 * i);
    });
  }
  float* sum = pipeline.accumulators.at(wgmma.accumulators).sum.data();
  for (int m = 0; m < kM; m++) {
    float* row = sum + m * wgmma.n;
    if (!wgmma.accumulate) std::fill(row, row + wgmma.n, 0.0f);
    for (int k = 0; k < kK; k++)
      for (int n = 0; n < wgmma.n; n++) row[n] += left[m][k] * right[k][n];
  }
  wgmma.is_done = true;
}

void WgmmaPipelines::commit() {
  if (block().warps.meet_in_warpgroup("wgmma_commit", nullptr) == nullptr) return;
  Pipeline& pipeline = current();
  pipeline.committed.push_back(std::exchange(pipeline.open, {}));
  pipeline.groups_committed++;
  pipeline.is_fenced = false;
  block().warps.release_warpgroup();
}

// Completes a product that wait() waits for. After the last product in flight on the same accumulators, the function
// writes the sums to the kernel's registers.
void WgmmaPipelines::finish(Pipeline& pipeline, Wgmma& wgmma) {
  const int first = block().current->warpgroup * kWarpgroupSize;
  if (wgmma.is_a_in_registers)
    for (int thread = 0; thread < kWarpgroupSize; thread++)
      if (memcmp(wgmma.a_values[thread], wgmma.a_registers[thread], sizeof(wgmma.a_values[thread])) != 0)
        fail("wgmma_rs: thread %d changed the registers of a while it was in flight", first + thread);
  if (!wgmma.is_done) carry_out(pipeline, wgmma);
  Accumulators& accumulators = pipeline.accumulators.at(wgmma.accumulators);
  if (--accumulators.num_in_flight) return;
  check_untouched(accumulators, name_of(wgmma));
  for (int thread = 0; thread < kWarpgroupSize; thread++)
    for (int i = 0; i < accumulators.n / 2; i++)
      accumulators.registers[thread][i] = accumulators.sum[row_of(thread, i) * accumulators.n + column_of(thread, i)];
  pipeline.accumulators.erase(wgmma.accumulators);
}

// Completes all groups except the last groups_left that were committed. The clock of each thread then learns how many
// groups are complete: with strict_wgmma, only for the part of the products that the thread's own warp has.
void WgmmaPipelines::wait(int groups_left) {
  Block& b = block();
  if (b.warps.meet_in_warpgroup("wgmma_wait", nullptr) == nullptr) return;
  Pipeline& pipeline = current();
  for (; int(pipeline.committed.size()) > groups_left; pipeline.committed.pop_front())
    for (const auto& wgmma : pipeline.committed.front()) finish(pipeline, *wgmma);
  pipeline.is_fenced = false;  // the registers may be touched now
  if (b.options.race_detection) {
    const uint32_t groups_complete = pipeline.groups_committed - uint32_t(pipeline.committed.size());
    const int warpgroup = b.current->warpgroup;
    for (int thread = 0; thread < kWarpgroupSize; thread++)
      for (int warp = 0; warp < kWarpsPerWarpgroup; warp++)
        if (!b.options.strict_wgmma || warp == thread / kWarpSize)
          b.threads[warpgroup * kWarpgroupSize + thread].clock.learn(b.agents.wgmma(warpgroup) + warp, groups_complete);
  }
  b.warps.release_warpgroup();
}

void WgmmaPipelines::forget(float* registers, int count) const {
  const Thread& thread = *block().current;
  for (const auto& [first, accumulators] : pipelines_[thread.warpgroup].accumulators) {
    const float* in_flight = accumulators.registers[thread.index % kWarpgroupSize];
    if (registers < in_flight + accumulators.n / 2 && in_flight < registers + count)
      fail("forget_registers: of accumulators that are in flight");
  }
  if (!block().options.poison) return;
  for (int i = 0; i < count; i++) memcpy(&registers[i], &kPoison, sizeof(float));
}

void WgmmaPipelines::check_none_is_in_flight() const {
  for (const Pipeline& pipeline : pipelines_)
    if (!pipeline.open.empty() || !pipeline.committed.empty()) fail("the block ended with wgmma in flight");
}

}  // namespace fused_attn::emulation
