// Every kernel, written once against Vec and compiled once an instruction set. Included by kernels_*.cpp after
// the vec_*.h of that set, inside namespace dejavu::<set>.

#include "rows.h"
#include "quantized.h"
#include "select.h"

// Neurons that one pass of the MLP holds: their rows in the caches, their activations in L1.
constexpr int64_t kBlock = 32;

// The order in which `count` adjacent rows are read, `streams` at a time: from as many parts of the range in turn. So
// the streams lie far apart and each runs on; four short rows in one page confuse the hardware's prefetchers
// (dense rows of C = 512 in bf16: 20 GB/s in plain order, 30 so).
inline int64_t spread(int64_t i, int64_t count, int64_t streams) {
  return count % streams ? i : i % streams * (count / streams) + i / streams;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // nearest, ties to even
}
inline void put(void* cache, DType type, int64_t at, float x) {
  if (type == DType::f32)
    static_cast<float*>(cache)[at] = x;
  else
    static_cast<uint16_t*>(cache)[at] = to_bf16(x);
}

inline float activate(float x, Act act, float threshold) {
  switch (act) {
    // Written so that what is not a number stays so: zero would hide a broken layer.
    case Act::relu: return x <= 0 ? 0.0f : x;
    case Act::fatrelu: return x <= threshold ? 0.0f : x;
    case Act::silu: return x / (1.0f + std::exp(-x));
    case Act::gelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case Act::gelu_tanh: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

// (count, stride) pointers into a batch: p, p + stride, ...
template <int Tag>
const float* const* pointers(const float* p, int64_t count, int64_t stride) {
  const float** out = scratch<const float*, Tag>(count);
  for (int64_t i = 0; i < count; ++i) out[i] = p + i * stride;
  return out;
}

template <class F>
void embed(const EmbedArgs& a, int64_t b) {
  using T = typename F::Element;
  check_index(a.ids[b] + a.offset, a.table_rows, "embed: row of the table");
  const T* row = static_cast<const T*>(a.table.data) + (a.ids[b] + a.offset) * a.table.stride;
  float* out = a.narrow_out ? scratch<float, 3>(a.table.width) : a.out + b * a.table.width;
  if (!a.add) std::fill_n(out, a.table.width, 0.0f);
  const float one = 1;
  F(a.table).template axpy<1, 1>(&row, nullptr, &one, 0, 0, &out);
  if (a.narrow_out) std::transform(out, out + a.table.width, a.narrow_out + b * a.table.width, to_bf16);
}

void reduce(const ReduceArgs& a, int64_t unit) {
  const int64_t chunks = ceil_div(a.width, kReduceColumns), b = unit / chunks;
  const int64_t first = unit % chunks * kReduceColumns, count = std::min(kReduceColumns, a.width - first);
  const float* part = a.partials + b * a.width + first;
  float* x = a.x + b * a.width + first;
  for_vecs(count, [&](int64_t i, int64_t n) {
    Vec total = load(part + i, n);
    for (int64_t s = 1; s < a.slices; ++s) total = add(total, load(part + s * a.batch.size * a.width + i, n));
    if (a.bias) total = add(total, load(a.bias + first + i, n));
    store(x + i, add(load(x + i, n), total), n);
  });
}

void norm(const NormArgs& a, int64_t b) {
  const float* x = a.x + b * a.width;
  float* y = a.y + b * a.width;
  const float width = static_cast<float>(a.width);
  float mean = 0, scale = 1;
  if (a.kind == NormKind::layer) mean = sum(fold(x, a.width, zero(), 0, [](Vec s, Vec v) { return add(s, v); })) / width;
  if (a.kind != NormKind::none) {
    const Vec minus = set1(-mean);
    const Vec squares = fold(x, a.width, zero(), mean, [&](Vec s, Vec v) {
      v = add(v, minus);
      return fma(v, v, s);
    });
    scale = 1.0f / std::sqrt(sum(squares) / width + a.eps);
  }
  for_vecs(a.width, [&](int64_t i, int64_t n) {
    Vec v = mul(add(load(x + i, n), set1(-mean)), set1(scale));
    if (a.weight) v = mul(v, load(a.weight + i, n));
    if (a.bias) v = add(v, load(a.bias + i, n));
    store(y + i, v, n);
  });
}

template <class F>
void linear(const LinearArgs& a, int64_t unit) {
  using T = typename F::Element;
  constexpr int64_t S = F::kStreams;
  const int64_t first = unit * a.rows_per_unit, count = std::min(a.rows_per_unit, a.rows - first), B = a.batch.live();
  const T** rows = scratch<const T*, 0>(count + S);
  auto row = [&](int64_t i) { return static_cast<const T*>(a.weight.data) + std::min(i, a.rows - 1) * a.weight.stride; };
  for (int64_t i = 0; i < count; ++i) rows[i] = row(first + spread(i, count, S));
  // Then the next unit's: likely this thread's, and in the shared cache if not.
  for (int64_t k = 0; k < S; ++k) rows[count + k] = row(first + count + spread(k, a.rows_per_unit, S));
  float* out = scratch<float, 3>(count * B);
  const F format(a.weight);
  const typename F::Inputs x(format, pointers<1>(a.x, B, a.weight.width), B);
  dot_rows(format, rows, count, count + S, x, B, out, B, 1);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0, n = first + spread(i, count, S); b < B; ++b)
      a.out[b * a.rows + n] = out[i * B + b] + (a.bias ? a.bias[n] : 0.0f);
}

// One unit: a share of the D rows of one part (a query head, the keys or the values) of one group, for all the
// tokens that need it. With rotary positions rows i and i + D/2 go together, since they rotate each other.
template <class F>
void qkv(const QkvArgs& a, int64_t unit) {
  using T = typename F::Element;
  const int64_t G = a.groups, r = a.heads_per_group, D = a.head_dim, C = a.blocks.width, S = F::kStreams;
  const int64_t index = unit / a.splits, split = unit % a.splits;
  const int64_t id = a.plan ? a.plan[1 + index] : index;
  const int64_t g = id / (r + 2), part = id % (r + 2);
  const bool is_q = part < r, rotary = a.cos_sin && part <= r;
  const int32_t* pending_from = a.plan ? a.plan + 1 + G * (r + 2) : nullptr;
  if (unit == 0 && !a.plan && a.attn_read) {  // everything; a plan counts by itself
    const int64_t read[] = {G * r, G, G};
    for (int k = 0; k < 3; ++k) a.attn_read[k] += read[k];
  }

  // What is projected: the step's tokens, or all that wait in this group; the newest of a row are not in the ring alone.
  const bool lazy = a.hidden && !is_q;
  const int64_t live = a.batch.live(), most = live * (lazy ? a.ring + 1 : 1);
  const float** x = scratch<const float*, 1>(most);
  int64_t* where = scratch<int64_t, 2>(2 * most);
  int64_t tokens = 0;
  for (int64_t n = 0; n < live; ++n) {
    check_index(a.positions[n], a.capacity, "attn_qkv: position");
    check_index(a.batch.rows[n], a.cache_rows, "attn_qkv: row");
  }
  for (int64_t n = 0; n < live; ++n)
    for (int64_t t = lazy ? pending_from[n * G + g] : a.positions[n]; t <= a.positions[n]; ++t, ++tokens) {
      x[tokens] = t < a.positions[n] ? a.hidden + (a.batch.rows[n] * a.ring + t % a.ring) * C : a.x + n * C;
      where[2 * tokens] = n;
      where[2 * tokens + 1] = t;
    }

  const int64_t pairs = rotary ? D / 2 : D, low = split * pairs / a.splits, high = (split + 1) * pairs / a.splits;
  const int64_t half = high - low, count = rotary ? 2 * half : half;
  const T* block = static_cast<const T*>(a.blocks.data) + (g * (2 * r + 2) + part) * D * a.blocks.stride;
  const T** rows = scratch<const T*, 0>(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = spread(k, count, S);
    rows[k] = block + (i < half ? low + i : low + i - half + D / 2) * a.blocks.stride;
  }
  float* out = scratch<float, 3>(2 * count * tokens);
  float* in_order = out + count * tokens;
  const F format(a.blocks);
  dot_rows(format, rows, count, count, typename F::Inputs(format, x, tokens), tokens, out, tokens, 1);
  for (int64_t k = 0; k < count; ++k) std::copy_n(out + k * tokens, tokens, in_order + spread(k, count, S) * tokens);

  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t n = where[2 * t], position = where[2 * t + 1];
    const int64_t cached = ((a.batch.rows[n] * G + g) * a.capacity + position) * D;
    auto write = [&](int64_t d, float value) {
      if (is_q)
        a.q[(n * G * r + g * r + part) * D + d] = value;
      else
        put(part == r ? a.k_cache : a.v_cache, a.cache_type, cached + d, value);
    };
    auto value = [&](int64_t i, int64_t d) {
      return in_order[i * tokens + t] + (a.bias ? a.bias[(g * (r + 2) + part) * D + d] : 0.0f);
    };
    for (int64_t i = 0; i < half; ++i) {
      const int64_t d = low + i;
      if (!rotary) {
        write(d, value(i, d));
        continue;
      }
      const float cos = a.cos_sin[position * D + d], sin = a.cos_sin[position * D + D / 2 + d];
      const float u = value(i, d), v = value(i + half, d + D / 2);
      write(d, u * cos - v * sin);
      write(d + D / 2, v * cos + u * sin);
    }
  }
}

