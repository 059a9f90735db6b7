// The decode step's ops as plain data: what a kernel reads and writes, and how its work divides into units.
//
// An op becomes one or more nodes of a tape. A node's work is a number of units that any thread may take;
// no unit writes what another reads, so a result does not depend on threads or timing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace dejavu {

// In a build with DEJAVU_CHECK kernels look at every index that they are given; in others that costs nothing.
inline void check_index([[maybe_unused]] int64_t i, [[maybe_unused]] int64_t n, [[maybe_unused]] const char* what) {
#ifdef DEJAVU_CHECK
  if (i < 0 || i >= n)
    throw std::out_of_range(std::string(what) + " must be in [0, " + std::to_string(n) + "), found " + std::to_string(i));
#endif
}

// Of caches.
enum class DType : int { f32 = 0, bf16 = 1 };
inline constexpr int kDTypes = 2;

// Of weights; int4z has a zero point. The layouts are described in kernels/quantized.py.
enum class Format : int { f32 = 0, bf16, int8, int4, int4z, signs };
inline constexpr int kFormats = 6;

// Rows of weights: `width` values each, `stride` elements (quantised: bytes) apart, with a scale for each `group`.
struct Rows {
  const void* data;
  int64_t width, stride, group;
};

// What a family may vary, by the names that Python passes.
enum class Act : int { relu = 0, fatrelu, silu, gelu, gelu_tanh };
inline constexpr const char* kActs[] = {"relu", "fatrelu", "silu", "gelu", "gelu_tanh"};
enum class NormKind : int { none = 0, layer, rms };
inline constexpr const char* kNormKinds[] = {"none", "layer", "rms"};

// First `count[0]` entries of `idx`, which has `capacity`, are selected; idx == nullptr selects all.
struct Selection {
  const int32_t* idx = nullptr;
  const int32_t* count = nullptr;
  int64_t capacity = 0;
  int64_t size(int64_t all) const { return idx ? std::clamp<int64_t>(*count, 0, capacity) : all; }
  int64_t at(int64_t i) const { return idx ? idx[i] : i; }
};

// The tokens of a step: the first `live()` of `size`. `rows` are those of the cache; behind them one below 0 is padding.
struct Batch {
  const int32_t* rows = nullptr;  // null: all are real
  int64_t size = 0;
  int64_t live() const {
    if (!rows) return size;
    return std::partition_point(rows, rows + size, [](int32_t row) { return row >= 0; }) - rows;
  }
};

struct EmbedArgs {
  const int32_t* ids;
  Rows table;            // (V, E)
  float* out;            // (N, E)
  uint16_t* narrow_out;  // (N, E) bf16, in place of out, or null
  Batch batch;
  int64_t offset, table_rows;
  bool add;  // out += table[ids + offset], else out = table[ids]
};

struct ReduceArgs {
  float* x;               // (N, C), mutated
  const float* partials;  // (S, N, C)
  const float* bias;      // (C,) or null
  Batch batch;
  int64_t slices, width;
};

struct NormArgs {
  const float* x;  // (N, C)
  const float* weight;
  const float* bias;
  float* y;  // (N, C)
  Batch batch;
  int64_t width;
  NormKind kind;
  float eps;
};

struct LinearArgs {
  const float* x;     // (N, C)
  Rows weight;        // (M, C)
  const float* bias;  // (M,) or null
  float* out;         // (N, M)
  Batch batch;
  int64_t rows, rows_per_unit;
};

struct QkvArgs {
  const float* x;        // (N, C)
  Rows blocks;           // (G, 2r+2, D, C)
  const float* bias;     // (G, r+2, D) or null
  const float* cos_sin;  // (M, D) or null
  Batch batch;
  const int32_t* positions;
  void* k_cache;  // (R, G, S, D)
  void* v_cache;
  float* q;            // (N, H, D)
  float* hidden;       // (R, Q, C) or null: keys and values are lazy
  int32_t* kv_len;     // (R, G)
  int64_t* attn_read;  // (3,) or null
  int32_t* plan;       // scratch: see PlanNode
  Selection heads;
  DType cache_type;
  int64_t cache_rows, groups, heads_per_group, head_dim, capacity, ring, pending, splits;
};

