// The plan and the layer that the native executor is called with, and how a plan is cut into items.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// What the executor is called with: all members are eight bytes, as in native_executor.py.

struct Plan {  // arrays of prefix_kernels.plan.PackPlan, with the lengths of now
  int64_t num_packs, num_requests, num_rows, num_partials;
  const int64_t *query_indptr, *queries, *num_splits, *slot_offset, *lengths;
  const int64_t *partial_indptr, *partial_index, *request_indptr;
  const int32_t* slots;
  int64_t num_qo_heads, num_kv_heads, head_dim, v_head_dim;
  int64_t group() const { return num_qo_heads / num_kv_heads; }
  bool is_tail(int64_t pack) const { return pack >= num_packs - num_requests; }
  int64_t num_queries(int64_t pack) const { return query_indptr[pack + 1] - query_indptr[pack]; }
  // Tokens of a pack that its query `j` sees: all, or in a tail of several those up to its own.
  int64_t seen(int64_t pack, int64_t j) const {
    return lengths[pack] - (is_tail(pack) ? num_queries(pack) - 1 - j : 0);
  }
};

struct Layer {  // strides in elements
  const char *q, *k, *v;
  char* out;
  float *lse, *partial_out, *partial_lse;  // lse: null where it is not wanted
  const float *k_scales, *v_scales;        // per KV head; null for 1
  const char* sinks;                       // per query head; null for none
  int64_t q_type, kv_type, sink_type;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride;
  int64_t out_stride, out_head_stride, lse_stride, lse_head_stride, k_scale_stride, v_scale_stride;
  double scale, v_factor, logit_cap;
  float k_scale(int64_t head) const {
    return float(scale * (k_scales ? k_scales[head * k_scale_stride] : 1.f));
  }
  float v_scale(int64_t head) const {
    return float(v_factor * (v_scales ? v_scales[head * v_scale_stride] : 1.f));
  }
  float sink(int64_t head) const {
    float sink;
    converter_from<float>(sink_type)(sinks + head * ITEMSIZE[sink_type], &sink, 1);
    return sink;
  }
  const char* query(int64_t row, int64_t head) const {
    return q + (row * q_stride + head * q_head_stride) * ITEMSIZE[q_type];
  }
  const char* key(int64_t slot, int64_t head) const {
    return k + (slot * k_stride + head * k_head_stride) * ITEMSIZE[kv_type];
  }
  const char* value(int64_t slot, int64_t head) const {
    return v + (slot * v_stride + head * v_head_stride) * ITEMSIZE[kv_type];
  }
  // Whether rows of V begin where those of K do, as in multi-head latent attention.
  bool v_in_k() const {
    return v == k && v_stride == k_stride && v_head_stride == k_head_stride;
  }
};

constexpr int64_t FEW_ROWS = 8;     // per KV head; a product would be mostly padding
constexpr int64_t MOST_ROWS = 256;  // of an item: its state stays in a 1 MiB L2 cache
constexpr int64_t COLUMNS = 16;     // the rows of an item are padded to a multiple
constexpr int64_t TILE = 256;       // tokens that are multiplied at a time
constexpr int64_t FEW_TILE = 64;    // tokens that are read token by token at a time
constexpr int64_t MIN_PIECE = 256;  // tokens; shorter ones would not pay for their partials
constexpr int64_t ITEMS_PER_THREAD = 8;  // at least: with the largest first, threads end together
constexpr int64_t READ_COST = 24;  // of a token from memory, in rows computed meanwhile

struct Item {
  int64_t pack, split, piece, begin, end;     // tokens of the pack
  int64_t first_query, num_queries, kv_head;  // kv_head -1: all of them
  int64_t cost;
};

struct Work {
  std::vector<Item> items;      // largest first
  std::vector<size_t> growing;  // items that end where a tail ends
  // Scratch of `cut`, members so that its memory is used again: items as cut; -cost and index.
  std::vector<Item> unsorted;
  std::vector<std::pair<int64_t, size_t>> order;
  std::vector<int64_t> part_indptr;             // the parts of each partial of the plan
  std::vector<int32_t> contributions;           // items of each query
  std::unique_ptr<std::atomic<int32_t>[]> open;  // of those, in the run under way
};

