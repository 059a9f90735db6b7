#include "pool.h"

#include <chrono>

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
// Spins before a waiting thread lets others run: a barrier normally takes well under this.
constexpr int kSpins = 2000;

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  {
    std::lock_guard lock(sleep_);
    stop_ = true;
    job_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(const Node* const* nodes, size_t count) {
  std::lock_guard call(calls_);
  nodes_ = nodes;
  count_ = count;
  {
    // The lock closes the gap between a worker's last look at job_ and its sleep.
    std::lock_guard lock(sleep_);
    job_.fetch_add(1, std::memory_order_release);
  }
  if (!workers_.empty()) wake_.notify_all();
  run_share(nodes, count);
}

void Pool::work() {
  uint64_t seen = 0;
  while (wait_for_job(seen)) {
    seen = job_.load(std::memory_order_acquire);
    run_share(nodes_, count_);
  }
}

bool Pool::wait_for_job(uint64_t seen) {
  const auto until = std::chrono::steady_clock::now() + kIdleSpin;
  while (job_.load(std::memory_order_acquire) == seen) {
    for (int i = 0; i < 64; ++i) pause();
    if (std::chrono::steady_clock::now() < until) continue;
    std::unique_lock lock(sleep_);
    wake_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != seen; });
  }
  return !stop_;
}

void Pool::run_share(const Node* const* nodes, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Node& node = *nodes[i];
    const int64_t units = node.units();
    for (int64_t u; (u = next_unit_.fetch_add(1, std::memory_order_relaxed)) < units;) node.run(u);
    barrier();
  }
}

void Pool::barrier() {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    next_unit_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
    if (++spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace dejavu
