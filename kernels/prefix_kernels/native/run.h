// One run of a layer as its threads see it: what is shared, what each keeps, where items write.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>

#include "work.h"

namespace {

struct Buffer {  // a thread's own; grows, and is kept
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
  template <class T> T* at_least(int64_t n) {
    const size_t bytes = round_up(n * sizeof(T), 64);
    if (bytes > size) {
      std::free(data);
      data = std::aligned_alloc(64, bytes);
      size = data ? bytes : 0;
      if (!data) throw std::bad_alloc();
      std::memset(data, 0, bytes);  // padding is multiplied too, and may not be slow to
    }
    return (T*)data;
  }
};
struct Scratch { Buffer q, k, v, scores, weights, out, row, state; };
thread_local Scratch scratch;

struct Run {
  const Plan& plan;
  const Layer& layer;
  Work& work;
  char* message;  // why the run failed
  int64_t message_size;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  const int32_t* slots(const Item& item) const {
    return plan.slots + plan.slot_offset[item.pack] + item.begin;
  }
  // The row of q of an item's query.
  int64_t row(const Item& item, int64_t query) const {
    return plan.queries[plan.query_indptr[item.pack] + item.first_query + query];
  }
  // Tokens of an item that its query sees, of those that it begins with; none, or fewer, where the
  // item begins behind the query's own token.
  int64_t seen(const Item& item, int64_t query) const {
    return std::min(item.end, plan.seen(item.pack, item.first_query + query)) - item.begin;
  }
  // Where the tokens end that any query of an item sees.
  int64_t end(const Item& item) const {
    return item.begin + std::max<int64_t>(0, seen(item, item.num_queries - 1));
  }
  // The parts of a row: first, and past the last.
  std::pair<int64_t, int64_t> parts(int64_t row) const {
    return {work.part_indptr[plan.request_indptr[row]],
            work.part_indptr[plan.request_indptr[row + 1]]};
  }
  // Write a row whose parts are merged; a sink takes its part of it (torch_executor.merge_partials).
  void write_output(int64_t row, int64_t head, float* out, float lse) const {
    if (layer.sinks) {
      const float kept = 1.f / (1.f + std::exp(layer.sink(head) - lse));
      for (int64_t d = 0; d < plan.v_head_dim; d++) out[d] *= kept;
    }
    const int64_t at = row * layer.out_stride + head * layer.out_head_stride;
    converter_to(layer.q_type)(out, layer.out + at * ITEMSIZE[layer.q_type], plan.v_head_dim);
    if (layer.lse) layer.lse[row * layer.lse_stride + head * layer.lse_head_stride] = lse;
  }
  // Normalise the output of one row, and write it with its lse to the part that is the item's, or
  // to the layer's output where the row has no other.
  void write_part(const Item& item, int64_t query, int64_t head, float* out, float peak,
                  float sum) const {
    const bool empty = seen(item, query) <= 0;
    const float factor = layer.v_scale(head / plan.group()) / sum;
    const float lse = empty ? -INF : peak + std::log(sum);
    for (int64_t d = 0; d < plan.v_head_dim; d++) out[d] = empty ? 0.f : out[d] * factor;
    const auto [first, last] = parts(row(item, query));
    if (last - first == 1) return write_output(row(item, query), head, out, lse);
    const int64_t place = item.split * plan.num_queries(item.pack) + item.first_query + query;
    const int64_t partial = plan.partial_index[plan.partial_indptr[item.pack] + place];
    const int64_t at = (work.part_indptr[partial] + item.piece) * plan.num_qo_heads + head;
    std::copy_n(out, plan.v_head_dim, layer.partial_out + at * plan.v_head_dim);
    layer.partial_lse[at] = lse;
  }
};

// Whether weights are not just exp of a positive multiple of the products.
bool must_transform(float scale, float cap) { return cap > 0 || scale <= 0; }
// What the softmax multiplies differences of scores by. Not the scores: rounded products of large
// ones would differ from the largest by more than exp can stand.
float softmax_scale(float scale, float cap) { return must_transform(scale, cap) ? 1.f : scale; }
F transformed(F x, float scale, float cap) { return cap > 0 ? capped(x * scale, cap) : x * scale; }

}  // namespace
