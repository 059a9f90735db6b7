// Python's view of the library: memory, threads, and the tape that decode steps are recorded on.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace dejavu {
namespace {

using Array = nb::ndarray<nb::device::cpu>;
using MaybeArray = std::optional<Array>;

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

const Kernels* find_kernels(const std::string& isa) {
  const Kernels* all[] = {kernels_avx512(), kernels_avx2(), kernels_portable()};
  for (const Kernels* k : all)
    if (k && (isa.empty() || isa == k->name)) return k;
  return nullptr;
}

// Shared: a replay that has begun keeps its threads when another thread changes their number. Never destroyed, and
// started at first use: the threads do not exist in a child of fork(), where nobody may wait for them.
alignas(std::shared_ptr<Pool>) unsigned char pool_storage[sizeof(std::shared_ptr<Pool>)];
std::shared_ptr<Pool>& pool = *new (pool_storage) std::shared_ptr<Pool>();
int pool_size = 1;

std::shared_ptr<Pool> current_pool() {
  if (!pool) pool = std::make_shared<Pool>(pool_size);
  return pool;
}
const Kernels* kernels = find_kernels("");

bool contiguous(const Array& a) {
  int64_t stride = 1;
  for (size_t i = a.ndim(); i-- > 0; stride *= static_cast<int64_t>(a.shape(i)))
    if (a.shape(i) > 1 && a.stride(i) != stride) return false;
  return true;
}

DType float_type(const Array& a) {
  const auto code = static_cast<nb::dlpack::dtype_code>(a.dtype().code);
  if (code == nb::dlpack::dtype_code::Float && a.dtype().bits == 32) return DType::f32;
  require(code == nb::dlpack::dtype_code::Bfloat && a.dtype().bits == 16, "weights must be float32 or bfloat16");
  return DType::bf16;
}

// An array whose last dimension is a row of weights: plain, or of `bits` bits as kernels/quantized.py lays them out.
struct Weights {
  Array array;
  Format format;
  int64_t width, group = 0;

  explicit Weights(const Array& a) : array(a), format(Format(float_type(a))), width(a.shape(a.ndim() - 1)) {}
  Weights(const Array& a, int64_t row_width, int bits, int64_t row_group, bool zero_point)
      : array(a), width(row_width), group(row_group) {
    require(a.dtype() == nb::dtype<uint8_t>() && a.ndim() > 0, "quantised rows must be uint8");
    require(bits == 8 || bits == 1 || (bits == 4 && (group == 32 || group == 64 || group == 128)),
            "unknown format of quantised rows");
    format = bits == 8 ? Format::int8 : bits == 1 ? Format::signs : zero_point ? Format::int4z : Format::int4;
    const int64_t padded = ceil_div(width, 64) * 64, scales = bits == 4 ? 2 * ceil_div(padded, group) : 4;
    const int64_t bytes = padded * bits / 8 + scales * (zero_point ? 2 : 1);
    const int64_t align = bytes < 256 ? 16 : 64;
    require(width > 0 && stride() == ceil_div(bytes, align) * align, "quantised rows have the wrong size");
  }
  size_t ndim() const { return array.ndim(); }
  int64_t shape(size_t i) const { return i + 1 == ndim() ? width : array.shape(i); }
  // Elements from row to row, and their size in bytes.
  int64_t stride() const { return array.shape(ndim() - 1); }
  int64_t row_bytes() const { return stride() * array.itemsize(); }
};

// A node is one kernel with its arguments.
template <class Args>
struct KernelNode final : Pool::Node {
  Args args;
  void (*kernel)(const Args&, int64_t);
  const char* op;
  KernelNode(const Args& a, void (*k)(const Args&, int64_t), const char* name) : args(a), kernel(k), op(name) {}
  const char* name() const override { return op; }
  int64_t units() const override { return dejavu::units(args); }
  void run(int64_t unit) const override { kernel(args, unit); }
};

// Which parts (query heads, keys, values) of which groups this step projects, and from which token on.
// plan = [number of parts, parts (group * (r+2) + part) ..., first token to project for each (n, g)].
// It counts what is read, and with lazy keys and values it also stores the step's inputs and advances kv_len.
struct PlanNode final : Pool::Node {
  QkvArgs args;
  explicit PlanNode(const QkvArgs& a) : args(a) {}
  const char* name() const override { return "attn_qkv plan"; }
  int64_t units() const override { return 1; }
  void run(int64_t) const override {
    const QkvArgs& a = args;
    const int64_t G = a.groups, r = a.heads_per_group, N = a.batch.live(), C = a.blocks.width;
    const int32_t* rows = a.batch.rows;
    int32_t *count = a.plan, *parts = a.plan + 1, *first = parts + G * (r + 2);
    *count = 0;
    for (int64_t n = 0; a.hidden && n < N; ++n) {
      check_index(rows[n], a.cache_rows, "attn_qkv: row");
      check_index(a.positions[n], a.capacity, "attn_qkv: position");
      std::copy_n(a.x + n * C, C, a.hidden + (rows[n] * a.ring + a.positions[n] % a.ring) * C);
    }
    int64_t i = 0, groups = 0, projected = 0;
    const int64_t selected = a.heads.size(G * r);
    for (int64_t g = 0; g < G; ++g) {
      const int64_t before = i;
      for (; i < selected && a.heads.at(i) < (g + 1) * r; ++i)
        parts[(*count)++] = static_cast<int32_t>(g * (r + 2) + a.heads.at(i) - g * r);
      groups += i > before;
      bool project = i > before || !a.hidden;
      for (int64_t n = 0; a.hidden && n < N; ++n) {
        const int32_t known = a.kv_len[rows[n] * G + g];
        // Of several tokens of a row the first also sees to those that have waited.
        first[n * G + g] = n > 0 && rows[n - 1] == rows[n] ? a.positions[n] : known;
        project |= a.positions[n] + 1 - known >= a.pending;
      }
      if (!project) continue;
      ++projected;
      for (int64_t part = r; part < r + 2; ++part) parts[(*count)++] = static_cast<int32_t>(g * (r + 2) + part);
      for (int64_t n = 0; a.hidden && n < N; ++n) a.kv_len[rows[n] * G + g] = a.positions[n] + 1;
    }
    if (a.attn_read) {
      const int64_t read[] = {i, groups, projected};
      for (int k = 0; k < 3; ++k) a.attn_read[k] += read[k];
    }
  }
};

// Ops recorded in order, replayed in one call. Holds on to every array it was given.
class Tape {
 public:
  Tape() = default;
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  void replay() {
    const std::shared_ptr<Pool> threads = current_pool();
    nb::gil_scoped_release release;
    threads->run(order_.data(), order_.size());
  }

