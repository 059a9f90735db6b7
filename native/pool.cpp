#include "pool.h"

#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace dejavu {
namespace {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Long enough to outlast sampling between two steps, short enough not to slow PyTorch's threads in prefill.
constexpr auto kIdleSpin = std::chrono::microseconds(200);
// Looks at what a thread waits for before it lets others run: between nodes that normally takes well under this.
constexpr int kSpins = 2000;

template <class Ready>
void wait_until(Ready ready) {
  for (int spins = 0; !ready();) {
    if (++spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard lock(sleep_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(const Node* const* nodes, size_t count, Clock::time_point* began) {
  std::lock_guard call(calls_);
  nodes_ = nodes;
  count_ = count;
  began_ = began;
  open_node(0);
  {
    // The lock closes the gap between a worker's last look at job_ and its sleep.
    std::lock_guard lock(sleep_);
    job_.fetch_add(1);
  }
  if (!workers_.empty()) wake_.notify_all();
  run_share();
  // The nodes may be freed after this: shut the door, then wait for those inside (see work()).
  job_.fetch_add(1);
  wait_until([&] { return inside_.load() == 0; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::work() {
  for (uint64_t seen = 0;;) {
    const auto until = Clock::now() + kIdleSpin;
    uint64_t job;
    auto called = [&] { return ((job = job_.load()) % 2 == 1 && job != seen) || stop_; };
    while (!called()) {
      for (int i = 0; i < 64; ++i) pause();
      if (Clock::now() < until) continue;
      std::unique_lock lock(sleep_);
      wake_.wait(lock, called);
    }
    if (stop_) return;
    // Enter, then look again: either run() sees this thread inside, or this thread sees that the job is over.
    inside_.fetch_add(1);
    if (job_.load() == job) run_share();
    inside_.fetch_sub(1);
    seen = job;
  }
}

void Pool::run_share() {
  for (;;) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    uint64_t node = ticket >> 32;
    if (node == count_) return;
    if (static_cast<int64_t>(ticket & 0xffffffff) >= nodes_[node]->units()) {
      wait_until([&] { return ticket_.load(std::memory_order_acquire) >> 32 != node; });
      continue;
    }
    // By now the node may be another one: what counts is the ticket that is drawn.
    ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    node = ticket >> 32;
    if (node == count_) return;
    const int64_t unit = static_cast<int64_t>(ticket & 0xffffffff), units = nodes_[node]->units();
    if (unit >= units) continue;
    try {
      nodes_[node]->run(unit);
    } catch (...) {
      std::lock_guard lock(error_lock_);
      if (!error_) error_ = std::current_exception();
    }
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == units) open_node(node + 1);
  }
}

void Pool::open_node(uint64_t node) {
  while (node < count_ && nodes_[node]->units() == 0) mark(node++);
  if (node < count_) mark(node);
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(node << 32, std::memory_order_release);
}

}  // namespace dejavu
