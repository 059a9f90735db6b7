#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "vec_portable.h"

namespace dejavu::portable {
#include "kernels.inl"
}  // namespace dejavu::portable

const dejavu::Kernels* dejavu::kernels_portable() { return &portable::table("portable"); }
