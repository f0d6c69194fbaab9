// Block-sparse attention on a CPU, and block energies from the same scores.
//
// `native_cpu.py` puts before this text: VALUE (float or double, what is computed in), ELEMENT (what
// the operands hold), HEAD_DIM (elements a head) and PADDED_DIM (those, rounded up to PANEL_KEYS).
//
// Keys are packed once a call, transposed in panels of PANEL_KEYS keys, so that scores of PANEL_KEYS keys are
// one row of vectors, whatever interval they belong to. A tile of ROWS queries then walks the kept
// intervals of its row in steps of at most STEP keys: scores, online softmax, product with the
// values. Scores, queries and the accumulator of a tile stay in the first-level cache.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<VALUE>;

constexpr int64_t WIDTH = Vec::size();
constexpr int64_t PANEL_KEYS = 16;                        // keys a panel: blocks are multiples of it
constexpr int64_t PANEL_VECTORS = PANEL_KEYS / WIDTH;
constexpr int64_t ROWS = 32;                         // queries a tile
constexpr int64_t STEP = 64;                         // most keys a softmax update
#ifdef CPU_CAPABILITY_AVX512
constexpr int64_t GROUP = 8;                         // queries whose sums are held in registers
#else
constexpr int64_t GROUP = 4;                         // there are half as many registers
#endif
constexpr int64_t MOST = 2;                          // vectors a query whose sums are held there
constexpr int64_t PANELS = std::max<int64_t>(1, MOST / PANEL_VECTORS);
constexpr int64_t OUTPUT_VECTORS = PADDED_DIM / WIDTH;
constexpr VALUE NOTHING = -std::numeric_limits<VALUE>::infinity();

static_assert(PANEL_KEYS % WIDTH == 0 && PADDED_DIM % PANEL_KEYS == 0 && STEP % PANEL_KEYS == 0);

struct Sizes {
  int64_t batch, heads, length_q, length_k, block_m, block_n;
  int64_t query_blocks() const { return (length_q + block_m - 1) / block_m; }
  int64_t key_blocks() const { return (length_k + block_n - 1) / block_n; }
  int64_t padded_keys() const { return (length_k + PANEL_KEYS - 1) / PANEL_KEYS * PANEL_KEYS; }
};

// Strides in elements of batch, head and token; the head dimension is contiguous.
struct Strides {
  int64_t batch, head, token;
};

struct alignas(64) Tile {
  VALUE q[ROWS * HEAD_DIM];      // scaled
  VALUE p[ROWS * STEP];          // scores, then probabilities relative to `top`
  VALUE out[ROWS * PADDED_DIM];  // relative to `top`
  VALUE top[ROWS];               // greatest score so far
  VALUE sum[ROWS];               // of the probabilities, relative to `top`
  VALUE shrink[ROWS];            // factor of earlier sums in this step
};

VALUE* allocate(int64_t count) {
  return static_cast<VALUE*>(::operator new(count * sizeof(VALUE), std::align_val_t(64)));
}

