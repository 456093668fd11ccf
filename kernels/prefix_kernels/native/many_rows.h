// Packs of many rows: matrix products, one KV head at a time.
//
// K is the left operand, so it needs no transposition: scores come out as [tokens, rows], the
// softmax runs down the columns, and the weights are transposed in registers.

#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <stdexcept>

#include "run.h"

namespace {

constexpr int64_t BLOCK = 64;  // rows that are multiplied at a time
constexpr int64_t UNIT = 64;   // tokens of a last tile are padded to this: few shapes for oneDNN
// Rows further apart are copied together first. At 4 KiB, as 8 heads of 128 floats have it, each
// lies on a page of its own, and all fall on the same few sets of a cache, which every block of
// rows reads again. By reasoning, not by measurement.
constexpr int64_t CLOSE_BYTES = 1024;
constexpr int64_t AHEAD = 8;  // rows that are fetched before they are copied

void fetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// 16-bit right operands hold two rows interleaved ("VNNI"): [k / 2, n, 2].
template <class C> constexpr int64_t PAIR = 4 / sizeof(C);

// c [m, n] (+)= a [m, k] times b, which is [k, n], in pairs where C has 16 bits.
template <class C>
void multiply(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_stride, const C* b,
              int64_t b_stride, float* c, int64_t c_stride, bool adds) {
#if defined(PREFIX_PLAIN_PRODUCTS)  // tests: 16-bit operands as on processors that multiply them
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float sum = adds ? c[i * c_stride + j] : 0.f;
      for (int64_t x = 0; x < k; x++)
        sum += float(a[i * a_stride + x]) *
               float(b[(x / PAIR<C> * b_stride + j) * PAIR<C> + x % PAIR<C>]);
      c[i * c_stride + j] = sum;
    }
#else
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, adds, a, b, c, PAIR<C> == 2);
#endif
}

// Whether oneDNN multiplies this 16-bit type on this processor, and reads pairs. torch has no
// function that says so; it throws where it does not, and the numbers show what it reads.
template <class C> bool multiplies_rightly() {
  constexpr int64_t m = 32, n = 48, k = 34;
  auto left = [](int64_t i, int64_t x) { return float((7 * i + 3 * x) % 5 - 2); };
  auto right = [](int64_t x, int64_t j) { return float((5 * x + 2 * j) % 7 - 3); };
  C a[m * k], b[k * n];
  for (int64_t x = 0; x < k; x++) {
    for (int64_t i = 0; i < m; i++) a[i * k + x] = C(left(i, x));
    for (int64_t j = 0; j < n; j++) b[(x / 2 * n + j) * 2 + x % 2] = C(right(x, j));
  }
  float c[m * n];
  try {
    multiply(m, n, k, a, k, b, n, c, n, false);
    multiply(m, n, k, a, k, b, n, c, n, true);
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float sum = 0;
      for (int64_t x = 0; x < k; x++) sum += left(i, x) * right(x, j);
      if (c[i * n + j] != 2 * sum) return false;
    }
  return true;
}
template <class C> bool multiplies() {
  static const bool answer = multiplies_rightly<C>();
  return answer && at::globalContext().userEnabledMkldnn();
}

// In what type a layer's products are computed: 16 bits where that loses nothing of q and KV.
Type product_type(const Layer& layer) {
  const bool fits = layer.kv_type == layer.q_type || ITEMSIZE[layer.kv_type] == 1;
  if (fits && layer.q_type == BFLOAT16 && multiplies<BFloat16>()) return BFLOAT16;
  if (fits && layer.q_type == FLOAT16 && multiplies<Half>()) return FLOAT16;
  return FLOAT32;
}

// Two rows of 16-bit values, element by element.
void interleave(const uint16_t* a, const uint16_t* b, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    put(to + 2 * i, __builtin_convertvector(get<U16>(a + i), U) |
                        __builtin_convertvector(get<U16>(b + i), U) << 16);
  for (; i < n; i++) to[2 * i] = a[i], to[2 * i + 1] = b[i];
}

