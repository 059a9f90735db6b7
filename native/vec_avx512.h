// Sixteen floats in one register (AVX-512 F, BW, DQ, VL, VNNI: Cascade Lake, Ice Lake, Zen 4 and later).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dejavu::avx512 {

struct Vec {
  static constexpr int kLanes = 16;
  // 4 rows x 4 inputs of accumulators leave half of the 32 registers free.
  static constexpr int kInputs = 4;
  __m512 v;
};

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline Vec load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const uint16_t* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n whole

// Float16 numbers.
inline Vec load_halves(const uint8_t* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }

// The two values of each byte, looked up: the permutation reads the low four bits of each lane and ignores the rest.
struct Nibbles {
  Vec low, high;
};
template <bool Signed>
inline Nibbles load_nibbles(const uint8_t* p) {
  const __m512 values = Signed ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                               : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {{_mm512_permutexvar_ps(w, values)}, {_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), values)}};
}
// What the scale of low nibbles is to be multiplied with.
template <bool Signed>
constexpr float kLowUnit = 1.0f;

// acc + x in the lanes whose bit is set; `bits` are those of a line of 64 lanes, of which this is vector `v`.
inline Vec add_where(Vec acc, const uint8_t* bits, int v, Vec x) {
  uint16_t mask;
  std::memcpy(&mask, bits + 2 * v, 2);
  return {_mm512_mask_add_ps(acc.v, mask, acc.v, x.v)};
}
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }

}  // namespace dejavu::avx512
