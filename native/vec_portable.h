// Eight floats in an array: standard C++ that compilers turn into whatever the machine has (Arm, old x86).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dejavu::portable {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kInputs = 2;
  float v[8];
};

template <class F>
inline Vec each(F f) {
  Vec out;
  for (int i = 0; i < 8; ++i) out.v[i] = f(i);
  return out;
}
inline float widen(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline Vec zero() { return each([](int) { return 0.0f; }); }
inline Vec set1(float x) { return each([=](int) { return x; }); }
inline Vec load(const float* p) { return each([=](int i) { return p[i]; }); }
inline Vec load(const uint16_t* p) { return each([=](int i) { return widen(p[i]); }); }
inline Vec load(const float* p, int64_t n) { return each([=](int i) { return i < n ? p[i] : 0.0f; }); }
inline Vec load(const uint16_t* p, int64_t n) { return each([=](int i) { return i < n ? widen(p[i]) : 0.0f; }); }
inline Vec load(const int8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store(float* p, Vec a, int64_t n) { std::memcpy(p, a.v, n * sizeof(float)); }
inline Vec add(Vec a, Vec b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec mul(Vec a, Vec b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec max(Vec a, Vec b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) {
#ifdef FP_FAST_FMAF
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
#else
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}
inline float sum(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline Vec round(Vec a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline Vec scale2(Vec a, Vec n) { return each([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); }); }

// Float16 numbers; infinity and NaN do not occur among scales.
inline Vec load_halves(const uint8_t* p, int64_t n) {
  return each([=](int i) {
    if (i >= n) return 0.0f;
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(mantissa * 1.0f, -24);
    return h >> 15 ? -size : size;
  });
}

// The two values of each byte.
struct Nibbles {
  Vec low, high;
};
template <bool Signed>
inline Nibbles load_nibbles(const uint8_t* p) {
  auto value = [](int q) { return static_cast<float>(Signed && q > 7 ? q - 16 : q); };
  return {each([=](int i) { return value(p[i] & 15); }), each([=](int i) { return value(p[i] >> 4); })};
}
// What the scale of low nibbles is to be multiplied with.
template <bool Signed>
constexpr float kLowUnit = 1.0f;

// acc + x in the lanes whose bit is set; `bits` are those of a line of 64 lanes, of which this is vector `v`.
inline Vec add_where(Vec acc, const uint8_t* bits, int v, Vec x) {
  return each([=](int i) { return bits[v] >> i & 1 ? acc.v[i] + x.v[i] : acc.v[i]; });
}
inline void prefetch(const char* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

}  // namespace dejavu::portable
