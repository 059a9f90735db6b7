// Eight floats in one register (AVX2, FMA and F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dejavu::avx2 {

struct Vec {
  static constexpr int kLanes = 8;
  // 16 registers: 4 rows x 2 inputs of accumulators, 2 inputs and a row still fit.
  static constexpr int kInputs = 2;
  __m256 v;
};

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
inline Vec load(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
template <class T>
inline Vec load(const T* p, int64_t n) {
  T padded[8] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t n) {
  float padded[8];
  store(padded, a);
  std::memcpy(p, padded, n * sizeof(float));
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale2(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}

// Float16 numbers.
inline Vec load_halves(const uint8_t* p, int64_t n) {
  alignas(16) uint8_t padded[16] = {};
  std::memcpy(padded, p, 2 * n);
  return {_mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(padded)))};
}

// The two values of each byte. Signed low ones are 2^28 times too large: their sign bit is shifted to the top, and
// shifting it down again would cost an instruction for each value instead of one for each scale.
struct Nibbles {
  Vec low, high;
};
template <bool Signed>
inline Nibbles load_nibbles(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if constexpr (Signed) {
    const __m256i w = _mm256_cvtepi8_epi32(bytes);
    return {{_mm256_cvtepi32_ps(_mm256_slli_epi32(w, 28))}, {_mm256_cvtepi32_ps(_mm256_srai_epi32(w, 4))}};
  } else {
    const __m256i w = _mm256_cvtepu8_epi32(bytes);
    return {{_mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(15)))},
            {_mm256_cvtepi32_ps(_mm256_srli_epi32(w, 4))}};
  }
}
// What the scale of low nibbles is to be multiplied with.
template <bool Signed>
constexpr float kLowUnit = Signed ? 0x1p-28f : 1.0f;

// acc + x in the lanes whose bit is set; `bits` are those of a line of 64 lanes, of which this is vector `v`.
inline Vec add_where(Vec acc, const uint8_t* bits, int v, Vec x) {
  int32_t word;
  std::memcpy(&word, bits + v / 4 * 4, 4);
  // Each lane's bit goes to the top, where blendv looks.
  const __m256i shifts = _mm256_sub_epi32(_mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), _mm256_set1_epi32(v % 4 * 8));
  const __m256 mask = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(word), shifts));
  return {_mm256_add_ps(acc.v, _mm256_blendv_ps(_mm256_setzero_ps(), x.v, mask))};
}
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }

}  // namespace dejavu::avx2