  size_t size() const { return order_.size(); }

  // Replays once and tells each node's op and seconds, in order.
  std::vector<std::pair<std::string, double>> replay_timed() {
    const std::shared_ptr<Pool> threads = current_pool();
    std::vector<Pool::Clock::time_point> began(order_.size() + 1);
    {
      nb::gil_scoped_release release;
      threads->run(order_.data(), order_.size(), began.data());
      began.back() = Pool::Clock::now();
    }
    std::vector<std::pair<std::string, double>> out;
    for (size_t i = 0; i < order_.size(); ++i)
      out.emplace_back(order_[i]->name(), std::chrono::duration<double>(began[i + 1] - began[i]).count());
    return out;
  }

  void embed(const Array& ids, const Array& cache_rows, const Weights& table, const Array& out, int64_t offset, bool add) {
    const Batch batch{ints(cache_rows), int64_t(ids.shape(0))};
    require(out.ndim() == 2 && int64_t(out.shape(0)) == batch.size && int64_t(out.shape(1)) == table.width, "embed: shapes");
    const bool narrow = float_type(out) == DType::bf16;
    require(!(narrow && add), "embed: rows are added in float32");
    float* wide = narrow ? nullptr : floats(out);
    uint16_t* rounded = narrow ? static_cast<uint16_t*>(raw(out)) : nullptr;
    push(EmbedArgs{ints(ids), rows(table), wide, rounded, batch, offset, table.shape(0), add},
         kernels->embed[int(table.format)], "embed");
  }

  void add_norm(const Array& x, const MaybeArray& partials, const MaybeArray& partial_bias, const MaybeArray& weight,
                const MaybeArray& bias, const MaybeArray& cache_rows, const Array& y, int kind, float eps) {
    const Batch batch = tokens(cache_rows, x.shape(0));
    const int64_t width = x.shape(1);
    if (partials) {
      require(int64_t(partials->shape(1)) == batch.size && int64_t(partials->shape(2)) == width, "add_norm: shapes");
      push(ReduceArgs{floats(x), floats(*partials), floats(partial_bias, width), batch, int64_t(partials->shape(0)),
                      width},
           kernels->reduce, "add");
    }
    NormArgs a{floats(x), floats(weight, width), floats(bias, width), floats(y), batch, width, NormKind(kind), eps};
    if (a.kind == NormKind::none) a.weight = a.bias = nullptr;
    push(a, kernels->norm, "norm");
  }

