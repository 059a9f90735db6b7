// Quantised rows by the byte multiplications of AVX-512 VNNI: 64 products an instruction, where floats take four
// instructions and more to unpack the values.
//
// Bytes multiply bytes, so a float (an input of a dot product, the factor of a row in a sum of rows) is written in two:
// as a 16-bit multiple of a scale that it shares with others, which holds it to 2^-16 of the largest of them; bfloat16
// would hold it to 2^-9 of itself. Values of rows become unsigned levels (0 .. 15, 0 .. 255), and what that adds is taken
// off again.
//
// A span is what has one scale in a row: a line, or with groups of 32 the half of one.
//
// Included by quantized.h.

struct Ints {
  __m512i v;
};
inline Ints set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Vec set_halves(float first, float second) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second))};
}
inline Ints set_halves(int32_t first, int32_t second) {
  return {_mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, second)};
}
// What belongs to line l, in all lanes; with halves the first and the second half of the lanes differ.
template <bool Halves, class T>
inline auto of_line(const T* spans, int64_t l) {
  if constexpr (Halves)
    return set_halves(spans[2 * l], spans[2 * l + 1]);
  else
    return set1(spans[l]);
}
// Spans of a row, up to a multiple of a vector's lanes.
inline int64_t padded_spans(int64_t n, int64_t per_line) {
  return ceil_div(ceil_div(n, kLine) * per_line, Vec::kLanes) * Vec::kLanes;
}
// The first eight lanes, each two times.
inline Vec twice(Vec a) {
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a.v)};
}

// 64 values in one byte each.
struct Bytes {
  __m512i v;
};
inline Bytes load_bytes(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
// Levels of a line: signed bytes plus 128; the nibbles of 32 bytes, signed ones plus 8, the lower ones first.
inline Bytes load_levels8(const uint8_t* p) { return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))}; }
template <bool Signed>
inline Bytes load_levels4(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  const __m512i w = _mm512_srlv_epi16(_mm512_broadcast_i64x4(bytes), shifts), low = _mm512_set1_epi8(15);
  if constexpr (Signed)
    return {_mm512_ternarylogic_epi32(w, low, _mm512_set1_epi8(8), 0x6a)};  // (w & low) ^ 8
  else
    return {_mm512_and_si512(w, low)};
}

// The largest multiple: two signed digits of 8 bits hold it.
constexpr float kMost = 127 * 256;
// Below this the reciprocal of a scale overflows.
constexpr float kLeast = 1e-30f;

// The higher digit of multiples of up to kMost; the lower one is what is left.
inline __m512i higher(__m512i whole) { return _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8); }
inline __m512i lower(__m512i whole, __m512i high) { return _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8)); }
// Not a number where any of the values is none, or is infinite; else 0.
inline __m512 poison(__m512 sum) { return _mm512_mul_ps(sum, _mm512_setzero_ps()); }

// Writes a line in digits; returns their scale, and the sums of its halves.
inline float to_digits(const float* x, int8_t* high, int8_t* low, float* sums) {
  __m512 v[4], top = _mm512_setzero_ps(), all = top;
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    top = _mm512_max_ps(_mm512_abs_ps(v[i]), top);
    all = _mm512_add_ps(all, poison(v[i]));
  }
  const float most = _mm512_reduce_max_ps(top);
  float scale = most / kMost;
  if (_mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q)) scale = std::numeric_limits<float>::quiet_NaN();
  const __m512 inverse = _mm512_set1_ps(most > kLeast ? kMost / most : 0);
  __m512i whole[4];
  for (int i = 0; i < 4; ++i) {
    whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    const __m512i first = higher(whole[i]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + 16 * i), _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + 16 * i), _mm512_cvtepi32_epi8(lower(whole[i], first)));
  }
  for (int h = 0; h < 2; ++h)
    sums[h] = scale * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(whole[2 * h], whole[2 * h + 1])));
  return scale;
}

// Inputs of dot products in digits.
struct FixedInputs {
  int64_t lines, spans;  // spans past the lines are zero
  const int8_t *high, *low;  // (count, lines, 64)
  const float *scales, *sums;  // (count, spans): what a digit is worth, and the sum of the inputs

