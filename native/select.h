// Selection: from scores to an index buffer, without a sort and without branches that depend on the scores.
//
// Loops over arrays are plain: compilers turn them into vector code of the instruction set that this is compiled for.
// Included once an instruction set, after rows.h.

// Orders as the float does (no NaN): negative numbers reversed, below the positive ones.
inline uint32_t ordered_key(float x) {
  uint32_t bits;
  x += 0.0f;  // -0 and 0 are equal
  std::memcpy(&bits, &x, 4);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

inline int64_t count_from(const uint32_t* keys, int64_t n, uint32_t low) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= low;
  return count;
}

// The cut of the k largest: 1 <= k <= n. Bisects the keys, in vector code, until exactly k are above. Choosing 8192 neurons
// and 32 heads took 16 microseconds so on AVX-512, and 122 with a radix histogram and branches.
inline Cut find_cut(const float* scores, int64_t n, int64_t k) {
  uint32_t* keys = scratch<uint32_t, 0>(n);
  uint32_t low = ~0u, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = ordered_key(scores[i]);
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  // At least k keys reach `low`, and fewer reach high + 1.
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int64_t count = count_from(keys, n, middle);
    if (count == k) return {middle - 1, 0};
    (count > k ? low : high) = count > k ? middle : middle - 1;
  }
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += keys[i] > low;
  return {low, k - above};
}

// Marks what a cut keeps: |= 1 at its places.
inline void mark(const float* scores, int64_t n, Cut cut, uint8_t* marks) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = ordered_key(scores[i]);
    marks[i] |= static_cast<uint8_t>(key > cut.key);
  }
  for (int64_t i = 0; i < n && cut.ties > 0; ++i)
    if (ordered_key(scores[i]) == cut.key) {
      marks[i] = 1;
      --cut.ties;
    }
}

// Top-k, first half: the cut of one token.
void select_cut(const CutArgs& a, int64_t b) { a.cuts[b] = find_cut(a.scores + b * a.total, a.total, a.k); }

// The union over the tokens, compacted in ascending order.
void select(const SelectArgs& a, int64_t) {
  const int64_t n = a.total, B = a.batch.live();
  uint8_t* marks = scratch<uint8_t, 0>(n);
  std::fill_n(marks, n, 0);
  if (a.k) {
    for (int64_t b = 0; b < B; ++b) mark(a.scores + b * n, n, a.cuts[b], marks);
  } else {
    int64_t kept = 0;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < n; ++i) marks[i] |= static_cast<uint8_t>(a.scores[b * n + i] >= a.threshold);
    for (int64_t i = 0; i < n; ++i) kept += marks[i];
    if (kept > a.capacity) {  // the best of what any token scores
      float* best = scratch<float, 0>(n);
      std::copy_n(a.scores, n, best);
      for (int64_t b = 1; b < B; ++b)
        for (int64_t i = 0; i < n; ++i) best[i] = std::max(best[i], a.scores[b * n + i]);
      std::fill_n(marks, n, 0);
      mark(best, n, find_cut(best, n, a.capacity), marks);
    }
  }
  // Every place is written, the next one over it unless it is kept; the last ones must stay inside the buffer.
  int64_t at = 0;
  for (int64_t i = 0; i < n && at < a.capacity; ++i) {
    a.idx[at] = static_cast<int32_t>(i);
    at += marks[i];
  }
  *a.count = static_cast<int32_t>(at);
}