struct Free {
  void operator()(VALUE* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<VALUE, Free>;

// The model's token at a position of the sequence; without a table they are the same.
inline int64_t token_at(const int32_t* tokens, int64_t position) {
  return tokens ? tokens[position] : position;
}

// Which queries the rows of a head are. A row-shared head has `count` rows, at the positions
// `computed`; the output of each goes to its `targets`, (slots, count), up to a negative one.
struct HeadRows {
  int64_t count;
  const int32_t* computed = nullptr;  // null: a row for each position
  const int32_t* targets = nullptr;
  int64_t slots = 1;

  int64_t position(int64_t row) const { return token_at(computed, row); }
  int64_t target(int64_t row, int64_t slot) const {
    return targets ? targets[slot * count + row] : row;
  }
};

// Keys (length_k, HEAD_DIM) to panels [key / PANEL_KEYS][HEAD_DIM][PANEL_KEYS]; keys past the end are zero.
void pack_keys(
    const ELEMENT* keys, int64_t stride, const int32_t* tokens, int64_t first, int64_t length,
    VALUE* panel) {
  const int64_t inside = std::min(PANEL_KEYS, length - first);
  for (int64_t lane = 0; lane < inside; ++lane) {
    const ELEMENT* key = keys + token_at(tokens, first + lane) * stride;
    for (int64_t d = 0; d < HEAD_DIM; ++d) panel[d * PANEL_KEYS + lane] = static_cast<VALUE>(key[d]);
  }
  for (int64_t lane = inside; lane < PANEL_KEYS; ++lane)
    for (int64_t d = 0; d < HEAD_DIM; ++d) panel[d * PANEL_KEYS + lane] = 0;
}

// Values (length_k, HEAD_DIM) to rows of PADDED_DIM, zero from HEAD_DIM on.
void pack_values(
    const ELEMENT* values, int64_t stride, const int32_t* tokens, int64_t first, int64_t length,
    VALUE* rows) {
  const int64_t inside = std::min(PANEL_KEYS, length - first);
  for (int64_t lane = 0; lane < inside; ++lane) {
    VALUE* row = rows + lane * PADDED_DIM;
    const ELEMENT* value = values + token_at(tokens, first + lane) * stride;
    for (int64_t d = 0; d < HEAD_DIM; ++d) row[d] = static_cast<VALUE>(value[d]);
    for (int64_t d = HEAD_DIM; d < PADDED_DIM; ++d) row[d] = 0;
  }
}

// p[GROUP][N panels] = q[GROUP] . keys, all sums in registers.
template <int64_t N>
inline void score_panels(const VALUE* q, const VALUE* panels, VALUE* p) {
  Vec sums[GROUP][N * PANEL_VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = Vec(0);
  for (int64_t d = 0; d < HEAD_DIM; ++d) {
    Vec keys[N * PANEL_VECTORS];
#pragma GCC unroll 16
    for (int64_t n = 0; n < N * PANEL_VECTORS; ++n)
      keys[n] = Vec::loadu(
          panels + (n / PANEL_VECTORS) * HEAD_DIM * PANEL_KEYS + d * PANEL_KEYS + n % PANEL_VECTORS * WIDTH);
#pragma GCC unroll 16
    for (int64_t row = 0; row < GROUP; ++row) {
      const Vec query(q[row * HEAD_DIM + d]);
#pragma GCC unroll 16
      for (int64_t n = 0; n < N * PANEL_VECTORS; ++n)
        sums[row][n] = at::vec::fmadd(query, keys[n], sums[row][n]);
    }
  }
  for (int64_t row = 0; row < GROUP; ++row)
    for (int64_t n = 0; n < N * PANEL_VECTORS; ++n) sums[row][n].store(p + row * STEP + n * WIDTH);
}

// Scores of a tile against `panels` panels of keys, the last `panels * PANEL_KEYS - keys` of them out.
void score(Tile& tile, int64_t rows, const VALUE* keys_packed, int64_t keys) {
  const int64_t panels = (keys + PANEL_KEYS - 1) / PANEL_KEYS;
  for (int64_t row = 0; row < rows; row += GROUP) {
    const VALUE* q = tile.q + row * HEAD_DIM;
    int64_t panel = 0;
    for (; panel + PANELS <= panels; panel += PANELS)
      score_panels<PANELS>(
          q, keys_packed + panel * HEAD_DIM * PANEL_KEYS, tile.p + row * STEP + panel * PANEL_KEYS);
    for (; panel < panels; ++panel)
      score_panels<1>(
          q, keys_packed + panel * HEAD_DIM * PANEL_KEYS, tile.p + row * STEP + panel * PANEL_KEYS);
  }
  for (int64_t row = 0; row < rows; ++row)
    std::fill(tile.p + row * STEP + keys, tile.p + row * STEP + panels * PANEL_KEYS, NOTHING);
}

inline Vec exponential(Vec x) {
  if constexpr (std::is_same_v<VALUE, float>) return x.exp_u20();
  return x.exp();
}

// Add `log_weight` to the scores, turn them into probabilities relative to the new maximum and
// update the sums; `step_sum` receives the sum of this step's probabilities by row.
void online_softmax(Tile& tile, int64_t rows, int64_t keys, VALUE log_weight, VALUE* step_sum) {
  const int64_t vectors = (keys + PANEL_KEYS - 1) / PANEL_KEYS * PANEL_VECTORS;
  for (int64_t row = 0; row < rows; ++row) {
    VALUE* p = tile.p + row * STEP;
    Vec greatest(NOTHING);
    for (int64_t n = 0; n < vectors; ++n)
      greatest = at::vec::maximum(greatest, Vec::loadu(p + n * WIDTH));
    const VALUE top = std::max(
        tile.top[row],
        log_weight + at::vec::vec_reduce_all<VALUE>(
            [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, greatest));
    // A row that has seen only -inf so far: subtract 0, not -inf, which would give NaN.
    const VALUE reference = top == NOTHING ? 0 : top;
    Vec sum(0);
    for (int64_t n = 0; n < vectors; ++n) {
      const Vec probability = exponential(Vec::loadu(p + n * WIDTH) - Vec(reference - log_weight));
      probability.store(p + n * WIDTH);
      sum = sum + probability;
    }
    step_sum[row] =
        at::vec::vec_reduce_all<VALUE>([](Vec& a, Vec& b) { return a + b; }, sum);
    tile.shrink[row] = std::exp(tile.top[row] - reference);
    tile.sum[row] = tile.sum[row] * tile.shrink[row] + step_sum[row];
    tile.top[row] = top;
  }
}

// out[GROUP][N vectors] = out * shrink + p . values, all sums in registers.
template <int64_t N>
inline void value_columns(
    const VALUE* p, const VALUE* values, int64_t keys, const VALUE* shrink, VALUE* out) {
  Vec sums[GROUP][N];
#pragma GCC unroll 16
  for (int64_t row = 0; row < GROUP; ++row)
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n)
      sums[row][n] = Vec::loadu(out + row * PADDED_DIM + n * WIDTH) * Vec(shrink[row]);
  for (int64_t key = 0; key < keys; ++key) {
    Vec value[N];
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) value[n] = Vec::loadu(values + key * PADDED_DIM + n * WIDTH);
#pragma GCC unroll 16
    for (int64_t row = 0; row < GROUP; ++row) {
      const Vec probability(p[row * STEP + key]);
#pragma GCC unroll 16
      for (int64_t n = 0; n < N; ++n)
        sums[row][n] = at::vec::fmadd(probability, value[n], sums[row][n]);
    }
  }
  for (int64_t row = 0; row < GROUP; ++row)
    for (int64_t n = 0; n < N; ++n) sums[row][n].store(out + row * PADDED_DIM + n * WIDTH);
}

void accumulate(Tile& tile, int64_t rows, const VALUE* values, int64_t keys) {
  for (int64_t row = 0; row < rows; row += GROUP) {
    const VALUE* p = tile.p + row * STEP;
    VALUE* out = tile.out + row * PADDED_DIM;
    int64_t n = 0;
    for (; n + MOST <= OUTPUT_VECTORS; n += MOST)
      value_columns<MOST>(p, values + n * WIDTH, keys, tile.shrink + row, out + n * WIDTH);
    for (; n < OUTPUT_VECTORS; ++n)
      value_columns<1>(p, values + n * WIDTH, keys, tile.shrink + row, out + n * WIDTH);
  }
}

// Queries of a tile, scaled; those past the end are zero, and so is all else.
void begin(
    Tile& tile, const ELEMENT* q, int64_t stride, const int32_t* tokens, const HeadRows& of_head,
    int64_t first, int64_t rows, VALUE scale) {
  for (int64_t row = 0; row < rows; ++row) {
    const ELEMENT* query = q + token_at(tokens, of_head.position(first + row)) * stride;
    for (int64_t d = 0; d < HEAD_DIM; ++d)
      tile.q[row * HEAD_DIM + d] = static_cast<VALUE>(query[d]) * scale;
  }
  std::fill(tile.q + rows * HEAD_DIM, tile.q + ROWS * HEAD_DIM, VALUE(0));
  std::fill(tile.out, tile.out + ROWS * PADDED_DIM, VALUE(0));
  std::fill(tile.top, tile.top + ROWS, NOTHING);
  std::fill(tile.sum, tile.sum + ROWS, VALUE(0));
}

void finish(
    const Tile& tile, ELEMENT* out, int64_t stride, const int32_t* tokens, const HeadRows& of_head,
    int64_t first, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    ELEMENT* result = out + token_at(tokens, of_head.target(first + row, 0)) * stride;
    for (int64_t d = 0; d < HEAD_DIM; ++d)
      result[d] = static_cast<ELEMENT>(tile.out[row * PADDED_DIM + d] / tile.sum[row]);
    for (int64_t slot = 1; slot < of_head.slots; ++slot) {
      const int64_t target = of_head.target(first + row, slot);
      if (target < 0) break;
      std::memcpy(out + token_at(tokens, target) * stride, result, HEAD_DIM * sizeof(ELEMENT));
    }
  }
}

// The packed keys and values of all heads.
struct Packed {
  Memory keys, values;