  void linear(const Array& x, const Weights& weight, const MaybeArray& bias, const MaybeArray& cache_rows,
              const Array& out) {
    const Batch batch = tokens(cache_rows, x.shape(0));
    const int64_t count = weight.shape(0);
    require(weight.ndim() == 2 && weight.width == int64_t(x.shape(1)) && int64_t(out.shape(1)) == count,
            "linear: shapes");
    // About 64 KB a unit, so that threads finish together, in whole groups of rows that are read at a time; two times
    // that for quantised rows, for which every unit prepares the inputs anew.
    const bool quantised = weight.format >= Format::int8;
    const int64_t streams = quantised ? 8 : 4, unit_bytes = quantised ? 131072 : 65536;
    const int64_t per_unit = ceil_div(std::max<int64_t>(1, unit_bytes / weight.row_bytes()), streams) * streams;
    push(LinearArgs{floats(x), rows(weight), floats(bias, count), floats(out), batch, count, per_unit},
         kernels->linear[int(weight.format)], "linear");
  }

  void attn_qkv(const Array& x, const Weights& blocks, const MaybeArray& bias, const MaybeArray& cos_sin,
                const Array& cache_rows, const Array& positions, const Array& k_cache, const Array& v_cache,
                const MaybeArray& head_idx, const MaybeArray& head_count, const MaybeArray& hidden,
                const MaybeArray& kv_len, int64_t pending, const MaybeArray& attn_read, const Array& q,
                const MaybeArray& plan) {
    QkvArgs a{};
    a.batch = {ints(cache_rows), int64_t(x.shape(0))};
    a.cache_rows = k_cache.shape(0);
    a.groups = blocks.shape(0), a.heads_per_group = (int64_t(blocks.shape(1)) - 2) / 2, a.head_dim = blocks.shape(2);
    a.capacity = k_cache.shape(2);
    require(blocks.width == int64_t(x.shape(1)) && int64_t(k_cache.shape(1)) == a.groups &&
                int64_t(k_cache.shape(3)) == a.head_dim,
            "attn_qkv: shapes");
    a.cache_type = float_type(k_cache);
    require(float_type(v_cache) == a.cache_type, "attn_qkv: keys and values must have one dtype");
    require(!cos_sin || a.head_dim % 2 == 0, "attn_qkv: rotary positions need an even head_dim");
    a.x = floats(x), a.blocks = rows(blocks), a.bias = floats(bias, a.groups * (a.heads_per_group + 2) * a.head_dim);
    a.cos_sin = cos_sin ? floats(*cos_sin) : nullptr;
    a.positions = ints(positions), a.k_cache = raw(k_cache), a.v_cache = raw(v_cache), a.q = floats(q);
    a.heads = selection(head_idx, head_count);
    if (hidden) {
      require(bool(kv_len), "attn_qkv: lazy keys and values need kv_len");
      a.hidden = floats(*hidden), a.ring = hidden->shape(1), a.pending = pending, a.kv_len = ints(*kv_len);
    }
    a.attn_read = counts(attn_read, 3);
    // About 128 KB a unit.
    const int64_t pairs = std::max<int64_t>(1, a.head_dim / 2);
    a.splits = std::clamp<int64_t>(a.head_dim * blocks.row_bytes() / 131072, 1, pairs);
    if (hidden || head_idx) {
      const size_t need = 1 + a.groups * (a.heads_per_group + 2) + a.batch.size * a.groups;
      require(plan && plan->size() >= need, "attn_qkv: plan is too small");
      a.plan = ints(*plan);
      own(std::make_unique<PlanNode>(a));
    }
    push(a, kernels->qkv[int(blocks.format)], "attn_qkv");
  }

  void attend(const Array& q, const Array& k_cache, const Array& v_cache, const Array& cache_rows,
              const Array& positions, const MaybeArray& head_idx, const MaybeArray& head_count, const Array& out,
              float scale, int64_t window) {
    AttendArgs a{};
    a.batch = {ints(cache_rows), int64_t(q.shape(0))}, a.cache_rows = k_cache.shape(0);
    a.groups = k_cache.shape(1), a.heads_per_group = int64_t(q.shape(1)) / a.groups;
    a.head_dim = q.shape(2), a.capacity = k_cache.shape(2), a.window = window, a.scale = scale;
    a.q = floats(q), a.k_cache = raw(k_cache), a.v_cache = raw(v_cache), a.positions = ints(positions);
    a.out = floats(out), a.heads = selection(head_idx, head_count);
    push(a, kernels->attend[int(float_type(k_cache))], "attend");
  }