// One unit: one token and one group, for all its selected heads, which share the cache's stream.
template <class T>
void attend(const AttendArgs& a, int64_t unit) {
  const int64_t G = a.groups, r = a.heads_per_group, D = a.head_dim, token = unit / G, g = unit % G;
  const float** q = scratch<const float*, 1>(r);
  float** out = scratch<float*, 2>(r);
  int64_t heads = 0;
  for (int64_t i = 0, n = a.heads.size(G * r); i < n; ++i) {
    const int64_t h = a.heads.at(i);
    check_index(h, G * r, "attend: selected head");
    if (h / r != g) continue;
    q[heads] = a.q + (token * G * r + h) * D;
    out[heads++] = a.out + (token * G * r + h) * D;
  }
  if (heads == 0) return;

  check_index(a.positions[token], a.capacity, "attend: position");
  check_index(a.batch.rows[token], a.cache_rows, "attend: row");
  const int64_t end = a.positions[token] + 1, begin = a.window ? std::max<int64_t>(0, end - a.window) : 0, n = end - begin;
  const int64_t at = ((a.batch.rows[token] * G + g) * a.capacity + begin) * D;
  float* scores = scratch<float, 3>(heads * n);  // (heads, n)
  const T** rows = scratch<const T*, 0>(2 * n);
  for (int64_t s = 0; s < n; ++s) {
    rows[s] = static_cast<const T*>(a.k_cache) + at + s * D;
    rows[n + s] = static_cast<const T*>(a.v_cache) + at + s * D;
  }
  const Plain<T> format(D);
  dot_rows(format, rows, n, 2 * n, FloatInputs(format, q, heads), heads, scores, 1, n);

  const Vec scale = set1(a.scale);
  for (int64_t h = 0; h < heads; ++h) {
    float* p = scores + h * n;
    const float lowest = -std::numeric_limits<float>::infinity();
    const Vec top = fold(p, n, set1(lowest), lowest, [](Vec m, Vec v) { return max(m, v); });
    float lanes[Vec::kLanes];
    store(lanes, top);
    const Vec shift = set1(-a.scale * *std::max_element(lanes, lanes + Vec::kLanes));
    for_vecs(n, [&](int64_t i, int64_t m) { store(p + i, exp(fma(load(p + i, m), scale, shift)), m); });
    const float total = sum(fold(p, n, zero(), 0, [](Vec s, Vec v) { return add(s, v); }));
    const Vec inverse = set1(1.0f / total);
    for_vecs(n, [&](int64_t i, int64_t m) { store(p + i, mul(load(p + i, m), inverse), m); });
    std::fill_n(out[h], D, 0.0f);
  }
  axpy_rows(format, rows + n, n, n, scores, 1, n, out, heads);
}