  Packed(
      const Sizes& s, const ELEMENT* k, Strides ks, const ELEMENT* v, Strides vs,
      const int32_t* tokens, int threads)
      : keys(allocate(s.batch * s.heads * s.padded_keys() * HEAD_DIM)),
        values(v ? allocate(s.batch * s.heads * s.padded_keys() * PADDED_DIM) : nullptr) {
    const int64_t panels = s.padded_keys() / PANEL_KEYS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t index = 0; index < s.batch * s.heads * panels; ++index) {
      const int64_t item = index / panels / s.heads, head = index / panels % s.heads;
      const int64_t first = index % panels * PANEL_KEYS;
      pack_keys(
          k + item * ks.batch + head * ks.head, ks.token, tokens, first, s.length_k,
          keys.get() + index * PANEL_KEYS * HEAD_DIM);
      if (v)
        pack_values(
            v + item * vs.batch + head * vs.head, vs.token, tokens, first, s.length_k,
            values.get() + index * PANEL_KEYS * PADDED_DIM);
    }
  }
};

// Mean keys and values of the parts of all key blocks, packed like keys and values.
struct Pooled {
  int64_t by_block, count = 0, padded = 0;
  Memory keys, values;
  std::vector<VALUE> log_sizes;  // -inf for parts past the end of the keys

