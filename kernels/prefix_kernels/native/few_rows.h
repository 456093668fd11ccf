// Packs of few rows, and so most tails: token by token, all heads of a token together.

#pragma once

#include <array>
#include <bit>

#include "run.h"

namespace {

constexpr int TOKENS = 8;                 // taken together
constexpr int SUMS = std::max(LANES, 8);  // vectors of sums that the registers hold
constexpr int ROWS = 4;                   // query rows taken together, at most

// Rows of K or V of some tokens as `T`, and those that are to be fetched meanwhile.
template <class T> struct Rows {
  const T* at[TOKENS];
  const char* next[TOKENS];
  int64_t itemsize;  // of `next`
  // Prefetches are spread over the products: a core has few places for lines that are under way.
  // Into the second cache, since what is next would take the place of what is read now.
  void fetch(int t, int64_t d) const {
    if (d * itemsize % 64 == 0) __builtin_prefetch(next[t] + d * itemsize, 0, 2);
  }
};

// Scores [G, FEW_TILE] of `G` query rows with the keys of `TOKENS` tokens.
template <class T, int G>
void dot(const float* q, int64_t stride, const Rows<T>& k, float* scores) {
  constexpr int N = std::min(TOKENS, SUMS / int(std::bit_ceil(unsigned(G))));
  for (int first = 0; first < TOKENS; first += N) {
    F sums[G][N] = {};
    for (int64_t d = 0; d < stride; d += LANES) {
      F x[N];
      for (int t = 0; t < N; t++) {
        x[t] = load(k.at[first + t] + d);
        k.fetch(first + t, d);
      }
      for (int g = 0; g < G; g++) {
        const F row = get<F>(q + g * stride + d);
        for (int t = 0; t < N; t++) sums[g][t] += row * x[t];
      }
    }
    F all[SUMS] = {};  // another array, so that the sums need no memory
    for (int g = 0; g < G; g++)
      for (int t = 0; t < N; t++) all[g * N + t] = sums[g][t];
    float totals[SUMS];
    for (int i = 0; i < SUMS; i += LANES) put(totals + i, sums_of(all + i));
    for (int g = 0; g < G; g++)
      std::memcpy(scores + g * FEW_TILE + first, totals + g * N, N * sizeof(float));
  }
}

// Add the values of `TOKENS` tokens, weighted [G, FEW_TILE], to the outputs of `G` rows.
template <class T, int G>
void add_values(const float* weights, int64_t stride, const Rows<T>& v, float* out) {
  auto add = [&]<int W>(std::integral_constant<int, W>, int64_t d) {
    F sums[G][W];
    for (int g = 0; g < G; g++)
      for (int w = 0; w < W; w++) sums[g][w] = get<F>(out + g * stride + d + w * LANES);
    for (int t = 0; t < TOKENS; t++) {
      F x[W];
      for (int w = 0; w < W; w++) {
        x[w] = load(v.at[t] + d + w * LANES);
        v.fetch(t, d + w * LANES);
      }
      for (int g = 0; g < G; g++) {
        const F weight = splat(weights[g * FEW_TILE + t]);
        for (int w = 0; w < W; w++) sums[g][w] += weight * x[w];
      }
    }
    for (int g = 0; g < G; g++)
      for (int w = 0; w < W; w++) put(out + g * stride + d + w * LANES, sums[g][w]);
  };
  constexpr int WIDTH = SUMS / int(std::bit_ceil(unsigned(G)));
  int64_t d = 0;
  for (; d + WIDTH * LANES <= stride; d += WIDTH * LANES)
    add(std::integral_constant<int, WIDTH>(), d);
  for (; d < stride; d += LANES) add(std::integral_constant<int, 1>(), d);
}

// One row of a tile of `size` tokens, of which it sees the first `n`: scores become weights, and the
// state of the row moves on.
void softmax_row(float* scores, int64_t n, int64_t size, float scale, float cap, float* out,
                 int64_t dim, float& peak, float& sum) {
  const int64_t padded = round_up(size, std::max(LANES, TOKENS));
  std::fill(scores + n, scores + padded, -INF);
  if (must_transform(scale, cap)) {
    for (int64_t t = 0; t < n; t += LANES)
      store_some(scores + t, transformed(get<F>(scores + t), scale, cap), n - t);
  }
  scale = softmax_scale(scale, cap);
  F top = splat(-INF), total{};
  for (int64_t t = 0; t < n; t += LANES) top = larger(get<F>(scores + t), top);
  const float now = std::max(peak, largest_of(top));
  const float shrink = std::exp((peak - now) * scale);
  for (int64_t t = 0; t < padded; t += LANES) {
    const F weights = exp_of((get<F>(scores + t) - now) * scale);
    put(scores + t, weights);
    total += weights;
  }
  if (shrink != 1.f)
    for (int64_t d = 0; d < dim; d += LANES) put(out + d, get<F>(out + d) * shrink);
  sum = sum * shrink + sum_of(total);
  peak = now;
}

// `T`: what KV is read as; where it is that and fills whole vectors, it is read where it lies.
template <class T> void attend_few(const Run& run, const Item& item) {
  const Plan& plan = run.plan;
  const Layer& layer = run.layer;
  const int64_t heads = plan.num_kv_heads, group = plan.group(), rows = item.num_queries * group;
  const int64_t dim = plan.head_dim, v_dim = plan.v_head_dim;
  const int64_t q_stride = round_up(dim, LANES), out_stride = round_up(v_dim, LANES);
  // K's copies and V's apart: what lies behind a row is read, too, and stays 0.
  const int64_t copied = TOKENS * (q_stride + out_stride);
  float* q = scratch.q.at_least<float>(heads * rows * q_stride);  // [Hkv, rows, D]
  float* scores = scratch.scores.at_least<float>(heads * rows * FEW_TILE);
  float* out = scratch.out.at_least<float>(heads * rows * out_stride);
  float* peak = scratch.state.at_least<float>(2 * heads * rows);
  float* sum = peak + heads * rows;
  T* k_copies = scratch.k.at_least<T>(copied);
  T* v_copies = k_copies + TOKENS * q_stride;
  char* zeros = scratch.row.at_least<char>(v_dim * sizeof(float));
  std::fill(out, out + heads * rows * out_stride, 0.f);
  std::fill(peak, sum, -INF);
  std::fill(sum, sum + heads * rows, 0.f);
  std::fill(k_copies, k_copies + copied, T(0.f));
  std::fill(zeros, zeros + v_dim * sizeof(float), 0);
  auto row_of = [=](int64_t query, int64_t head) {
    return head / group * rows + query * group + head % group;
  };
  const Convert to_float = converter_from<float>(layer.q_type);
  for (int64_t j = 0; j < item.num_queries; j++)
    for (int64_t head = 0; head < plan.num_qo_heads; head++) {
      float* row = q + row_of(j, head) * q_stride;
      std::fill(row + dim, row + q_stride, 0.f);
      to_float(layer.query(run.row(item, j), head), row, dim);
    }
  const int32_t* slots = run.slots(item);
  const int64_t length = run.end(item) - item.begin;
  const bool all_see_all = run.seen(item, 0) >= length;
  const Convert convert = converter_from<T>(layer.kv_type);
  // The rows of one head from token `t` on: `place` says where a token's is. Those that follow the
  // last token are `past`.
  auto read = [&](auto place, int64_t t, int64_t end, int64_t size, int64_t stride, T* copies,
                  const char* past) {
    Rows<T> found;
    found.itemsize = ITEMSIZE[layer.kv_type];
    const bool in_place = layer.kv_type == type_of<T> && size == stride;
    for (int64_t u = 0; u < TOKENS; u++) {
      const char* from = t + u < end ? place(slots[t + u]) : past;
      found.next[u] = place(slots[std::min(t + u + TOKENS, length - 1)]);
      found.at[u] = in_place ? (const T*)from : copies + u * stride;
      if (!in_place) convert(from, copies + u * stride, size);
    }
    return found;
  };
  for (int64_t first = 0; first < length; first += FEW_TILE) {
    const int64_t n = std::min(FEW_TILE, length - first);
    for (int64_t t = 0; t < n; t += TOKENS)
      for (int64_t h = 0; h < heads; h++) {
        auto key = [&](int64_t slot) { return layer.key(slot, h); };
        const Rows<T> k =
            read(key, first + t, first + n, dim, q_stride, k_copies, key(slots[first + n - 1]));
        static constexpr std::array DOTS = {dot<T, 1>, dot<T, 2>, dot<T, 3>, dot<T, ROWS>};
        for (int64_t j = 0, r = h * rows; j < rows; j += ROWS, r += ROWS)
          DOTS[std::min<int64_t>(rows - j, ROWS) - 1](q + r * q_stride, q_stride, k,
                                                      scores + r * FEW_TILE + t);
      }
    for (int64_t r = 0; r < heads * rows; r++) {
      int64_t seen = n;
      if (!all_see_all) {
        seen = run.seen(item, r % rows / group);
        if (seen <= 0) continue;  // what becomes of the row is not written
        seen = std::clamp<int64_t>(seen - first, 0, n);
      }
      softmax_row(scores + r * FEW_TILE, seen, n, layer.k_scale(r / rows), float(layer.logit_cap),
                  out + r * out_stride, v_dim, peak[r], sum[r]);
    }
    for (int64_t t = 0; t < n; t += TOKENS)
      for (int64_t h = 0; h < heads; h++) {
        auto value = [&](int64_t slot) { return layer.value(slot, h); };
        const Rows<T> v = read(value, first + t, first + n, v_dim, out_stride, v_copies, zeros);
        static constexpr std::array ADDS = {add_values<T, 1>, add_values<T, 2>, add_values<T, 3>,
                                            add_values<T, ROWS>};
        for (int64_t j = 0, r = h * rows; j < rows; j += ROWS, r += ROWS)
          ADDS[std::min<int64_t>(rows - j, ROWS) - 1](scores + r * FEW_TILE + t, out_stride, v,
                                                      out + r * out_stride);
      }
  }
  for (int64_t j = 0; j < item.num_queries; j++)
    for (int64_t head = 0; head < plan.num_qo_heads; head++) {
      const int64_t r = row_of(j, head);
      const float scale = softmax_scale(layer.k_scale(r / rows), float(layer.logit_cap));
      run.write_part(item, j, head, out + r * out_stride, peak[r] * scale, sum[r]);
    }
}

}  // namespace