// Scores [n, rows] become weights [rows, TILE], 0 from n on, and the state of the rows moves on. Of
// the tokens each row sees the first `seen` [rows], or all where that is null.
template <class C>
void softmax_columns(float* scores, int64_t rows, int64_t n, int64_t padded, float scale, float cap,
                     const int64_t* seen, float* peak, float* sum, float* shrink, C* weights) {
  if (must_transform(scale, cap)) {
    for (int64_t i = 0; i < n * rows; i += LANES)
      put(scores + i, transformed(get<F>(scores + i), scale, cap));
  }
  for (int64_t r = 0; seen && r < rows; r++)
    for (int64_t t = seen[r]; t < n; t++) scores[t * rows + r] = -INF;
  scale = softmax_scale(scale, cap);
  for (int64_t r = 0; r < rows; r += LANES) {
    const float* column = scores + r;
    F top = splat(-INF);
    for (int64_t t = 0; t < n; t++) top = larger(get<F>(column + t * rows), top);
    const F before = get<F>(peak + r), now = larger(before, top);
    F total = exp_of((before - now) * scale);
    put(shrink + r, total);
    total *= get<F>(sum + r);
    for (int64_t t = 0; t < padded; t += LANES) {
      F x[LANES];
      for (int i = 0; i < LANES; i++) {
        x[i] = t + i < n ? exp_of((get<F>(column + (t + i) * rows) - now) * scale) : F{};
        total += x[i];
      }
      transpose(x);
      for (int i = 0; i < LANES; i++) store(weights + (r + i) * TILE + t, x[i]);
    }
    put(peak + r, now);
    put(sum + r, total);
  }
}

template <class C> struct Operand { const C* data; int64_t stride; };

// K or V of one tile, one head, as an operand of products in C.
template <class C> struct Tile {
  const Layer& layer;
  const int32_t* slots;
  int64_t head, num_tokens;

  // Whether it is whole, of this type, and its slots follow each other.
  bool is_an_operand() const {
    bool answer = layer.kv_type == type_of<C> && num_tokens == TILE;
    for (int64_t t = 0; answer && t < TILE; t++) answer = slots[t] == slots[0] + t;
    return answer;
  }
  static bool is_close(int64_t stride) { return stride * int64_t(sizeof(C)) <= CLOSE_BYTES; }
  const char* key(int64_t t) const { return layer.key(slots[t], head); }
  const char* value(int64_t t) const { return layer.value(slots[t], head); }
  const C* row(const char* from, C* buffer, int64_t dim) const {
    if (layer.kv_type == type_of<C>) return (const C*)from;
    converter_from<C>(layer.kv_type)(from, buffer, dim);
    return buffer;
  }
  // [tokens, D], D padded to pairs.
  Operand<C> keys(int64_t dim, bool in_place) const {
    const int64_t stride = round_up(dim, PAIR<C>);
    if (in_place && stride == dim && is_close(layer.k_stride))
      return {(const C*)key(0), layer.k_stride};
    C* to = scratch.k.at_least<C>(TILE * stride);
    const Convert convert = converter_from<C>(layer.kv_type);
    for (int64_t t = 0; t < num_tokens; t++) {
      fetch(key(std::min(t + AHEAD, num_tokens - 1)), dim * ITEMSIZE[layer.kv_type]);
      convert(key(t), to + t * stride, dim);
      std::fill(to + t * stride + dim, to + (t + 1) * stride, C(0.f));
    }
    return {to, stride};
  }
  // [tokens, Dv] or in pairs of tokens; 0 from the last token to `padded`. `k` has the same tokens,
  // and V if it is `in_k`.
  Operand<C> values(int64_t dim, bool in_place, int64_t padded, Operand<C> k, bool in_k) const {
    if (in_place && PAIR<C> == 1 && is_close(layer.v_stride))
      return {(const C*)value(0), layer.v_stride};
    if (in_k && PAIR<C> == 1) {  // not in place: K is a copy, with room for a whole tile
      C* copy = scratch.k.at_least<C>(TILE * k.stride);
      std::fill(copy + num_tokens * k.stride, copy + padded * k.stride, C(0.f));
      return k;
    }
    C* to = scratch.v.at_least<C>(TILE * dim);
    std::fill(to + num_tokens / 2 * 2 * dim, to + padded * dim, C(0.f));
    if constexpr (PAIR<C> == 1) {
      const Convert convert = converter_from<C>(layer.kv_type);
      for (int64_t t = 0; t < num_tokens; t++) {
        fetch(value(std::min(t + AHEAD, num_tokens - 1)), dim * ITEMSIZE[layer.kv_type]);
        convert(value(t), to + t * dim, dim);
      }
    } else {
      C* rows = scratch.row.at_least<C>(3 * dim);
      std::fill(rows + 2 * dim, rows + 3 * dim, C(0.f));
      auto read = [&](int64_t t, C* buffer) {
        return in_k ? k.data + t * k.stride : row(value(t), buffer, dim);
      };
      for (int64_t t = 0; t < num_tokens; t += 2) {
        for (int64_t i = t; !in_k && i < t + 2; i++)
          fetch(value(std::min(i + AHEAD, num_tokens - 1)), dim * ITEMSIZE[layer.kv_type]);
        const C* a = read(t, rows);
        const C* b = rows + 2 * dim;
        if (t + 1 < num_tokens) b = read(t + 1, rows + dim);
        interleave((const uint16_t*)a, (const uint16_t*)b, (uint16_t*)(to + t * dim), dim);
      }
    }
    return {to, dim};
  }
};

