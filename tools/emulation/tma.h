// TMA: asynchronous copies between global and shared memory, of boxes of tensors and of contiguous memory.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "tensor_map.h"

namespace fused_attn::emulation {

struct Thread;

// A TMA operation that has been issued. A bulk store has two steps, because a thread can wait for each.
struct TmaJob {
  std::function<void()> read_source;  // reads the source of a bulk store from shared memory; null once done
  std::function<void()> carry_out;    // does the rest; null once done

  void read() {
    if (const auto f = std::exchange(read_source, nullptr)) f();
  }
  void complete() {
    read();
    if (const auto f = std::exchange(carry_out, nullptr)) f();
  }
};

// The TMA operations of all threads of the block that are not complete. complete_one completes one of them: the first,
// or a random one if the seed is not 0.
class TmaQueue {
 public:
  void reset() { jobs_.clear(); }
  void push(std::shared_ptr<TmaJob> job) { jobs_.push_back(std::move(job)); }
  bool is_empty() const { return jobs_.empty(); }
  void complete_one();

 private:
  std::deque<std::shared_ptr<TmaJob>> jobs_;
};

// The bulk stores and additions of a thread, in groups. The thread commits a group and waits for groups.
struct BulkGroups {
  struct Store {
    std::shared_ptr<TmaJob> job;
    uint32_t tick;         // number of the store among those of its agent
    bool is_free = false;  // the thread has waited until the source in shared memory was read
  };
  std::vector<Store> open;
  std::deque<std::vector<Store>> committed;
};

enum class BulkWrite { kStore, kAdd };

// The primitives of csrc/cuda/primitives.h, for the current thread.
void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier, const int* coordinates,
              int num_coordinates);
void tma_write(const TensorMap& map, uint32_t source, const int* coordinates, int num_coordinates, BulkWrite write);
void tma_prefetch(const TensorMap& map);
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier);
void bulk_store(float* destination, uint32_t source, uint32_t bytes);
void bulk_reduce_add_f32(float* destination, uint32_t source, uint32_t bytes);
void bulk_commit();
void bulk_wait_read(int groups_left);
void bulk_wait(int groups_left);
// Fails if a thread ends with bulk stores that may still read shared memory.
void check_no_bulk_stores_left(const Thread& thread);

}  // namespace fused_attn::emulation
