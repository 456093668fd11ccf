// Packs of few rows, and so most tails: KV in place, token by token, all heads of a token together.

#pragma once

#include <array>
#include <bit>

#include "run.h"

namespace {

// Tokens taken together. Their rows are read as floats, so that one product serves all types.
constexpr int TOKENS = 8;
#ifndef AHEAD_T
#define AHEAD_T 8
#endif
constexpr int64_t FEW_AHEAD = AHEAD_T;
constexpr int SUMS = std::max(LANES, 8);  // vectors of sums that the registers hold

template <class T> struct Rows { const T* at[TOKENS]; };

// Rows of K or V as `T` in whole vectors: where they are, or copied and padded with 0.
template <class T, class Place>
Rows<T> read_rows(Place place, int64_t type, Convert convert, int64_t dim, T* to) {
  const int64_t stride = round_up(dim, LANES);
  const bool in_place = type == type_of<T> && stride == dim;
  Rows<T> rows;
  for (int64_t t = 0; t < TOKENS; t++) {
    rows.at[t] = (const T*)place(t);
    if (in_place) continue;
    convert(rows.at[t], to + t * stride, dim);
    rows.at[t] = to + t * stride;
  }
  return rows;
}

// Scores [G, FEW_TILE] of `G` query rows with the keys of `TOKENS` tokens.
template <class T, int G> void dot(const float* q, int64_t stride, const Rows<T>& k, float* scores) {
  constexpr int WIDTH = SUMS / std::bit_ceil(unsigned(G)), N = std::min(TOKENS, WIDTH);
  for (int first = 0; first < TOKENS; first += N) {
    F sums[G][N] = {};
    for (int64_t d = 0; d < stride; d += LANES) {
      F x[N];
      for (int t = 0; t < N; t++) x[t] = load(k.at[first + t] + d);
      for (int g = 0; g < G; g++) {
        const F row = get<F>(q + g * stride + d);
        for (int t = 0; t < N; t++) sums[g][t] += row * x[t];
      }
    }
    F all[SUMS] = {};
    for (int g = 0; g < G; g++)
      for (int t = 0; t < N; t++) all[g * N + t] = sums[g][t];
    float totals[SUMS];
    for (int i = 0; i < SUMS; i += LANES) put(totals + i, sums_of(all + i));
    for (int g = 0; g < G; g++)
      std::memcpy(scores + g * FEW_TILE + first, totals + g * N, N * sizeof(float));
  }
}

// Add the values of `TOKENS` tokens, weighted, to the outputs of `G` rows.
template <class T, int G>
void add_values(const float* weights, const Rows<T>& v, int64_t stride, float* out) {
  constexpr int WIDTH = SUMS / std::bit_ceil(unsigned(G));
  auto add = [&]<int W>(std::integral_constant<int, W>, int64_t d) {
    F sums[G][W];
    for (int g = 0; g < G; g++)
      for (int w = 0; w < W; w++) sums[g][w] = get<F>(out + g * stride + d + w * LANES);
    for (int t = 0; t < TOKENS; t++) {
      F x[W];
      for (int w = 0; w < W; w++) x[w] = load(v.at[t] + d + w * LANES);
      for (int g = 0; g < G; g++) {
        const F weight = splat(weights[g * FEW_TILE + t]);
        for (int w = 0; w < W; w++) sums[g][w] += weight * x[w];
      }
    }
    for (int g = 0; g < G; g++)
      for (int w = 0; w < W; w++) put(out + g * stride + d + w * LANES, sums[g][w]);
  };
  int64_t d = 0;
  for (; d + WIDTH * LANES <= stride; d += WIDTH * LANES)
    add(std::integral_constant<int, WIDTH>(), d);
  for (; d < stride; d += LANES) add(std::integral_constant<int, 1>(), d);
}

// One row of a tile: scores become weights, and the state of the row moves on.
void softmax_row(float* scores, int64_t n, float scale, float cap, float* out, int64_t dim,
                 float& peak, float& sum) {
  const int64_t padded = round_up(n, LANES);
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
  for (int64_t t = 0; t < n; t += LANES) {
    const F weights = exp_of((get<F>(scores + t) - now) * scale);
    put(scores + t, weights);
    total += weights;
  }
  if (shrink != 1.f)
    for (int64_t d = 0; d < dim; d += LANES) put(out + d, get<F>(out + d) * shrink);
  sum = sum * shrink + sum_of(total);
  peak = now;
}


void fetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

template <class T> void attend_few(const Run& run, const Item& item) {
  const Plan& plan = run.plan;
  const Layer& layer = run.layer;
  const int64_t heads = plan.num_kv_heads, group = plan.group(), rows = item.num_queries * group;
  const int64_t dim = plan.head_dim, v_dim = plan.v_head_dim;
  const int64_t q_stride = round_up(dim, LANES), out_stride = round_up(v_dim, LANES);
  const int64_t itemsize = ITEMSIZE[layer.kv_type];
  float* q = scratch.q.at_least<float>(heads * rows * q_stride);  // [Hkv, rows, D]
  float* scores = scratch.scores.at_least<float>(heads * rows * FEW_TILE);
  float* out = scratch.out.at_least<float>(heads * rows * out_stride);
  float* peak = scratch.state.at_least<float>(2 * heads * rows);
  float* sum = peak + heads * rows;
  T* floats = scratch.k.at_least<T>(TOKENS * std::max(q_stride, out_stride));
  std::fill(out, out + heads * rows * out_stride, 0.f);
  std::fill(floats, floats + TOKENS * std::max(q_stride, out_stride), T(0.f));
  const char* zeros = (const char*)scratch.row.at_least<float>(v_dim);
  std::fill((float*)zeros, (float*)zeros + v_dim, 0.f);
  std::fill(peak, sum, -INF);
  std::fill(sum, sum + heads * rows, 0.f);
  auto row_of = [=](int64_t query, int64_t head) {
    return head / group * rows + query * group + head % group;
  };
  const Convert to_float = converter_from<float>(layer.q_type);
  for (int64_t j = 0; j < item.num_queries; j++)
    for (int64_t head = 0; head < plan.num_qo_heads; head++) {
      float* row = q + row_of(j, head) * q_stride;
      std::fill(row + dim, row + q_stride, 0.f);
      to_float(layer.query(run.request(item, j), head), row, dim);
    }
  const Convert kv_to = converter_from<T>(layer.kv_type);
  const int32_t* slots = run.slots(item);
  const int64_t length = item.end - item.begin;
  for (int64_t first = 0; first < length; first += FEW_TILE) {
    const int64_t n = std::min(FEW_TILE, length - first), last = first + n - 1;
    for (int64_t t = 0; t < n; t += TOKENS)
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t u = 0; u < TOKENS; u++)
          fetch(layer.key(slots[std::min(first + t + u + FEW_AHEAD, length - 1)], h), dim * itemsize);
        const Rows<T> k = read_rows<T>([&](int64_t u) { return layer.key(slots[std::min(first + t + u, last)], h); }, layer.kv_type, kv_to, dim, floats);
        static constexpr auto DOTS = std::array{dot<T, 1>, dot<T, 2>, dot<T, 3>, dot<T, 4>};
        for (int64_t j = 0; j < rows; j += 4)
          DOTS[std::min<int64_t>(rows - j, 4) - 1](q + (h * rows + j) * q_stride, q_stride, k,
                                                   scores + (h * rows + j) * FEW_TILE + t);
      }
    for (int64_t r = 0; r < heads * rows; r++)
      softmax_row(scores + r * FEW_TILE, n, layer.k_scale(r / rows), float(layer.logit_cap),
                  out + r * out_stride, v_dim, peak[r], sum[r]);
    for (int64_t t = 0; t < n; t += TOKENS)
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t u = 0; u < TOKENS; u++)
          fetch(layer.value(slots[std::min(first + t + u + FEW_AHEAD, length - 1)], h),
                v_dim * itemsize);
        const Rows<T> v = read_rows<T>([&](int64_t u) { return t + u < n ? layer.value(slots[first + t + u], h) : zeros; }, layer.kv_type, kv_to, v_dim, floats);
        static constexpr auto ADDS =
            std::array{add_values<T, 1>, add_values<T, 2>, add_values<T, 3>, add_values<T, 4>};
        for (int64_t j = 0; j < rows; j += 4)
          ADDS[std::min<int64_t>(rows - j, 4) - 1](scores + (h * rows + j) * FEW_TILE + t, v,
                                                   out_stride, out + (h * rows + j) * out_stride);
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
