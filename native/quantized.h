// Row formats of quantised weights (kernels/quantized.py describes their bytes): values come in lines of 64, padded
// with zeros, and after them the scales. Rows are short in bytes, so eight are read at a time instead of four: they
// keep as many bytes under way (5 to 20 % faster).
//
// As in Plain, each (row, input) has one chain of accumulation in the order of the elements. A scale is applied once
// a row, or once for the half of a line that shares it, never to each value.
//
// Included after rows.h.

constexpr int64_t kLine = 64;     // values
constexpr int64_t kHalf = 32;     // int4's lower nibbles, then its higher ones
constexpr int kQuantStreams = 8;  // rows
constexpr int kLineVecs = kLine / Vec::kLanes, kHalfVecs = kHalf / Vec::kLanes;

// Calls body(line) for all lines, prefetching as for_lines does, and first the scales of the rows that come next.
template <int LineBytes, int R, class Body>
inline void for_quant_lines(const uint8_t* const* rows, const uint8_t* const* next, int64_t lines, int64_t stride,
                            Body body) {
  constexpr int64_t kCacheLine = 64, kPer = kCacheLine / LineBytes;
  const int64_t bytes = lines * LineBytes, ahead = std::min(kAheadBytes, ceil_div(bytes, kCacheLine) * kCacheLine);
  int64_t l = 0;
  if (next) {
    for (int r = 0; r < R; ++r)
      for (int64_t at = bytes; at < stride; at += kCacheLine) prefetch(reinterpret_cast<const char*>(next[r] + at));
    for (; l + kPer <= lines; l += kPer) {
      const int64_t at = l * LineBytes + ahead;
      const uint8_t* const* from = at < bytes ? rows : next;
      for (int r = 0; r < R; ++r)
        prefetch(reinterpret_cast<const char*>(from[r] + (at < bytes ? at : at - bytes)));
      for (int64_t k = 0; k < kPer; ++k) body(l + k);
    }
  }
  for (; l < lines; ++l) body(l);
}

// Inputs by line: the last one, where it is not whole, from a copy padded with zeros.
template <int B>
struct InputLines {
  const float* const* x;
  int64_t whole;  // lines
  float tail[B][kLine];

  InputLines(const float* const* inputs, int64_t n) : x(inputs), whole(n / kLine) {
    if (const int64_t rest = n % kLine)
      for (int b = 0; b < B; ++b) {
        std::copy_n(x[b] + n - rest, rest, tail[b]);
        std::fill(tail[b] + rest, tail[b] + kLine, 0.0f);
      }
  }
  const float* at(int b, int64_t line) const { return line < whole ? x[b] + line * kLine : tail[b]; }
};

// Outputs by line, in the same way; `finish` writes the copy back.
template <int B>
struct OutputLines {
  float* const* y;
  int64_t n, whole;
  float tail[B][kLine];

  OutputLines(float* const* outputs, int64_t width) : y(outputs), n(width), whole(n / kLine) {
    for (int b = 0; b < B && n % kLine; ++b) std::copy_n(y[b] + n - n % kLine, n % kLine, tail[b]);
  }
  float* at(int b, int64_t line) { return line < whole ? y[b] + line * kLine : tail[b]; }
  void finish() const {
    for (int b = 0; b < B && n % kLine; ++b) std::copy_n(tail[b], n % kLine, y[b] + n - n % kLine);
  }
};