  FixedInputs(int64_t n, int64_t spans_per_line, const float* const* x, int64_t count)
      : lines(ceil_div(n, kLine)), spans(padded_spans(n, spans_per_line)) {
    int8_t* digits = scratch<int8_t, 5>(2 * count * lines * kLine);
    float* floats = scratch<float, 5>(2 * count * spans);
    high = digits, low = digits + count * lines * kLine;
    scales = floats, sums = floats + count * spans;
    std::fill_n(floats, 2 * count * spans, 0.0f);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t l = 0; l < lines; ++l) {
        const float* line = x[b] + l * kLine;
        float tail[kLine] = {}, halves[2];
        if ((l + 1) * kLine > n) {
          std::copy_n(line, n - l * kLine, tail);
          line = tail;
        }
        const int64_t at = (b * lines + l) * kLine;
        const float scale = to_digits(line, digits + at, digits + count * lines * kLine + at, halves);
        float* to = floats + b * spans + l * spans_per_line;
        for (int64_t h = 0; h < spans_per_line; ++h) {
          to[h] = scale;
          to[count * spans + h] = spans_per_line == 2 ? halves[h] : halves[0] + halves[1];
        }
      }
  }

  Bytes first_digits(int64_t b, int64_t l) const { return load_bytes(high + (b * lines + l) * kLine); }
  Bytes second_digits(int64_t b, int64_t l) const { return load_bytes(low + (b * lines + l) * kLine); }
};

// Sums of four products each of levels and inputs.
inline Vec dot_digits(Bytes levels, Bytes high, Bytes low) {
  const __m512i top = _mm512_dpbusd_epi32(_mm512_setzero_si512(), levels.v, high.v);
  return {_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_slli_epi32(top, 8), levels.v, low.v))};
}

// The factors of R rows in digits, four rows to a lane; `zero` is what the levels' zero takes off.
template <int R>
struct Digits {
  static constexpr int kQuads = (R + 3) / 4;
  Ints high[kQuads], low[kQuads], zero;
  Vec worth;
};

// The factors of R rows, each by span.
template <int R>
struct Factors {
  __m512 rows[R], top = _mm512_setzero_ps(), bad = _mm512_setzero_ps();

  void set(int r, Vec factor) {
    rows[r] = factor.v;
    top = _mm512_max_ps(_mm512_abs_ps(factor.v), top);
    bad = _mm512_add_ps(bad, poison(factor.v));
  }

  // Levels are values plus `Zero`.
  template <int Zero>
  Digits<R> digits() const {
    const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_set1_ps(kLeast), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(kMost), top);
    const __m512i byte = _mm512_set1_epi32(255);
    Digits<R> out;
    __m512i total = _mm512_setzero_si512();
    for (int q = 0; q < Digits<R>::kQuads; ++q) {
      __m512i high = _mm512_setzero_si512(), low = high;
      for (int k = 0; k < 4 && 4 * q + k < R; ++k) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(rows[4 * q + k], inverse)), first = higher(whole);
        total = _mm512_add_epi32(total, whole);
        high = _mm512_or_si512(high, _mm512_slli_epi32(_mm512_and_si512(first, byte), 8 * k));
        low = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_and_si512(lower(whole, first), byte), 8 * k));
      }
      out.high[q] = {high}, out.low[q] = {low};
    }
    out.zero = {_mm512_mullo_epi32(total, _mm512_set1_epi32(-Zero))};
    out.worth = {_mm512_add_ps(_mm512_mul_ps(top, _mm512_set1_ps(1 / kMost)), bad)};
    return out;
  }
};

// Digits that differ from span to span, in scratch.
template <int R>
struct SpanDigits {
  static constexpr int kQuads = Digits<R>::kQuads;
  int32_t* ints;  // (2 * kQuads + 1, spans): high, low, zero
  float* worth;
  int64_t spans;