template <class F>
void attn_out(const AttnOutArgs& a, int64_t slice) {
  using T = typename F::Element;
  const F format(a.blocks);
  const int64_t r = a.heads_per_group, D = a.head_dim, C = a.blocks.width, all = a.heads.size(a.groups * r) * D;
  const int64_t low = slice * all / a.slices, high = (slice + 1) * all / a.slices;
  const int64_t B = a.batch.live();
  float* part = a.partials + slice * a.batch.size * C;
  std::fill_n(part, B * C, 0.0f);
  float** out = scratch<float*, 2>(B);
  for (int64_t b = 0; b < B; ++b) out[b] = part + b * C;
  const T** rows = scratch<const T*, 0>(high - low);
  for (int64_t i = low; i < high; ++i) {
    const int64_t h = a.heads.at(i / D);
    check_index(h, a.groups * r, "attn_out: selected head");
    const int64_t row = ((h / r) * (2 * r + 2) + r + 2 + h % r) * D + i % D;
    rows[i - low] = static_cast<const T*>(a.blocks.data) + row * a.blocks.stride;
  }
  for (int64_t i = low; i < high;) {
    const int64_t count = std::min(high, (i / D + 1) * D) - i;  // up to the end of this head
    const float* o = a.o + a.heads.at(i / D) * D + i % D;
    axpy_rows(format, rows + (i - low), count, high - i, o, 1, a.groups * r * D, out, B);
    i += count;
  }
}