  void attn_out(const Array& o, const Weights& blocks, const MaybeArray& head_idx, const MaybeArray& head_count,
                const MaybeArray& cache_rows, const Array& partials) {
    AttnOutArgs a{};
    a.batch = tokens(cache_rows, o.shape(0)), a.groups = blocks.shape(0);
    a.heads_per_group = (int64_t(blocks.shape(1)) - 2) / 2, a.head_dim = blocks.shape(2), a.slices = partials.shape(0);
    require(int64_t(o.shape(1)) == a.groups * a.heads_per_group && int64_t(o.shape(2)) == a.head_dim &&
                int64_t(partials.shape(2)) == blocks.width,
            "attn_out: shapes");
    a.o = floats(o), a.blocks = rows(blocks), a.partials = floats(partials), a.heads = selection(head_idx, head_count);
    push(a, kernels->attn_out[int(blocks.format)], "attn_out");
  }

  void mlp(const Array& x, const Weights& weights, const MaybeArray& bias, const MaybeArray& neuron_idx,
           const MaybeArray& neuron_count, const MaybeArray& cache_rows, const MaybeArray& rows_read,
           const Array& partials, int act, float threshold, bool activate_up, bool skip_zeros) {
    MlpArgs a{};
    a.batch = tokens(cache_rows, x.shape(0)), a.neurons_total = weights.shape(0), a.row_kinds = weights.shape(1);
    a.slices = partials.shape(0);
    require(weights.ndim() == 3 && weights.width == int64_t(x.shape(1)) && (a.row_kinds == 2 || a.row_kinds == 3), "mlp: shapes");
    a.x = floats(x), a.rows = rows(weights), a.bias = floats(bias, a.neurons_total * (a.row_kinds - 1));
    a.partials = floats(partials), a.neurons = selection(neuron_idx, neuron_count);
    a.rows_read = counts(rows_read, a.row_kinds);
    a.act = Act(act), a.threshold = threshold, a.activate_up = activate_up, a.skip_zeros = skip_zeros;
    push(a, kernels->mlp[int(weights.format)], "mlp");
  }

  // k > 0: the k best of each token; k = 0: what reaches the threshold for any token.
  void select(const Array& scores, const MaybeArray& cache_rows, const Array& idx, const Array& count, int64_t k,
              float threshold) {
    SelectArgs a{floats(scores), ints(idx), ints(count), nullptr, tokens(cache_rows, scores.shape(0)),
                 int64_t(scores.shape(1)), int64_t(idx.size()), std::min<int64_t>(k, scores.shape(1)), threshold};
    require(idx.size() >= 1 && count.size() == 1, "select: shapes");
    if (k > 0) {
      require(a.capacity >= std::min(a.total, a.batch.size * a.k), "select: the index buffer is too small for the union");
      cuts_.push_back(std::make_unique<Cut[]>(a.batch.size));
      a.cuts = cuts_.back().get();
      push(CutArgs{a}, kernels->select_cut, "select");
    }
    push(a, kernels->select, "select");
  }

 private:
  void* raw(const Array& a) {
    require(contiguous(a), "arrays must be contiguous");
    held_.push_back(a);
    return a.data();
  }
  Rows rows(const Weights& w) { return {raw(w.array), w.width, w.stride(), w.group}; }
  float* floats(const Array& a) {
    require(a.dtype() == nb::dtype<float>(), "expected float32");
    return static_cast<float*>(raw(a));
  }
  float* floats(const MaybeArray& a, int64_t size) {
    require(!a || int64_t(a->size()) == size, "a bias or a norm's parameters have the wrong size");
    return a ? floats(*a) : nullptr;
  }
  int64_t* counts(const MaybeArray& a, int64_t size) {
    require(!a || (a->dtype() == nb::dtype<int64_t>() && int64_t(a->size()) == size), "counts must be int64, one a kind");
    return a ? static_cast<int64_t*>(raw(*a)) : nullptr;
  }
  Batch tokens(const MaybeArray& rows, int64_t size) { return {rows ? ints(*rows) : nullptr, size}; }
  int32_t* ints(const Array& a) {
    require(a.dtype() == nb::dtype<int32_t>(), "expected int32");
    return static_cast<int32_t*>(raw(a));
  }
  Selection selection(const MaybeArray& idx, const MaybeArray& count) {
    require(bool(idx) == bool(count) && (!count || count->size() == 1), "a selection is an index and a count");
    return idx ? Selection{ints(*idx), ints(*count), int64_t(idx->size())} : Selection{};
  }
  void own(std::unique_ptr<Pool::Node> node) {
    order_.push_back(node.get());
    nodes_.push_back(std::move(node));
  }
  template <class Args>
  void push(const Args& args, void (*kernel)(const Args&, int64_t), const char* op) {
    require(kernel != nullptr, "this op does not exist for weights of this format");
    own(std::make_unique<KernelNode<Args>>(args, kernel, op));
  }