// A split of the plan that would keep one thread busy while others wait is cut further; its
// partials then have several parts, in all no more than `max_parts` or the plan's own. Returns the
// number of parts.
int64_t cut(Work& work, const Plan& plan, int64_t num_threads, int64_t max_parts) {
  const int64_t group = plan.group(), heads = plan.num_kv_heads;
  const int64_t unit = COLUMNS / std::gcd(COLUMNS, group);
  auto num_rows = [&](int64_t p) { return plan.num_queries(p) * group; };
  double total = 0;
  for (int64_t p = 0; p < plan.num_packs; p++)
    total += double(plan.lengths[p]) * heads * (READ_COST + num_rows(p));
  const double most = num_threads > 1 ? total / (num_threads * ITEMS_PER_THREAD) + 1 : INF;
  int64_t spare = std::max<int64_t>(0, max_parts - plan.num_partials);
  work.unsorted.clear();
  work.part_indptr.assign(plan.num_partials + 1, 0);
  work.contributions.assign(plan.num_rows, 0);
  for (int64_t p = 0; p < plan.num_packs; p++) {
    const int64_t first = plan.query_indptr[p], count = plan.num_queries(p);
    const int64_t length = plan.lengths[p];
    const bool few = num_rows(p) <= FEW_ROWS;
    const int64_t widest = few ? count : std::max<int64_t>(1, MOST_ROWS / group);
    // The queries that the next item takes of those from `j` on: all items are of like width, in
    // whole columns of products as far as that goes.
    auto width = [&](int64_t j) {
      const int64_t left = count - j, even = divide_up(left, divide_up(left, widest));
      return std::min({round_up(even, unit), widest, left});
    };
    const int64_t chunk = divide_up(length, plan.num_splits[p]);  // as plan.split_bounds
    auto cost = [&](int64_t tokens, int64_t queries) {
      return (few ? heads : 1) * tokens * (READ_COST + queries * group);
    };
    const int64_t wanted = int64_t(double(cost(chunk, width(0))) / most) + 1;
    const int64_t most_pieces =
        std::min(chunk / MIN_PIECE, 1 + spare / std::max<int64_t>(1, plan.num_splits[p] * count));
    const int64_t pieces = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, most_pieces));
    const int64_t piece = std::max(round_up(divide_up(chunk, pieces), few ? FEW_TILE : TILE), TILE);
    for (int64_t split = 0; split < plan.num_splits[p]; split++) {
      const int64_t low = std::min(split * chunk, length), high = std::min(low + chunk, length);
      const int64_t num_pieces = std::max<int64_t>(1, divide_up(high - low, piece));
      spare -= (num_pieces - 1) * count;
      for (int64_t j = 0; j < count; j++)
        work.part_indptr[1 + plan.partial_index[plan.partial_indptr[p] + split * count + j]] =
            num_pieces;
      for (int64_t n = 0; n < num_pieces; n++) {
        const int64_t begin = low + n * piece, end = std::min(begin + piece, high);
        for (int64_t j = 0, own; j < count; j += own) {
          own = width(j);
          const int64_t seen = std::min(plan.seen(p, j + own - 1), end) - begin;
          const int64_t own_cost = cost(std::max<int64_t>(seen, 0), own);
          for (int64_t head = few ? -1 : 0; head < (few ? 0 : heads); head++)
            work.unsorted.push_back({p, split, n, begin, end, j, own, head, own_cost});
          for (int64_t i = j; i < j + own; i++)
            work.contributions[plan.queries[first + i]] += int32_t(few ? 1 : heads);
        }
      }
    }
  }
  std::partial_sum(work.part_indptr.begin(), work.part_indptr.end(), work.part_indptr.begin());
  work.order.clear();
  for (size_t i = 0; i < work.unsorted.size(); i++) work.order.push_back({-work.unsorted[i].cost, i});
  std::sort(work.order.begin(), work.order.end());
  work.items.clear();
  work.growing.clear();
  for (const auto& [cost, i] : work.order) {
    const Item& item = work.unsorted[i];
    const bool is_last = item.split == plan.num_splits[item.pack] - 1;
    if (plan.is_tail(item.pack) && is_last && item.end == plan.lengths[item.pack])
      work.growing.push_back(work.items.size());
    work.items.push_back(item);
  }
  work.open.reset(new std::atomic<int32_t>[plan.num_rows]);
  return work.part_indptr.back();
}

}  // namespace