// One unit: a slice of the selected neurons, block by block: dot products with their input rows, the activation,
// then the sum of the output rows of those that stayed open.
template <class F>
void mlp(const MlpArgs& a, int64_t slice) {
  using T = typename F::Element;
  const F format(a.rows);
  const int64_t B = a.batch.live(), C = a.rows.width, kinds = a.row_kinds, all = a.neurons.size(a.neurons_total);
  // Whole groups of rows that are read at a time, so that few are left to be read singly.
  const int64_t tiles = ceil_div(all, F::kStreams);
  const int64_t low = std::min(all, slice * tiles / a.slices * F::kStreams);
  const int64_t high = std::min(all, (slice + 1) * tiles / a.slices * F::kStreams);
  const bool gated = kinds == 3;
  float* part = a.partials + slice * a.batch.size * C;
  std::fill_n(part, B * C, 0.0f);
  float** out = scratch<float*, 2>(B);
  for (int64_t b = 0; b < B; ++b) out[b] = part + b * C;
  const typename F::Inputs x(format, pointers<1>(a.x, B, C), B);
  float* h = scratch<float, 3>(2 * kBlock * B);
  float* up = h + kBlock * B;
  int64_t read[3] = {0, 0, 0};

  constexpr int64_t S = F::kStreams;
  const T* rows[kBlock + S];
  auto row = [&](int64_t neuron, int64_t kind) {
    return static_cast<const T*>(a.rows.data) + (neuron * kinds + kind) * a.rows.stride;
  };
  for (int64_t i = low; i < high; i += kBlock) {
    const int64_t count = std::min(kBlock, high - i);
    int64_t neuron[kBlock];
    for (int64_t k = 0; k < count; ++k) {
      neuron[k] = a.neurons.at(i + k);
      check_index(neuron[k], a.neurons_total, "mlp: selected neuron");
    }

    // Rows of `kind` of the neurons that are still open, and after them the first rows to be read next: those of
    // the next kind, or the first kind of the next block where it isn't known yet which will be read.
    auto list = [&](int64_t kind, int64_t open) {
      for (int64_t k = 0; k < open; ++k) rows[k] = row(neuron[k], kind);
      const bool next_block = a.skip_zeros || kind + 1 == kinds;
      for (int64_t k = 0; k < S; ++k)
        rows[open + k] = next_block ? row(a.neurons.at(std::min(i + count + k, all - 1)), 0)
                                    : row(neuron[std::min(k, open - 1)], kind + 1);
      read[kind] += open;
    };
    auto dots = [&](int64_t kind, int64_t open, float* to) {
      list(kind, open);
      dot_rows(format, rows, open, open + S, x, B, to, B, 1);
      if (a.bias)
        for (int64_t k = 0; k < open; ++k)
          for (int64_t b = 0; b < B; ++b) to[k * B + b] += a.bias[neuron[k] * (kinds - 1) + kind];
    };
    // Keeps the neurons that are open for any token, in their order.
    auto keep_open = [&](int64_t open) {
      if (!a.skip_zeros) return open;
      int64_t kept = 0;
      for (int64_t k = 0; k < open; ++k) {
        if (std::all_of(h + k * B, h + (k + 1) * B, [](float v) { return v == 0.0f; })) continue;
        neuron[kept] = neuron[k];
        std::copy_n(h + k * B, B, h + kept++ * B);
      }
      return kept;
    };

    dots(0, count, h);
    for (int64_t k = 0; k < count * B; ++k) h[k] = activate(h[k], a.act, a.threshold);
    int64_t open = keep_open(count);
    if (gated && open) {
      dots(1, open, up);
      for (int64_t k = 0; k < open * B; ++k) h[k] *= a.activate_up ? activate(up[k], a.act, a.threshold) : up[k];
      open = keep_open(open);
    }
    if (open) {
      list(kinds - 1, open);
      axpy_rows(format, rows, open, open + S, h, B, 1, out, B);
    }
  }
  if (a.rows_read)
    for (int64_t k = 0; k < kinds; ++k) __atomic_fetch_add(a.rows_read + k, read[k], __ATOMIC_RELAXED);
}

