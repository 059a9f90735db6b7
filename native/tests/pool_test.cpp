// The threads of pool.h alone, for sanitizers: `make tsan` and `make sanitize` build and run this.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../pool.h"

using dejavu::Pool;

namespace {

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "FAIL: %s\n", what);
  std::_Exit(1);
}

// Adds one to every place of `to` that the node before has made equal to `expected`.
struct Add final : Pool::Node {
  std::vector<int>* to;
  int expected, fails_at;
  Add(std::vector<int>* v, int e, int f = -1) : to(v), expected(e), fails_at(f) {}
  const char* name() const override { return "add"; }
  int64_t units() const override { return static_cast<int64_t>(to->size()); }
  void run(int64_t unit) const override {
    if (unit == fails_at) throw std::runtime_error("a unit that fails");
    int& value = (*to)[static_cast<size_t>(static_cast<int64_t>(to->size()) - 1 - unit)];
    if (value == expected) ++value;
  }
};

void replay(Pool& pool, int nodes, int runs) {
  std::vector<int> values(37);
  std::vector<Add> all;
  for (int i = 0; i < nodes; ++i) all.emplace_back(&values, i);
  std::vector<const Pool::Node*> order;
  for (const Add& node : all) order.push_back(&node);
  for (int run = 0; run < runs; ++run) {
    values.assign(values.size(), 0);
    pool.run(order.data(), order.size());
    for (int value : values) check(value == nodes, "every node is whole before the next");
  }
}

void errors(Pool& pool) {
  for (int round = 0; round < 200; ++round) {
    std::vector<int> values(37), after(5);
    const Add fails(&values, 0, round % 37), next(&after, 0);
    const Pool::Node* order[] = {&fails, &next};
    bool thrown = false;
    try {
      pool.run(order, 2);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    check(thrown, "an error reaches the caller");
    check(after == std::vector<int>(5, 1), "the nodes after it run all the same");
    replay(pool, 3, 1);
  }
}

void callers(Pool& pool) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back([&] { replay(pool, 5, 100); });
  for (auto& thread : threads) thread.join();
}

}  // namespace

int main() {
  for (int threads : {1, 2, 4}) {
    Pool pool(threads);
    replay(pool, 20, 300);
    errors(pool);
    callers(pool);
  }
  for (int i = 0; i < 50; ++i) Pool(3).size();
  // In a child the old pool's threads do not exist: it starts one of its own, and leaves that one be.
  auto* pool = new Pool(3);
  replay(*pool, 3, 3);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    replay(*new Pool(3), 3, 3);
    std::_Exit(0);
  }
  int status = 0;
  if (child > 0) check(waitpid(child, &status, 0) == child && status == 0, "the forked process ends well");
  replay(*pool, 3, 3);
  delete pool;
  std::puts("the pool holds");
}