// The item's query rows of one head as right operands: per block of rows, [D, rows] in pairs.
template <class C> const C* transposed_queries(const Run& run, const Item& item, int64_t padded) {
  const int64_t group = run.plan.group(), dim = run.plan.head_dim;
  const int64_t words = divide_up(dim, PAIR<C>);  // of 32 bits
  uint32_t* to = scratch.q.at_least<uint32_t>(padded * words);
  uint32_t* row = scratch.row.at_least<uint32_t>(words);
  std::fill(to, to + padded * words, 0);
  row[words - 1] = 0;
  const Convert convert = converter_from<C>(run.layer.q_type);
  const int64_t rows = item.num_queries * group;
  auto query = [&](int64_t r) {
    return run.layer.query(run.row(item, r / group), item.kv_head * group + r % group);
  };
  for (int64_t r = 0; r < rows; r++) {
    const int64_t block = r / BLOCK * BLOCK, width = std::min(BLOCK, padded - block);
    fetch(query(std::min(r + AHEAD, rows - 1)), dim * ITEMSIZE[run.layer.q_type]);
    convert(query(r), row, dim);
    for (int64_t w = 0; w < words; w++) to[block * words + w * width + r - block] = row[w];
  }
  return (const C*)to;
}

// How many of `n` tokens, from `first` on of an item's pack, each of `width` rows from `row` on sees;
// all where it sees none of the item, since such a row is not written. Null where all see all.
const int64_t* seen_by_rows(const Run& run, const Item& item, int64_t row, int64_t width,
                            int64_t first, int64_t n, int64_t* seen) {
  const int64_t before = first - item.begin, group = run.plan.group();
  if (run.seen(item, row / group) >= before + n) return nullptr;
  for (int64_t r = 0; r < width; r++) {
    const int64_t query = std::min((row + r) / group, item.num_queries - 1);
    const int64_t of_item = run.seen(item, query);
    seen[r] = of_item <= 0 ? n : std::clamp<int64_t>(of_item - before, 0, n);
  }
  return seen;
}

template <class C> void attend_many(const Run& run, const Item& item) {
  const Plan& plan = run.plan;
  const int64_t group = plan.group(), dim = plan.head_dim, v_dim = plan.v_head_dim;
  const int64_t rows = item.num_queries * group, padded_rows = round_up(rows, COLUMNS);
  const int64_t k_dim = round_up(dim, PAIR<C>);
  const C* q = transposed_queries<C>(run, item, padded_rows);
  float* out = scratch.out.at_least<float>(padded_rows * v_dim);
  float* peak = scratch.state.at_least<float>(2 * padded_rows + BLOCK);
  float *sum = peak + padded_rows, *shrink = sum + padded_rows;
  std::fill(peak, sum, -INF);
  std::fill(sum, shrink, 0.f);
  float* scores = scratch.scores.at_least<float>(TILE * BLOCK);
  C* weights = scratch.weights.at_least<C>(BLOCK * TILE);
  const float scale = run.layer.k_scale(item.kv_head), cap = float(run.layer.logit_cap);
  const int32_t* slots = run.slots(item);
  const int64_t last = run.end(item);
  int64_t seen[BLOCK];
  for (int64_t first = item.begin; first < last; first += TILE, slots += TILE) {
    const int64_t n = std::min(TILE, last - first), padded = round_up(n, UNIT);
    const Tile<C> tile{run.layer, slots, item.kv_head, n};
    const bool in_place = tile.is_an_operand(), is_first = first == item.begin;
    const Operand<C> k = tile.keys(dim, in_place);
    const bool in_k = tile.layer.v_in_k() && v_dim <= dim;
    const Operand<C> v = tile.values(v_dim, in_place, padded, k, in_k);
    for (int64_t r = 0; r < padded_rows; r += BLOCK) {
      const int64_t width = std::min(BLOCK, padded_rows - r);
      multiply(padded, width, k_dim, k.data, k.stride, q + r * k_dim, width, scores, width, false);
      softmax_columns(scores, width, n, padded, scale, cap,
                      seen_by_rows(run, item, r, width, first, n, seen), peak + r, sum + r, shrink,
                      weights);
      for (int64_t i = 0; !is_first && i < width; i++) {
        const float factor = shrink[i];
        float* row = out + (r + i) * v_dim;
        for (int64_t d = 0; factor != 1.f && d < v_dim; d++) row[d] *= factor;
      }
      multiply(width, v_dim, padded, weights, TILE, v.data, v.stride, out + r * v_dim, v_dim,
               !is_first);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    run.write_part(item, r / group, item.kv_head * group + r % group, out + r * v_dim,
                   peak[r] * softmax_scale(scale, cap), sum[r]);
}

}  // namespace