// Reads memory as the row loops do, and does nothing else: the yardstick.
void read_memory(const ReadArgs& a, int64_t unit) {
  const int64_t first = unit * a.bytes_per_unit, n = std::min(a.bytes_per_unit, a.bytes - first) / 16;
  const float* p = reinterpret_cast<const float*>(a.data + first);
  const float* rows[2 * kRows];
  for (int r = 0; r < 2 * kRows; ++r) rows[r] = p + r * n;  // the last four lie in the unit after this one
  Vec acc[kRows] = {zero(), zero(), zero(), zero()};
  for_lines<float, kRows>(rows, rows + kRows, n, [&](int64_t i) {
    for (int v = 0; v < Lines<float>::kVecs; ++v, i += Vec::kLanes)
      for (int r = 0; r < kRows; ++r) acc[r] = add(acc[r], load(rows[r] + i));
  });
  a.sink[unit] = sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

using F32 = Plain<float>;
using Bf16 = Plain<uint16_t>;

inline const Kernels& table(const char* name) {
  static const Kernels kernels = {
      name,
      {embed<F32>, embed<Bf16>, embed<Int8>, embed<Int4<false>>, embed<Int4<true>>, nullptr},
      reduce,
      norm,
      {linear<F32>, linear<Bf16>, linear<Int8>, linear<Int4<false>>, linear<Int4<true>>, linear<Signs>},
      {qkv<F32>, qkv<Bf16>, qkv<Int8>, qkv<Int4<false>>, qkv<Int4<true>>, nullptr},
      {attend<float>, attend<uint16_t>},
      {attn_out<F32>, attn_out<Bf16>, attn_out<Int8>, attn_out<Int4<false>>, attn_out<Int4<true>>, nullptr},
      {mlp<F32>, mlp<Bf16>, mlp<Int8>, mlp<Int4<false>>, mlp<Int4<true>>, nullptr},
      select_cut,
      select,
      read_memory,
  };
  return kernels;
}