inline float scale_at(const uint8_t* p) {
  float out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

#ifdef __AVX512VNNI__
#include "fixed.h"
#endif

struct Int8 {
  using Element = uint8_t;
  static constexpr int kStreams = kQuantStreams;
  int64_t n, stride, lines;
  explicit Int8(const Rows& rows) : n(rows.width), stride(rows.stride), lines(ceil_div(n, kLine)) {}

#ifdef __AVX512VNNI__
  struct Inputs : FixedInputs {
    Inputs(const Int8& format, const float* const* x, int64_t count) : FixedInputs(format.n, 1, x, count) {}
  };

  template <int R, int B>
  void dot(const uint8_t* const* rows, const uint8_t* const* next, const Inputs& x, int64_t first, float* out,
           int64_t row_stride, int64_t input_stride) const {
    Vec acc[R][B];
    for (int b = 0; b < B; ++b) {
      Vec total = zero();
      for (int64_t i = 0; i < x.spans; i += Vec::kLanes) total = add(total, load(x.sums + (first + b) * x.spans + i));
      for (int r = 0; r < R; ++r) acc[r][b] = mul(total, set1(-128.0f));
    }
    for_quant_lines<kLine, R>(rows, next, lines, stride, [&](int64_t l) {
      Bytes high[B], low[B];
      Vec scale[B];
      for (int b = 0; b < B; ++b) {
        high[b] = x.first_digits(first + b, l), low[b] = x.second_digits(first + b, l);
        scale[b] = set1(x.scales[(first + b) * x.spans + l]);
      }
      for (int r = 0; r < R; ++r) {
        const Bytes levels = load_levels8(rows[r] + l * kLine);
        for (int b = 0; b < B; ++b) acc[r][b] = fma(dot_digits(levels, high[b], low[b]), scale[b], acc[r][b]);
      }
    });
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r * row_stride + b * input_stride] = sum(acc[r][b]) * scale_at(rows[r] + lines * kLine);
  }
#else
  using Inputs = FloatInputs;

  template <int R, int B>
  void dot(const uint8_t* const* rows, const uint8_t* const* next, const FloatInputs& x, int64_t first, float* out,
           int64_t row_stride, int64_t input_stride) const {
    const InputLines<B> inputs(x.x + first, n);
    Vec acc[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) acc[r][b] = zero();
    for_quant_lines<kLine, R>(rows, next, lines, stride, [&](int64_t l) {
      for (int v = 0; v < kLineVecs; ++v) {
        Vec in[B];
        for (int b = 0; b < B; ++b) in[b] = load(inputs.at(b, l) + v * Vec::kLanes);
        for (int r = 0; r < R; ++r) {
          const Vec w = load(reinterpret_cast<const int8_t*>(rows[r] + l * kLine + v * Vec::kLanes));
          for (int b = 0; b < B; ++b) acc[r][b] = fma(w, in[b], acc[r][b]);
        }
      }
    });
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r * row_stride + b * input_stride] = sum(acc[r][b]) * scale_at(rows[r] + lines * kLine);
  }
#endif

  template <int R, int B>
  void axpy(const uint8_t* const* rows, const uint8_t* const* next, const float* c, int64_t row_stride,
            int64_t input_stride, float* const* out) const {
    OutputLines<B> outputs(out, n);
    Vec scale[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        scale[r][b] = set1(c[r * row_stride + b * input_stride] * scale_at(rows[r] + lines * kLine));
    for_quant_lines<kLine, R>(rows, next, lines, stride, [&](int64_t l) {
      for (int v = 0; v < kLineVecs; ++v) {
        Vec acc[B];
        for (int b = 0; b < B; ++b) acc[b] = load(outputs.at(b, l) + v * Vec::kLanes);
        for (int r = 0; r < R; ++r) {
          const Vec w = load(reinterpret_cast<const int8_t*>(rows[r] + l * kLine + v * Vec::kLanes));
          for (int b = 0; b < B; ++b) acc[b] = fma(scale[r][b], w, acc[b]);
        }
        for (int b = 0; b < B; ++b) store(outputs.at(b, l) + v * Vec::kLanes, acc[b]);
      }
    });
    outputs.finish();
  }
};

// Groups of 32, 64 or 128 values; with Zero, nibbles are 0 .. 15 and each group has an offset.
template <bool Zero>
struct Int4 {
  using Element = uint8_t;
  static constexpr int kStreams = kQuantStreams;
  static constexpr int64_t kBytes = kHalf;  // a line
  int64_t n, stride, lines, groups;
  int shift = 0;  // halves of lines in a group, as a power of two
  explicit Int4(const Rows& rows)
      : n(rows.width), stride(rows.stride), lines(ceil_div(n, kLine)), groups(ceil_div(lines * kLine, rows.group)) {
    for (int64_t size = kHalf; size < rows.group; size *= 2) ++shift;
  }

  // Scales of R rows, then their offsets, as floats: (1 + Zero, R, groups).
  template <int R>
  float* scales(const uint8_t* const* rows) const {
    float* out = scratch<float, 4>((1 + Zero) * R * groups);
    for (int k = 0; k < 1 + Zero; ++k)
      for (int r = 0; r < R; ++r) {
        const uint8_t* from = rows[r] + lines * kBytes + k * groups * 2;
        float* to = out + (k * R + r) * groups;
        for_vecs(groups, [&](int64_t i, int64_t m) { store(to + i, load_halves(from + 2 * i, m), m); });
      }
    return out;
  }

#ifdef __AVX512VNNI__
  struct Inputs : FixedInputs {
    Inputs(const Int4& format, const float* const* x, int64_t count)
        : FixedInputs(format.n, format.shift ? 1 : 2, x, count) {}
  };

