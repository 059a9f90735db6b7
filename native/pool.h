// The threads that replay a tape, and the barrier between its nodes.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace dejavu {

// Threads take units of the current node from one counter, and the thread that finishes a node's last unit opens the
// next node. Nothing waits for a thread that holds no unit: one that the system has put aside delays only the unit that
// it is in, and the end of a run, not every node.
class Pool {
 public:
  // `threads` includes the caller of run(). Throws std::system_error, and leaves no thread, where one cannot be started.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // A node of work: every unit in [0, units) is run once, by some thread. What units() reads must not change from the
  // end of the node before to the end of the run.
  struct Node {
    virtual ~Node() = default;
    virtual int64_t units() const = 0;
    virtual const char* name() const = 0;
    virtual void run(int64_t unit) const = 0;
  };

  using Clock = std::chrono::steady_clock;

  // Runs nodes one after the other, each with all threads. Returns when all are done. One call at a time. What the first
  // unit to fail has thrown is thrown here, in the end; the other units run all the same.
  // `began`, if given, receives when each node began: (count,).
  void run(const Node* const* nodes, size_t count, Clock::time_point* began = nullptr);

 private:
  void work();
  void stop();
  void run_share();
  void open_node(uint64_t node);
  void mark(uint64_t node) const {
    if (began_) began_[node] = Clock::now();
  }

  std::vector<std::thread> workers_;
  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  const Node* const* nodes_ = nullptr;
  size_t count_ = 0;
  Clock::time_point* began_ = nullptr;
  std::exception_ptr error_;
  std::mutex error_lock_;
  std::atomic<bool> stop_{false};
  // Even while there is nothing to do, odd while a run is open to workers.
  alignas(64) std::atomic<uint64_t> job_{0};
  alignas(64) std::atomic<int> inside_{0};  // workers that may look at nodes_
  alignas(64) std::atomic<uint64_t> ticket_{0};  // current node << 32 | its next unit
  alignas(64) std::atomic<int64_t> done_{0};  // finished units of the current node
};

}  // namespace dejavu
