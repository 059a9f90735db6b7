// Dot products of quantised rows by the byte multiplications of AVX-512 VNNI: 64 products an instruction, where floats
// take four instructions and more to unpack the values.
//
// Bytes multiply bytes, so an input is written in two: as a 16-bit multiple of a scale that its line of 64 shares, which
// holds it to 2^-16 of the line's largest value; bfloat16 would hold it to 2^-9 of itself. Values of rows become unsigned
// levels (0 .. 15, 0 .. 255), and what that adds is taken off again by the sum of the inputs.
//
// A span is what has one scale in a row: a line, or with groups of 32 the half of one.
//
// Included by quantized.h.

inline Vec set_halves(float first, float second) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second))};
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
inline __m512 poison(__m512 x) { return _mm512_mul_ps(x, _mm512_setzero_ps()); }

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
  // As floats, which hold 32 of these multiples exactly; as integers, what stands for NaN would overflow.
  for (int h = 0; h < 2; ++h)
    sums[h] = scale * _mm512_reduce_add_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(whole[2 * h], whole[2 * h + 1])));
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