  // Room for number `b` of `count`.
  void allocate(int64_t n, int64_t b, int64_t count) {
    spans = n;
    ints = scratch<int32_t, 6>(count * (2 * kQuads + 1) * n) + b * (2 * kQuads + 1) * n;
    worth = scratch<float, 4>(count * n) + b * n;
  }
  void put(int64_t i, const Digits<R>& digits) {
    for (int q = 0; q < kQuads; ++q) {
      _mm512_storeu_si512(ints + q * spans + i, digits.high[q].v);
      _mm512_storeu_si512(ints + (kQuads + q) * spans + i, digits.low[q].v);
    }
    _mm512_storeu_si512(ints + 2 * kQuads * spans + i, digits.zero.v);
    store(worth + i, digits.worth);
  }
  template <bool Halves>
  Digits<R> at(int64_t l) const {
    Digits<R> out;
    for (int q = 0; q < kQuads; ++q) {
      out.high[q] = of_line<Halves>(ints + q * spans, l);
      out.low[q] = of_line<Halves>(ints + (kQuads + q) * spans, l);
    }
    out.zero = of_line<Halves>(ints + 2 * kQuads * spans, l);
    out.worth = of_line<Halves>(worth, l);
    return out;
  }
};

// A line of R rows turned over: each lane holds one column of four rows. Vector j has the columns 16 k + 4 j + 0 .. 3 in
// its quarter k.
template <int R>
struct Columns {
  __m512i quads[Digits<R>::kQuads][4];

  template <class Load>
  explicit Columns(Load load_row) {
    for (int q = 0; q < Digits<R>::kQuads; ++q) {
      __m512i row[4];
      for (int k = 0; k < 4; ++k) row[k] = 4 * q + k < R ? load_row(4 * q + k).v : _mm512_setzero_si512();
      const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
      const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
      quads[q][0] = _mm512_unpacklo_epi16(a, c), quads[q][1] = _mm512_unpackhi_epi16(a, c);
      quads[q][2] = _mm512_unpacklo_epi16(b, d), quads[q][3] = _mm512_unpackhi_epi16(b, d);
    }
  }

  // sums (64,), in the order of these vectors, += factors times rows.
  void add_to(float* sums, const Digits<R>& factors) const {
    for (int j = 0; j < 4; ++j) {
      __m512i t = _mm512_setzero_si512();
      for (int q = 0; q < Digits<R>::kQuads; ++q) t = _mm512_dpbusd_epi32(t, quads[q][j], factors.high[q].v);
      t = _mm512_add_epi32(_mm512_slli_epi32(t, 8), factors.zero.v);
      for (int q = 0; q < Digits<R>::kQuads; ++q) t = _mm512_dpbusd_epi32(t, quads[q][j], factors.low[q].v);
      store(sums + 16 * j, fma({_mm512_cvtepi32_ps(t)}, factors.worth, load(sums + 16 * j)));
    }
  }
};
inline void add_to_line(float* sums, Vec x) {
  for (int j = 0; j < 4; ++j) store(sums + 16 * j, add(load(sums + 16 * j), x));
}

// Sums of rows in the order of Columns, until they are finished.
struct FixedOutputs {
  float* const* y;
  int64_t n, lines, count;
  float* sums;  // (count, lines, 64)

  template <class F>
  FixedOutputs(const F& format, float* const* outputs, int64_t batch)
      : y(outputs), n(format.n), lines(format.lines), count(batch), sums(scratch<float, 7>(batch * lines * kLine)) {
    std::fill_n(sums, count * lines * kLine, 0.0f);
  }
  float* line(int64_t b, int64_t l) const { return sums + (b * lines + l) * kLine; }

  void finish() const {
    for (int64_t b = 0; b < count; ++b)
      for (int64_t l = 0; l < lines; ++l) {
        const float* from = line(b, l);
        float tail[kLine], *to = (l + 1) * kLine <= n ? y[b] + l * kLine : tail;
        for (int k = 0; k < 4; ++k)
          for (int j = 0; j < 4; ++j) _mm_storeu_ps(to + 16 * k + 4 * j, _mm_loadu_ps(from + 16 * j + 4 * k));
        if (to == tail) std::copy_n(tail, n - l * kLine, y[b] + l * kLine);
      }
  }
};
