// Packs of few rows, and so most tails: KV in place, token by token, all heads of a token together.

#pragma once

#include <array>

#include "run.h"

namespace {

// Tokens taken together, so that their rows and the sums of four query rows fit the registers.
constexpr int TOKENS = LANES == 8 ? 2 : 4;

// Products of `G` query rows with `TOKENS` keys.
template <class T, int G>
void dot(const float* q, int64_t q_stride, const T* const* k, int64_t dim, float* scores) {
  constexpr int PADDED = (G * TOKENS + LANES - 1) / LANES * LANES;
  F sums[PADDED] = {};  // [G, TOKENS]
  auto add = [&](int64_t d, auto read) {
    F x[TOKENS];
    for (int t = 0; t < TOKENS; t++) x[t] = read(k[t] + d);
    for (int g = 0; g < G; g++) {
      const F row = get<F>(q + g * q_stride + d);
      for (int t = 0; t < TOKENS; t++) sums[g * TOKENS + t] += row * x[t];
    }
  };
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) add(d, [](const T* p) { return load(p); });
  if (d < dim) add(d, [=](const T* p) { return load_some(p, dim - d); });
  float totals[PADDED];
  for (int i = 0; i < PADDED; i += LANES) put(totals + i, sums_of(sums + i));
  for (int g = 0; g < G; g++)
    std::memcpy(scores + g * FEW_TILE, totals + g * TOKENS, TOKENS * sizeof(float));
}

// Add `N` values, weighted, to the outputs of some rows.
template <class T, int N>
void add_values(const float* weights, const T* const* v, int64_t dim, float* out, int64_t stride,
                int64_t rows) {
  for (int64_t d = 0; d < dim; d += LANES) {
    F x[N];
    for (int t = 0; t < N; t++) x[t] = load_some(v[t] + d, dim - d);
    for (int64_t r = 0; r < rows; r++) {
      F sum = get<F>(out + r * stride + d);
      for (int t = 0; t < N; t++) sum += weights[r * FEW_TILE + t] * x[t];
      put(out + r * stride + d, sum);
    }
  }
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

template <class T> void attend_few(const Run& run, const Item& item) {
  const Plan& plan = run.plan;
  const Layer& layer = run.layer;
  const int64_t heads = plan.num_kv_heads, group = plan.group(), rows = item.num_queries * group;
  const int64_t dim = plan.head_dim, v_dim = plan.v_head_dim;
  const int64_t q_stride = round_up(dim, LANES), out_stride = round_up(v_dim, LANES);
  float* q = scratch.q.at_least<float>(heads * rows * q_stride);  // [Hkv, rows, D]
  float* scores = scratch.scores.at_least<float>(heads * rows * FEW_TILE);
  float* out = scratch.out.at_least<float>(heads * rows * out_stride);
  float* peak = scratch.state.at_least<float>(2 * heads * rows);
  float* sum = peak + heads * rows;
  std::fill(out, out + heads * rows * out_stride, 0.f);
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
  const int32_t* slots = run.slots(item);
  for (int64_t first = item.begin; first < item.end; first += FEW_TILE, slots += FEW_TILE) {
    const int64_t n = std::min(FEW_TILE, item.end - first);
    for (int64_t t = 0; t < n; t += TOKENS)
      for (int64_t h = 0; h < heads; h++) {
        const T* k[TOKENS];
        for (int u = 0; u < TOKENS; u++) {
          k[u] = (const T*)layer.key(slots[std::min(t + u, n - 1)], h);
          __builtin_prefetch(layer.key(slots[std::min(t + u + TOKENS, n - 1)], h));
        }
        const float* own = q + h * rows * q_stride;
        float* to = scores + h * rows * FEW_TILE + t;
        for (int64_t j = 0; j < rows; j += 4) {
          static constexpr auto DOTS = std::array{dot<T, 1>, dot<T, 2>, dot<T, 3>, dot<T, 4>};
          DOTS[std::min<int64_t>(rows - j, 4) - 1](own + j * q_stride, q_stride, k, dim,
                                                   to + j * FEW_TILE);
        }
      }
    for (int64_t r = 0; r < heads * rows; r++)
      softmax_row(scores + r * FEW_TILE, n, layer.k_scale(r / rows), float(layer.logit_cap),
                  out + r * out_stride, v_dim, peak[r], sum[r]);
    for (int64_t t = 0; t < n;) {
      const int64_t taken = n - t >= 4 ? 4 : 1;
      for (int64_t h = 0; h < heads; h++) {
        const T* v[4];
        for (int64_t u = 0; u < taken; u++) {
          v[u] = (const T*)layer.value(slots[t + u], h);
          __builtin_prefetch(layer.value(slots[std::min(t + u + taken, n - 1)], h));
        }
        auto add = taken == 4 ? add_values<T, 4> : add_values<T, 1>;
        add(scores + h * rows * FEW_TILE + t, v, v_dim, out + h * rows * out_stride, out_stride,
            rows);
      }
      t += taken;
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