  Pooled(const Sizes& s, const Packed& packed, int64_t pooled, int threads) : by_block(pooled) {
    if (!pooled) return;
    count = s.key_blocks() * pooled;
    padded = (count + PANEL_KEYS - 1) / PANEL_KEYS * PANEL_KEYS;
    const int64_t part = s.block_n / pooled, matrices = s.batch * s.heads;
    keys.reset(allocate(matrices * padded * HEAD_DIM));
    values.reset(allocate(matrices * padded * PADDED_DIM));
    log_sizes.assign(count, NOTHING);
    for (int64_t index = 0; index < count && index * part < s.length_k; ++index)
      log_sizes[index] = std::log(VALUE(std::min(part, s.length_k - index * part)));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < matrices * padded; ++at) {
      const int64_t matrix = at / padded, index = at % padded;
      const VALUE* from_keys = packed.keys.get() + matrix * s.padded_keys() * HEAD_DIM;
      const VALUE* from_values = packed.values.get() + matrix * s.padded_keys() * PADDED_DIM;
      VALUE* key = keys.get() + (at - at % PANEL_KEYS) * HEAD_DIM + at % PANEL_KEYS;
      VALUE* value = values.get() + at * PADDED_DIM;
      for (int64_t d = 0; d < HEAD_DIM; ++d) key[d * PANEL_KEYS] = 0;
      std::fill(value, value + PADDED_DIM, VALUE(0));
      const int64_t first = std::min(index * part, s.length_k);
      const int64_t last = std::min(first + part, s.length_k);
      if (index >= count || first == last) continue;
      for (int64_t token = first; token < last; ++token) {
        const VALUE* panel = from_keys + (token - token % PANEL_KEYS) * HEAD_DIM + token % PANEL_KEYS;
        for (int64_t d = 0; d < HEAD_DIM; ++d) key[d * PANEL_KEYS] += panel[d * PANEL_KEYS];
        for (int64_t d = 0; d < PADDED_DIM; ++d) value[d] += from_values[token * PADDED_DIM + d];
      }
      const VALUE share = VALUE(1) / VALUE(last - first);
      for (int64_t d = 0; d < HEAD_DIM; ++d) key[d * PANEL_KEYS] *= share;
      for (int64_t d = 0; d < PADDED_DIM; ++d) value[d] *= share;
    }
  }

  // Attend the parts of the blocks that a row of `kept` bits leaves out.
  void attend(Tile& tile, int64_t rows, int64_t matrix, const uint8_t* kept) const {
    VALUE bias[STEP], step_sum[ROWS];
    for (int64_t first = 0; first < count; first += STEP) {
      const int64_t parts = std::min(STEP, count - first);
      bool any = false;
      for (int64_t n = 0; n < parts; ++n) {
        const int64_t block = (first + n) / by_block;
        const bool left_out = !(kept[block / 8] >> (block % 8) & 1);
        bias[n] = left_out ? log_sizes[first + n] : NOTHING;
        any |= bias[n] != NOTHING;
      }
      if (!any) continue;
      score(tile, rows, keys.get() + (matrix * padded + first) * HEAD_DIM, parts);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < parts; ++n) tile.p[row * STEP + n] += bias[n];
      online_softmax(tile, rows, parts, 0, step_sum);
      accumulate(tile, rows, values.get() + (matrix * padded + first) * PADDED_DIM, parts);
    }
  }
};

}  // namespace