struct AttendArgs {
  const float* q;  // (N, H, D)
  const void* k_cache;
  const void* v_cache;
  Batch batch;
  const int32_t* positions;
  float* out;  // (N, H, D)
  Selection heads;
  int64_t cache_rows, groups, heads_per_group, head_dim, capacity, window;  // window 0: none
  float scale;
};

struct AttnOutArgs {
  const float* o;  // (N, H, D)
  Rows blocks;
  float* partials;  // (S, N, C)
  Selection heads;
  Batch batch;
  int64_t groups, heads_per_group, head_dim, slices;
};

struct MlpArgs {
  const float* x;  // (N, C)
  Rows rows;       // (I, R, C)
  const float* bias;
  float* partials;  // (S, N, C)
  int64_t* rows_read;  // (R,) or null
  Selection neurons;
  Batch batch;
  int64_t neurons_total, row_kinds, slices;
  Act act;
  float threshold;
  bool activate_up, skip_zeros;
};

// What the k largest of n scores are: those whose `key` is above, and the first `ties` whose key equals it.
struct Cut {
  uint32_t key = 0;
  int64_t ties = 0;
};

struct SelectArgs {
  const float* scores;  // (N, U)
  int32_t* idx;         // (capacity,)
  int32_t* count;       // (1,)
  Cut* cuts;            // (N,), for top-k
  Batch batch;
  int64_t total, capacity, k;  // k = 0: by threshold
  float threshold;
};
struct CutArgs : SelectArgs {};  // the first half of top-k, whose units are tokens

struct ReadArgs {
  const char* data;
  int64_t bytes, bytes_per_unit;
  float* sink;  // one a unit
};

// One table an instruction set; null where a format has no such kernel. A kernel runs one unit of its node; `units` says how many there are.
struct Kernels {
  const char* name;
  void (*embed[kFormats])(const EmbedArgs&, int64_t unit);
  void (*reduce)(const ReduceArgs&, int64_t unit);
  void (*norm)(const NormArgs&, int64_t unit);
  void (*linear[kFormats])(const LinearArgs&, int64_t unit);
  void (*qkv[kFormats])(const QkvArgs&, int64_t unit);
  void (*attend[kDTypes])(const AttendArgs&, int64_t unit);
  void (*attn_out[kFormats])(const AttnOutArgs&, int64_t unit);
  void (*mlp[kFormats])(const MlpArgs&, int64_t unit);
  void (*select_cut)(const CutArgs&, int64_t unit);
  void (*select)(const SelectArgs&, int64_t unit);
  void (*read)(const ReadArgs&, int64_t unit);
};

inline constexpr int64_t kReduceColumns = 512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t units(const EmbedArgs& a) { return a.batch.live(); }
inline int64_t units(const ReduceArgs& a) { return a.batch.live() * ceil_div(a.width, kReduceColumns); }
inline int64_t units(const NormArgs& a) { return a.batch.live(); }
inline int64_t units(const LinearArgs& a) { return ceil_div(a.rows, a.rows_per_unit); }
inline int64_t units(const QkvArgs& a) {
  return (a.plan ? a.plan[0] : a.groups * (a.heads_per_group + 2)) * a.splits;
}
inline int64_t units(const AttendArgs& a) { return a.batch.live() * a.groups; }
inline int64_t units(const AttnOutArgs& a) { return a.slices; }
inline int64_t units(const MlpArgs& a) { return a.slices; }
inline int64_t units(const CutArgs& a) { return a.batch.live(); }
inline int64_t units(const SelectArgs&) { return 1; }
inline int64_t units(const ReadArgs& a) { return ceil_div(a.bytes, a.bytes_per_unit); }

// Instruction sets, best first; null where this build or this machine lacks one.
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

}  // namespace dejavu
