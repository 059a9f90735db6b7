#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "ops.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)
#include "vec_avx512.h"

namespace dejavu::avx512 {
#include "kernels.inl"
}  // namespace dejavu::avx512

const dejavu::Kernels* dejavu::kernels_avx512() {
  static const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni");
  return runs ? &avx512::table("avx512") : nullptr;
}
#else
const dejavu::Kernels* dejavu::kernels_avx512() { return nullptr; }
#endif