// What a mask says of the keys of one sample. `bias`, or null, is added to their scores; it is not 0
// only from key `begin` to `end`, and -inf on all of these if `hole`.
struct Padding {
  const float* bias = nullptr;
  int64_t begin = 0, end = 0;
  bool hole = false;

  bool touches(int64_t first, int64_t last) const { return bias && first < end && last > begin; }

  // The first key from `key` on that is attended at all, at the begin of a panel.
  int64_t skip(int64_t key) const {
    return bias && hole && key >= begin && key < end ? std::max(key, end / PANEL_KEYS * PANEL_KEYS)
                                                     : key;
  }
};

// Attend the kept intervals. `order` lists rows (head * query_blocks + query block), dearest first;
// `query_tokens` and `key_tokens`, or null, name the model's token at each position. The next ones
// are the pattern's intervals, in blocks, with their weights. With `octaves`, or null, an interval of
// octave k > 0 keeps its first block and every 2^k-th, and all have the weight 2^k. If `pooled` is not 0, each dropped
// key block, of which `kept` has one bit that is not set, takes part as `pooled` mean keys. Heads
// of which `repetitive`, or null, is not 0 compute and copy as `HeadRows` says. `bias` (length_k) and
// `bounds` (4), or null, are those of `KeyPadding`, of each sample if `each`.
extern "C" void attend(
    const int64_t* sizes, const int64_t* strides, const ELEMENT* q, const ELEMENT* k,
    const ELEMENT* v, ELEMENT* out, double scale, const int32_t* query_tokens,
    const int32_t* key_tokens, const int32_t* order, const int32_t* offsets,
    const int32_t* starts, const int32_t* ends, const float* log_weights,
    const uint8_t* octaves, int64_t pooled, const uint8_t* kept, const uint8_t* repetitive, const int32_t* computed,
    const int32_t* targets, int64_t count, int64_t slots, const float* bias, const int32_t* bounds,
    int64_t each, int threads) {
  const Sizes s = *reinterpret_cast<const Sizes*>(sizes);
  const Strides* by_operand = reinterpret_cast<const Strides*>(strides);
  const Strides qs = by_operand[0], os = by_operand[3];
  const Packed packed(s, k, by_operand[1], v, by_operand[2], key_tokens, threads);
  const Pooled parts(s, packed, pooled, threads);
  const int64_t table = s.heads * s.query_blocks();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t index = 0; index < table * s.batch; ++index) {
    const int64_t row = order[index / s.batch], item = index % s.batch;
    const int64_t head = row / s.query_blocks(), block = row % s.query_blocks();
    const int64_t keys_at = (item * s.heads + head) * s.padded_keys();
    const VALUE* keys = packed.keys.get() + keys_at * HEAD_DIM;
    const VALUE* values = packed.values.get() + keys_at * PADDED_DIM;
    const bool copies = repetitive && repetitive[head];
    const HeadRows of_head =
        copies ? HeadRows{count, computed, targets, slots} : HeadRows{s.length_q};
    const int64_t last = std::min((block + 1) * s.block_m, of_head.count);
    Padding padding;
    if (bias) {
      const int32_t* bound = bounds + item * each * 4;
      padding = {bias + item * each * s.length_k, bound[0], bound[1], bound[2] != 0};
    }
    Tile tile;
    VALUE step_sum[ROWS];
    for (int64_t first = block * s.block_m; first < last; first += ROWS) {
      const int64_t rows = std::min(ROWS, last - first);
      const int64_t padded = (rows + GROUP - 1) / GROUP * GROUP;
      const ELEMENT* queries = q + item * qs.batch + head * qs.head;
      begin(tile, queries, qs.token, query_tokens, of_head, first, rows, scale);
      for (int32_t run = offsets[row]; run < offsets[row + 1]; ++run) {
        const int64_t octave = octaves ? octaves[run] : 0;
        const int64_t blocks = octave ? 1 : ends[run] - starts[run];  // that are attended together
        const VALUE log_weight = octaves ? octave * VALUE(0.693147180559945309)
                                         : log_weights ? log_weights[run] : 0;
        for (int64_t at = starts[run]; at < ends[run]; at += octave ? int64_t(1) << octave : blocks) {
          const int64_t end = std::min((at + blocks) * s.block_n, s.length_k);
          for (int64_t key = padding.skip(at * s.block_n); key < end; key = padding.skip(key + STEP)) {
            const int64_t step = std::min(STEP, end - key);
            score(tile, padded, keys + key * HEAD_DIM, step);
            if (padding.touches(key, key + step))
              for (int64_t row = 0; row < padded; ++row)
                for (int64_t n = 0; n < step; ++n) tile.p[row * STEP + n] += padding.bias[key + n];
            online_softmax(tile, padded, step, log_weight, step_sum);
            accumulate(tile, padded, values + key * PADDED_DIM, step);
          }
        }
      }
      if (pooled)
        parts.attend(tile, padded, item * s.heads + head, kept + row * ((s.key_blocks() + 7) / 8));
      // A row without any key has the output zero.
      for (int64_t row = 0; bias && row < rows; ++row)
        if (tile.top[row] == NOTHING) tile.sum[row] = 1;
      ELEMENT* results = out + item * os.batch + head * os.head;
      finish(tile, results, os.token, query_tokens, of_head, first, rows);
    }
  }
}

