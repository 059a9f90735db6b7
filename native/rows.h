// The two inner loops of decode: dot products with rows, and sums of scaled rows. Everything that reads
// weights or the cache goes through them, so this is where the machine's bandwidth is reached or lost.
//
// Rows are read four at a time, with software prefetch a fixed distance ahead that runs on into the rows
// that come next: hardware prefetchers stop at page ends and know nothing of selected rows.
//
// For each (row, input) there is a single chain of accumulation in the order of the elements, and rows are
// added to an output in their order. Grouping into fours, batches and threads hence never changes a bit.
//
// Included once an instruction set, after its vec_*.h, inside its namespace.

// Bytes ahead in each of the four streams. Selected rows of C = 4096 in bf16 on two AVX-512 cores: 28 to 31 GB/s at
// 512, 17 at 256, 26 at 1024, 24 at 4096.
constexpr int64_t kAheadBytes = 512;
constexpr int kRows = 4;

template <class T>
struct Lines {
  static constexpr int64_t kElems = 64 / sizeof(T);  // a cache line
  static constexpr int kVecs = kElems / Vec::kLanes;
};

template <class T, int R, class Body>
inline void for_lines(const T* const* rows, const T* const* next, int64_t n, Body body) {
  constexpr int64_t L = Lines<T>::kElems, ahead = kAheadBytes / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  if (next) {
    for (; i + ahead < n && i + L <= n; i += L) {
      for (int r = 0; r < R; ++r) prefetch(reinterpret_cast<const char*>(rows[r] + i + ahead));
      body(i);
    }
    for (; i + L <= n; i += L) {
      for (int r = 0; r < R; ++r) prefetch(reinterpret_cast<const char*>(next[r] + (i + ahead - n)));
      body(i);
    }
  } else {
    for (; i + L <= n; i += L) body(i);
  }
}

// The inputs of dot products as they are. Quantised formats may want them in a form of their own (fixed.h).
struct FloatInputs {
  const float* const* x;
  template <class F>
  FloatInputs(const F&, const float* const* inputs, int64_t) : x(inputs) {}
};

// A row format knows how `kStreams` rows or fewer meet B inputs; Plain is that of float32 and bfloat16.
template <class T>
struct Plain {
  using Element = T;
  using Inputs = FloatInputs;
  static constexpr int kStreams = kRows;
  int64_t n;
  explicit Plain(int64_t width) : n(width) {}
  explicit Plain(const Rows& rows) : n(rows.width) {}

