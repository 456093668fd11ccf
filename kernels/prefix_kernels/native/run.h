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
  int64_t request(const Item& item, int64_t query) const {
    return plan.queries[plan.query_indptr[item.pack] + item.first_query + query];
  }
  // Write the output of one row, normalised, and its lse to the part that is the item's.
  void write_part(const Item& item, int64_t query, int64_t head, const float* out, float peak,
                  float sum) const {
    const int64_t count = plan.query_indptr[item.pack + 1] - plan.query_indptr[item.pack];
    const int64_t place = item.split * count + item.first_query + query;
    const int64_t partial = plan.partial_index[plan.partial_indptr[item.pack] + place];
    const int64_t row = (work.part_indptr[partial] + item.piece) * plan.num_qo_heads + head;
    const bool empty = item.begin == item.end;
    const float factor = empty ? 0.f : layer.v_scale(head / plan.group()) / sum;
    float* to = layer.partial_out + row * plan.v_head_dim;
    for (int64_t d = 0, n = plan.v_head_dim; d < n; d += LANES)
      store_some(to + d, load_some(out + d, n - d) * factor, n - d);
    layer.partial_lse[row] = empty ? -INF : peak + std::log(sum);
  }
};

// Whether weights are not just exp of a positive multiple of the products.
bool must_transform(float scale, float cap) { return cap > 0 || scale <= 0; }
// What the softmax multiplies differences of scores by. Not the scores: rounded products of large
// ones would differ from the largest by more than exp can stand.
float softmax_scale(float scale, float cap) { return must_transform(scale, cap) ? 1.f : scale; }
F transformed(F x, float scale, float cap) { return cap > 0 ? capped(x * scale, cap) : x * scale; }

}  // namespace