// Dense attention and its block energies; without `v` the energies alone. With `lse` (contiguous,
// batch by heads by queries) the energies are relative to it, else to the rows' own log-sum-exp.
extern "C" void attend_with_energy(
    const int64_t* sizes, const int64_t* strides, const ELEMENT* q, const ELEMENT* k,
    const ELEMENT* v, ELEMENT* out, double scale, const VALUE* lse, float* energy, int threads) {
  const Sizes s = *reinterpret_cast<const Sizes*>(sizes);
  const Strides* by_operand = reinterpret_cast<const Strides*>(strides);
  const Strides qs = by_operand[0], os = by_operand[3];
  const Packed packed(s, k, by_operand[1], v, by_operand[2], nullptr, threads);
  const HeadRows every{s.length_q};
  const int64_t blocks = s.key_blocks(), table = s.batch * s.heads * s.query_blocks();
#pragma omp parallel num_threads(threads)
  {
    Tile tile;
    VALUE step_sum[ROWS];
    // By key block and row: the sum of its probabilities, and the reference they are relative to.
    Memory sums(allocate(blocks * ROWS)), references(allocate(blocks * ROWS));
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < table; ++index) {
      const int64_t block = index % s.query_blocks(), matrix = index / s.query_blocks();
      const int64_t item = matrix / s.heads, head = matrix % s.heads;
      const VALUE* keys = packed.keys.get() + matrix * s.padded_keys() * HEAD_DIM;
      const VALUE* values = packed.values.get() + matrix * s.padded_keys() * PADDED_DIM;
      const int64_t begins = block * s.block_m, last = std::min(begins + s.block_m, s.length_q);
      float* row_energy = energy + index * blocks;
      std::fill(row_energy, row_energy + blocks, 0.0f);
      for (int64_t first = begins; first < last; first += ROWS) {
        const int64_t rows = std::min(ROWS, last - first);
        const int64_t computed = (rows + GROUP - 1) / GROUP * GROUP;
        const ELEMENT* queries = q + item * qs.batch + head * qs.head;
        begin(tile, queries, qs.token, nullptr, every, first, rows, scale);
        for (int64_t c = 0; c < blocks; ++c) {
          VALUE* sum = sums.get() + c * ROWS;
          std::fill(sum, sum + ROWS, VALUE(0));
          const int64_t end = std::min((c + 1) * s.block_n, s.length_k);
          for (int64_t key = c * s.block_n; key < end; key += STEP) {
            const int64_t count = std::min(STEP, end - key);
            score(tile, computed, keys + key * HEAD_DIM, count);
            online_softmax(tile, computed, count, 0, step_sum);
            for (int64_t row = 0; row < rows; ++row)
              sum[row] = sum[row] * tile.shrink[row] + step_sum[row];
            if (v) accumulate(tile, computed, values + key * PADDED_DIM, count);
          }
          std::copy(tile.top, tile.top + ROWS, references.get() + c * ROWS);
        }
        ELEMENT* results = out + item * os.batch + head * os.head;
        if (v) finish(tile, results, os.token, nullptr, every, first, rows);
        const VALUE* given = lse ? lse + matrix * s.length_q + first : nullptr;
        for (int64_t c = 0; c < blocks; ++c) {
          VALUE total = 0;
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = c * ROWS + row;
            const VALUE share = given
                ? std::exp(references.get()[at] - given[row])
                : std::exp(references.get()[at] - tile.top[row]) / tile.sum[row];
            total += sums.get()[at] * share;
          }
          row_energy[c] += static_cast<float>(total / VALUE(last - begins));
        }
      }
    }
  }
}
