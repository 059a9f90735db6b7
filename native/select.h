// Selection: from scores to an index buffer, without a sort. Scalar code: it touches N floats where the rows that
// it saves are N * C.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"

namespace dejavu {

// Orders as the float does (no NaN): negative numbers reversed, below the positive ones.
inline uint32_t ordered_key(float x) {
  uint32_t bits;
  x += 0.0f;  // -0 and 0 are equal
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What the k largest of n scores are: those above `key`, and the first `ties` that equal it.
struct Cut {
  uint32_t key = 0;
  int64_t ties = 0;
};

// Radix selection: three passes of 11, 11 and 10 bits, each over what the one before left in doubt. 1 <= k <= n.
inline Cut find_cut(const float* scores, int64_t n, int64_t k) {
  thread_local std::vector<uint32_t> keys;
  keys.resize(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = ordered_key(scores[i]);
  Cut cut;
  int64_t left = n;
  for (const auto& [shift, bits] : {std::array<int, 2>{21, 11}, {10, 11}, {0, 10}}) {
    std::array<int32_t, 2048> histogram{};
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < left; ++i) ++histogram[keys[i] >> shift & mask];
    uint32_t bin = mask;
    for (; histogram[bin] < k; --bin) k -= histogram[bin];
    cut.key |= bin << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      keys[kept] = keys[i];
      kept += (keys[i] >> shift & mask) == bin;
    }
    left = kept;
  }
  cut.ties = k;
  return cut;
}

struct SelectArgs {
  const float* scores;  // (B, N)
  int32_t* idx;         // (capacity,)
  int32_t* count;       // (1,)
  Cut* cuts;            // (B,), for top-k
  int64_t batch, total, capacity, k;  // k = 0: by threshold
  float threshold;
};

// Top-k, first half: the cut of each row of the batch.
struct CutNode final : Pool::Node {
  SelectArgs args;
  explicit CutNode(const SelectArgs& a) : args(a) {}
  int64_t units() const override { return args.batch; }
  void run(int64_t b) const override {
    args.cuts[b] = find_cut(args.scores + b * args.total, args.total, args.k);
  }
};

// The union over the batch, compacted in ascending order.
struct CompactNode final : Pool::Node {
  SelectArgs args;
  explicit CompactNode(const SelectArgs& a) : args(a) {}
  int64_t units() const override { return 1; }
  void run(int64_t) const override { *args.count = static_cast<int32_t>(args.k ? by_cut(args.cuts) : by_threshold()); }

 private:
  int64_t by_cut(const Cut* cuts) const {
    const SelectArgs& a = args;
    thread_local std::vector<int64_t> ties;
    ties.assign(a.batch, 0);
    int64_t n = 0;
    for (int64_t i = 0; i < a.total; ++i) {
      bool take = false;
      for (int64_t b = 0; b < a.batch; ++b) {
        const uint32_t key = ordered_key(a.scores[b * a.total + i]);
        take |= key > cuts[b].key || (key == cuts[b].key && ties[b]++ < cuts[b].ties);
      }
      if (take) a.idx[n++] = static_cast<int32_t>(i);
    }
    return n;
  }

  int64_t by_threshold() const {
    const SelectArgs& a = args;
    const float* best = a.scores;
    thread_local std::vector<float> over_batch;
    if (a.batch > 1) {
      over_batch.assign(a.scores, a.scores + a.total);
      for (int64_t b = 1; b < a.batch; ++b)
        for (int64_t i = 0; i < a.total; ++i) over_batch[i] = std::max(over_batch[i], a.scores[b * a.total + i]);
      best = over_batch.data();
    }
    const int64_t n = std::count_if(best, best + a.total, [&](float s) { return s >= a.threshold; });
    if (n > a.capacity) {
      const Cut cut = find_cut(best, a.total, a.capacity);
      SelectArgs one = a;
      one.scores = best;
      one.batch = 1;
      return CompactNode(one).by_cut(&cut);
    }
    int64_t at = 0;
    for (int64_t i = 0; i < a.total; ++i)
      if (best[i] >= a.threshold) a.idx[at++] = static_cast<int32_t>(i);
    return at;
  }
};

}  // namespace dejavu
