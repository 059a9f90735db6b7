#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "ops.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"

namespace dejavu::avx2 {
#include "kernels.inl"
}  // namespace dejavu::avx2

const dejavu::Kernels* dejavu::kernels_avx2() {
  static const bool runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &avx2::table("avx2") : nullptr;
}
#else
const dejavu::Kernels* dejavu::kernels_avx2() { return nullptr; }
#endif