  template <int R, int B>
  void dot(const uint8_t* const* rows, const uint8_t* const* next, const Inputs& x, int64_t first, float* out,
           int64_t row_stride, int64_t input_stride) const {
    // By span: the scale of the row times that of the input; and what the levels' zero adds to a result.
    const int64_t spans = x.spans;
    float* products = scratch<float, 6>(R * B * spans);
    Vec acc[R][B];
    for (int r = 0; r < R; ++r) {
      const uint8_t* of = rows[r] + lines * kBytes;
      for (int b = 0; b < B; ++b) {
        const float *worth = x.scales + (first + b) * spans, *sums = x.sums + (first + b) * spans;
        Vec total = zero();
        for (int64_t i = 0; i < spans; i += Vec::kLanes) {
          const Vec scale = span_scales(of, i);
          store(products + (r * B + b) * spans + i, mul(scale, load(worth + i)));
          total = fma(Zero ? span_scales(of + 2 * groups, i) : scale, load(sums + i), total);
        }
        acc[r][b] = Zero ? total : mul(total, set1(-8.0f));
      }
    }
    auto lines_with = [&](auto scale_of) {
      for_quant_lines<kBytes, R>(rows, next, lines, stride, [&](int64_t l) {
        Bytes high[B], low[B];
        for (int b = 0; b < B; ++b) high[b] = x.first_digits(first + b, l), low[b] = x.second_digits(first + b, l);
        for (int r = 0; r < R; ++r) {
          const Bytes levels = load_levels4<!Zero>(rows[r] + l * kBytes);
          for (int b = 0; b < B; ++b)
            acc[r][b] = fma(dot_digits(levels, high[b], low[b]), scale_of(products + (r * B + b) * spans, l), acc[r][b]);
        }
      });
    };
    if (shift)
      lines_with([](const float* of, int64_t l) { return set1(of[l]); });
    else
      lines_with([](const float* of, int64_t l) { return set_halves(of[2 * l], of[2 * l + 1]); });
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) out[r * row_stride + b * input_stride] = sum(acc[r][b]);
  }

  // Of the spans from the i-th on, which two share where groups are longer than lines.
  Vec span_scales(const uint8_t* halves, int64_t i) const {
    if (shift < 2) return load_halves(halves + 2 * i, std::min<int64_t>(groups - i, Vec::kLanes));
    return twice(load_halves(halves + i, std::min<int64_t>(groups - i / 2, Vec::kLanes / 2)));
  }
#else
  using Inputs = FloatInputs;

  template <int R, int B>
  void dot(const uint8_t* const* rows, const uint8_t* const* next, const FloatInputs& x, int64_t first, float* out,
           int64_t row_stride, int64_t input_stride) const {
    const InputLines<B> inputs(x.x + first, n);
    const float* scale = scales<R>(rows);
    const float* offset = scale + R * groups;
    Vec acc[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) acc[r][b] = zero();
    for_quant_lines<kBytes, R>(rows, next, lines, stride, [&](int64_t l) {
      const int64_t low = 2 * l >> shift, high = (2 * l + 1) >> shift;
      const float* in[B];
      Vec total[2][B];  // of the inputs, which is what an offset is multiplied with
      for (int b = 0; b < B; ++b) {
        in[b] = inputs.at(b, l);
        if constexpr (Zero)
          for (int h = 0; h < 2; ++h) {
            total[h][b] = load(in[b] + h * kHalf);
            for (int v = 1; v < kHalfVecs; ++v) total[h][b] = add(total[h][b], load(in[b] + h * kHalf + v * Vec::kLanes));
          }
      }
      for (int r = 0; r < R; ++r) {
        Vec part[2][B];
        for (int v = 0; v < kHalfVecs; ++v) {
          const Nibbles w = load_nibbles<!Zero>(rows[r] + l * kBytes + v * Vec::kLanes);
          for (int b = 0; b < B; ++b) {
            const Vec first = load(in[b] + v * Vec::kLanes), second = load(in[b] + kHalf + v * Vec::kLanes);
            part[0][b] = v ? fma(w.low, first, part[0][b]) : mul(w.low, first);
            part[1][b] = v ? fma(w.high, second, part[1][b]) : mul(w.high, second);
          }
        }
        const Vec low_scale = set1(scale[r * groups + low] * kLowUnit<!Zero>);
        const Vec high_scale = set1(scale[r * groups + high]);
        for (int b = 0; b < B; ++b) acc[r][b] = fma(high_scale, part[1][b], fma(low_scale, part[0][b], acc[r][b]));
        if constexpr (Zero)
          for (int b = 0; b < B; ++b)
            acc[r][b] = fma(set1(offset[r * groups + high]), total[1][b],
                            fma(set1(offset[r * groups + low]), total[0][b], acc[r][b]));
      }
    });
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) out[r * row_stride + b * input_stride] = sum(acc[r][b]);
  }