  std::vector<std::unique_ptr<Pool::Node>> nodes_;
  std::vector<const Pool::Node*> order_;
  std::vector<std::unique_ptr<Cut[]>> cuts_;
  std::vector<Array> held_;
};

nb::ndarray<nb::numpy, uint8_t> allocate_array(size_t bytes) {
  struct Block {
    void* data;
    size_t bytes;
  };
  auto* block = new Block{allocate(bytes), bytes};
  nb::capsule owner(block, [](void* p) noexcept {
    auto* b = static_cast<Block*>(p);
    release(b->data, b->bytes);
    delete b;
  });
  return {static_cast<uint8_t*>(block->data), {bytes}, owner};
}

// Best of `repeats` passes over `bytes` of memory with all threads, in bytes per second.
double read_bandwidth(size_t bytes, int repeats) {
  const std::shared_ptr<Pool> threads = current_pool();
  nb::gil_scoped_release release_gil;
  constexpr int64_t kUnit = 1 << 20;
  bytes = std::max<size_t>(bytes / kUnit, 1) * kUnit;
  // One unit more: the last one prefetches past its end.
  char* data = static_cast<char*>(allocate(bytes + kUnit));
  std::memset(data, 1, bytes + kUnit);
  std::vector<float> sink(bytes / kUnit);
  const ReadArgs args{data, static_cast<int64_t>(bytes), kUnit, sink.data()};
  const KernelNode<ReadArgs> node(args, kernels->read, "read");
  const Pool::Node* order[] = {&node};
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    threads->run(order, 1);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(bytes) / seconds.count());
  }
  release(data, bytes + kUnit);
  return best;
}

}  // namespace
}  // namespace dejavu

NB_MODULE(_native, m) {
  using namespace dejavu;
  m.def("allocate", &allocate_array, "bytes"_a, "Uninitialised memory in huge pages where the system gives them.");
  m.def("read_bandwidth", &read_bandwidth, "num_bytes"_a, "repeats"_a,
        "Best read bandwidth of `repeats` passes over `num_bytes` with all threads, in bytes per second.");
  m.def(
      "set_threads",
      [](int n) {
        pool = std::make_shared<Pool>(n);
        pool_size = n;
      },
      "n"_a);
  m.def("num_threads", [] { return pool_size; });
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { new (pool_storage) std::shared_ptr<Pool>(); });
#endif
  // In the order of the enums: the index is what an op takes.
  m.attr("ACTIVATIONS") = std::vector<std::string>(std::begin(kActs), std::end(kActs));
  m.attr("NORMS") = std::vector<std::string>(std::begin(kNormKinds), std::end(kNormKinds));
  m.def("isa", [] { return kernels->name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : {kernels_avx512(), kernels_avx2(), kernels_portable()})
      if (k) names.emplace_back(k->name);
    return names;
  });
  m.def(
      "set_isa",
      [](const std::string& isa) {
        const Kernels* found = find_kernels(isa);
        require(found != nullptr, "unknown or unavailable instruction set");
        kernels = found;
      },
      "isa"_a);
  nb::class_<Weights>(m, "Weights")
      .def(nb::init<const Array&>(), "array"_a)
      .def(nb::init<const Array&, int64_t, int, int64_t, bool>(), "array"_a, "width"_a, "bits"_a, "group"_a,
           "zero_point"_a);
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("replay", &Tape::replay)
      .def("replay_timed", &Tape::replay_timed)
      .def("__len__", &Tape::size)
      .def("embed", &Tape::embed)
      .def("add_norm", &Tape::add_norm)
      .def("linear", &Tape::linear)
      .def("attn_qkv", &Tape::attn_qkv)
      .def("attend", &Tape::attend)
      .def("attn_out", &Tape::attn_out)
      .def("mlp", &Tape::mlp)
      .def("select", &Tape::select);
}
