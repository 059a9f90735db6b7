// The threads that replay a tape, and the barrier between its nodes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dejavu {

// What the threads share; each on its own cache line.
class Pool {
 public:
  // `threads` includes the caller of run().
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // A node of work: every unit in [0, units) is run once, by some thread.
  struct Node {
    virtual ~Node() = default;
    virtual int64_t units() const = 0;
    virtual void run(int64_t unit) const = 0;
  };

  // Runs nodes one after the other, each with all threads. Returns when all are done. One call at a time.
  void run(const Node* const* nodes, size_t count);

 private:
  void work();
  void run_share(const Node* const* nodes, size_t count);
  void barrier();
  bool wait_for_job(uint64_t seen);

  std::vector<std::thread> workers_;
  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  const Node* const* nodes_ = nullptr;
  size_t count_ = 0;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint64_t> job_{0};
  alignas(64) std::atomic<int64_t> next_unit_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace dejavu