#endif

  template <int R, int B>
  void axpy(const uint8_t* const* rows, const uint8_t* const* next, const float* c, int64_t row_stride,
            int64_t input_stride, float* const* out) const {
    OutputLines<B> outputs(out, n);
    // By group: what a low level adds to each output, a high one, and with offsets, what every value adds.
    constexpr int kKinds = 2 + Zero;
    constexpr float kUnits[] = {kLowUnit<!Zero>, 1, 1};
    float* factors = scratch<float, 6>(kKinds * R * B * groups);
    auto factor = [&](int kind, int r, int b) { return factors + ((kind * R + r) * B + b) * groups; };
    const float* scale = scales<R>(rows);
    for (int kind = 0; kind < kKinds; ++kind)
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
          const Vec times = set1(c[r * row_stride + b * input_stride]), unit = set1(kUnits[kind]);
          const float* from = scale + (kind / 2 * R + r) * groups;
          float* to = factor(kind, r, b);
          for_vecs(groups, [&](int64_t i, int64_t m) { store(to + i, mul(mul(times, load(from + i, m)), unit), m); });
        }
    for_quant_lines<kBytes, R>(rows, next, lines, stride, [&](int64_t l) {
      const int64_t group[2] = {2 * l >> shift, (2 * l + 1) >> shift};
      for (int v = 0; v < kHalfVecs; ++v) {
        Vec acc[2][B];
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) acc[h][b] = load(outputs.at(b, l) + h * kHalf + v * Vec::kLanes);
        for (int r = 0; r < R; ++r) {
          const Nibbles w = load_nibbles<!Zero>(rows[r] + l * kBytes + v * Vec::kLanes);
          for (int b = 0; b < B; ++b) {
            acc[0][b] = fma(set1(factor(0, r, b)[group[0]]), w.low, acc[0][b]);
            acc[1][b] = fma(set1(factor(1, r, b)[group[1]]), w.high, acc[1][b]);
            if constexpr (Zero)
              for (int h = 0; h < 2; ++h) acc[h][b] = add(acc[h][b], set1(factor(2, r, b)[group[h]]));
          }
        }
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h) store(outputs.at(b, l) + h * kHalf + v * Vec::kLanes, acc[h][b]);
      }
    });
    outputs.finish();
  }
};

// A bit a value: rows . x = scale * (sum of x - 2 * sum of x where the bit is set).
struct Signs {
  using Element = uint8_t;
  static constexpr int kStreams = kQuantStreams;
  static constexpr int64_t kBytes = kLine / 8;
  int64_t n, stride, lines;
  using Inputs = FloatInputs;
  explicit Signs(const Rows& rows) : n(rows.width), stride(rows.stride), lines(ceil_div(n, kLine)) {}

  template <int R, int B>
  void dot(const uint8_t* const* rows, const uint8_t* const* next, const FloatInputs& x, int64_t first, float* out,
           int64_t row_stride, int64_t input_stride) const {
    const InputLines<B> inputs(x.x + first, n);
    Vec negative[R][B], total[B];
    for (int b = 0; b < B; ++b) {
      total[b] = zero();
      for (int r = 0; r < R; ++r) negative[r][b] = zero();
    }
    for_quant_lines<kBytes, R>(rows, next, lines, stride, [&](int64_t l) {
      for (int v = 0; v < kLineVecs; ++v) {
        Vec in[B];
        for (int b = 0; b < B; ++b) {
          in[b] = load(inputs.at(b, l) + v * Vec::kLanes);
          total[b] = add(total[b], in[b]);
        }
        for (int r = 0; r < R; ++r)
          for (int b = 0; b < B; ++b) negative[r][b] = add_where(negative[r][b], rows[r] + l * kBytes, v, in[b]);
      }
    });
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r * row_stride + b * input_stride] =
            scale_at(rows[r] + lines * kBytes) * (sum(total[b]) - 2 * sum(negative[r][b]));
  }
};