  // out[r * row_stride + b * input_stride] = rows[r] . x[first + b] for R rows and B inputs.
  template <int R, int B>
  void dot(const T* const* rows, const T* const* next, const FloatInputs& inputs, int64_t first, float* out,
           int64_t row_stride, int64_t input_stride) const {
    const float* const* x = inputs.x + first;
    Vec acc[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) acc[r][b] = zero();
    for_lines<T, R>(rows, next, n, [&](int64_t i) {
      for (int v = 0; v < Lines<T>::kVecs; ++v, i += Vec::kLanes) {
        Vec in[B];
        for (int b = 0; b < B; ++b) in[b] = load(x[b] + i);
        for (int r = 0; r < R; ++r) {
          const Vec w = load(rows[r] + i);
          for (int b = 0; b < B; ++b) acc[r][b] = fma(w, in[b], acc[r][b]);
        }
      }
    });
    for (int64_t i = n - n % Lines<T>::kElems; i < n; i += Vec::kLanes) {
      const int64_t m = n - i < Vec::kLanes ? n - i : Vec::kLanes;
      for (int b = 0; b < B; ++b) {
        const Vec in = load(x[b] + i, m);
        for (int r = 0; r < R; ++r) acc[r][b] = fma(load(rows[r] + i, m), in, acc[r][b]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) out[r * row_stride + b * input_stride] = sum(acc[r][b]);
  }

  // out[b] += sum_r c[r * row_stride + b * input_stride] * rows[r] for R rows and B outputs.
  template <int R, int B>
  void axpy(const T* const* rows, const T* const* next, const float* c, int64_t row_stride, int64_t input_stride,
            float* const* out) const {
    Vec scale[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) scale[r][b] = set1(c[r * row_stride + b * input_stride]);
    for_lines<T, R>(rows, next, n, [&](int64_t i) {
      for (int v = 0; v < Lines<T>::kVecs; ++v, i += Vec::kLanes) {
        Vec w[R];
        for (int r = 0; r < R; ++r) w[r] = load(rows[r] + i);
        for (int b = 0; b < B; ++b) {
          Vec acc = load(out[b] + i);
          for (int r = 0; r < R; ++r) acc = fma(scale[r][b], w[r], acc);
          store(out[b] + i, acc);
        }
      }
    });
    for (int64_t i = n - n % Lines<T>::kElems; i < n; i += Vec::kLanes) {
      const int64_t m = n - i < Vec::kLanes ? n - i : Vec::kLanes;
      for (int b = 0; b < B; ++b) {
        Vec acc = load(out[b] + i, m);
        for (int r = 0; r < R; ++r) acc = fma(scale[r][b], load(rows[r] + i, m), acc);
        store(out[b] + i, acc, m);
      }
    }
  }
};

// Calls tile(R, B, first_row, next, first_input) until all `m` rows meet all inputs. `rows` lists `known` >= m
// rows: those past m are what the caller reads afterwards, and are only prefetched. The rows of a group stay in
// the cache for its further input tiles, so only the first one prefetches.
template <class F, class Tile>
inline void for_tiles(const typename F::Element* const* rows, int64_t m, int64_t known, int64_t inputs, Tile tile) {
  auto for_inputs = [&](auto R, int64_t i) {
    const auto* next = rows + (i + 2 * R.value <= known ? i + R.value : i);
    int64_t b = 0;
    for (; b + Vec::kInputs <= inputs; b += Vec::kInputs)
      tile(R, std::integral_constant<int, Vec::kInputs>{}, i, b == 0 ? next : nullptr, b);
    for (; b < inputs; ++b) tile(R, std::integral_constant<int, 1>{}, i, b == 0 ? next : nullptr, b);
  };
  int64_t i = 0;
  // With more inputs the accumulators of more rows would not fit the registers.
  if constexpr (F::kStreams > kRows)
    for (; inputs == 1 && i + F::kStreams <= m; i += F::kStreams)
      for_inputs(std::integral_constant<int, F::kStreams>{}, i);
  for (; i + kRows <= m; i += kRows) for_inputs(std::integral_constant<int, kRows>{}, i);
  for (; i < m; ++i) for_inputs(std::integral_constant<int, 1>{}, i);
}

// out[i * row_stride + b * input_stride] = rows[i] . x[b] for m rows and `inputs` inputs.
template <class F>
inline void dot_rows(const F& format, const typename F::Element* const* rows, int64_t m, int64_t known,
                     const typename F::Inputs& x, int64_t inputs, float* out, int64_t row_stride,
                     int64_t input_stride) {
  for_tiles<F>(rows, m, known, inputs, [&](auto R, auto B, int64_t i, auto next, int64_t b) {
    format.template dot<R.value, B.value>(rows + i, next, x, b, out + i * row_stride + b * input_stride, row_stride,
                                          input_stride);
  });
}

// out[b] += sum_i c[i * row_stride + b * input_stride] * rows[i] for m rows.
template <class F>
inline void axpy_rows(const F& format, const typename F::Element* const* rows, int64_t m, int64_t known,
                      const float* c, int64_t row_stride, int64_t input_stride, float* const* out, int64_t inputs) {
  for_tiles<F>(rows, m, known, inputs, [&](auto R, auto B, int64_t i, auto next, int64_t b) {
    format.template axpy<R.value, B.value>(rows + i, next, c + i * row_stride + b * input_stride, row_stride,
                                           input_stride, out + b);
  });
}

// Scratch of one thread, grown once and kept.
template <class T, int Tag>
T* scratch(int64_t n) {
  thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(n);
  return buffer.data();
}

// e^x for x <= 0 (Cephes' polynomial, 2 ulp); below -87 it is e^-87. NaN stays NaN: `max` gives its second argument then.
inline Vec exp(Vec x) {
  x = max(set1(-87.0f), x);
  const Vec n = round(mul(x, set1(1.44269504f)));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, set1(c));
  return scale2(fma(mul(p, r), r, add(r, set1(1.0f))), n);
}

// Fold a vector function over an array; lanes past the end read as `pad`.
template <class F>
inline Vec fold(const float* p, int64_t n, Vec acc, float pad, F f) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) acc = f(acc, load(p + i));
  if (i < n) {
    float tail[Vec::kLanes];
    for (int k = 0; k < Vec::kLanes; ++k) tail[k] = i + k < n ? p[i + k] : pad;
    acc = f(acc, load(tail));
  }
  return acc;
}

// out[i] = f(i, count of valid lanes) over an array, whole vectors first.
template <class F>
inline void for_vecs(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) f(i, n - i < Vec::kLanes ? n - i : Vec::kLanes);
}
