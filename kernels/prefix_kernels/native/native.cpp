// The native executor: one call runs a whole pack plan of one layer on the CPU.
//
// A plan is cut into items (work.h), which threads take from one list, the largest first. Packs of
// many rows (queries times group size) are matrix products by torch's `brgemm` (many_rows.h), that
// is oneDNN with AVX2, AVX-512 or AMX; packs of few rows are vector products in place (few_rows.h).
// Every item writes partials, and whoever finishes the last item of a query merges them.
//
// No Python and no tensors in here: native_library.py compiles this in a few seconds, and
// native_executor.py calls the functions at the end through ctypes.

#include <ATen/Parallel.h>

#include <cstdio>
#include <limits>

#include "few_rows.h"
#include "many_rows.h"

namespace {

// A query's output: its parts, weighted by exp(lse of the part - lse of all).
void merge(const Run& run, int64_t row) {
  const int64_t heads = run.plan.num_qo_heads, dim = run.plan.v_head_dim;
  const auto [first, last] = run.parts(row);
  float* sum = scratch.row.at_least<float>(dim);
  for (int64_t head = 0; head < heads; head++) {
    const float* lse = run.layer.partial_lse + head;
    float peak = -INF, total = 0.f;
    for (int64_t i = first; i < last; i++) peak = std::max(peak, lse[i * heads]);
    std::fill(sum, sum + dim, 0.f);
    for (int64_t i = first; i < last; i++) {
      const float weight = std::exp(lse[i * heads] - peak);
      if (weight == 0.f) continue;
      const float* values = run.layer.partial_out + (i * heads + head) * dim;
      for (int64_t d = 0; d < dim; d++) sum[d] += weight * values[d];
      total += weight;
    }
    for (int64_t d = 0; d < dim; d++) sum[d] /= total;
    run.write_output(row, head, sum, peak + std::log(total));
  }
}

using Attend = void (*)(const Run&, const Item&);

void take_items(void* argument) {
  Run& run = *(Run*)argument;
  static const Attend few[] = {attend_few<float>, attend_few<BFloat16>, attend_few<Half>,
                               attend_few<float>, attend_few<float>};
  static const Attend many[] = {attend_many<float>, attend_many<BFloat16>, attend_many<Half>};
  const int64_t num_items = run.work.items.size();
  try {
    const Type type = product_type(run.layer);
    for (int64_t i; (i = run.next.fetch_add(1)) < num_items;) {
      const Item& item = run.work.items[i];
      (item.kv_head < 0 ? few[run.layer.kv_type] : many[type])(run, item);
      for (int64_t j = 0; j < item.num_queries; j++) {
        const int64_t row = run.row(item, j);
        const auto [first, last] = run.parts(row);
        if (run.work.open[row].fetch_sub(1, std::memory_order_acq_rel) == 1 && last - first > 1)
          merge(run, row);
      }
    }
#if !defined(PREFIX_PLAIN_PRODUCTS)
    if (type != FLOAT32) at::native::cpublas::brgemm_release();
#endif
  } catch (const std::exception& error) {  // none may leave a thread
    run.next = num_items;
    if (!run.failed.exchange(true))
      std::snprintf(run.message, run.message_size, "%s", error.what());
  }
}

}  // namespace

// What an OpenMP compiler makes of `parallel`, called by name: torch's threads are those of the
// OpenMP library that it has loaded, and compiling with -fopenmp could bring in a second one.
extern "C" void GOMP_parallel(void (*function)(void*), void* argument, unsigned, unsigned);

extern "C" {

Work* prefix_new() { return new Work; }

void prefix_delete(Work* work) { delete work; }

// Cut a plan for the threads that torch has now; returns the number of parts, which are [parts, Hq,
// Dv] of output and [parts, Hq] of lse.
int64_t prefix_cut(Work* work, const Plan* plan, int64_t max_parts) {
  return cut(*work, *plan, at::get_num_threads(), max_parts);
}

// The costs of the items in the order in which they are taken, where `costs` is given; their number.
int64_t prefix_costs(const Work* work, int64_t* costs) {
  for (size_t i = 0; costs && i < work->items.size(); i++) costs[i] = work->items[i].cost;
  return work->items.size();
}

// Bit 0: bfloat16 is multiplied as it is; bit 1: float16. Otherwise it is widened to float32.
int64_t prefix_products() { return multiplies<BFloat16>() + 2 * multiplies<Half>(); }

// Copy the slots of the plan's positions, and find the smallest and the largest of them. `slots`
// are zeroed where tails will grow.
void prefix_copy_slots(const Plan* plan, int32_t* slots, int64_t num_slots, const int64_t* starts,
                       const void* table, int64_t row_stride, int64_t table_is_64_bit,
                       const int64_t* rows, int64_t* range) {
  int64_t low = num_slots ? INT64_MAX : 0, high = 0;
  auto copy = [&]<class T>(const T* from, int32_t* to, int64_t n) {
    T least = std::numeric_limits<T>::max(), most = 0;
    for (int64_t t = 0; t < n; t++) {
      least = std::min(least, from[t]);
      most = std::max(most, from[t]);
      to[t] = int32_t(from[t]);
    }
    if (n) low = std::min<int64_t>(low, least), high = std::max<int64_t>(high, most);
  };
  for (int64_t p = 0; p < plan->num_packs; p++) {
    const int64_t row = rows[plan->queries[plan->query_indptr[p]]], n = plan->lengths[p];
    const int64_t at = row * row_stride + starts[p];
    int32_t* to = slots + plan->slot_offset[p];
    if (table_is_64_bit) copy((const int64_t*)table + at, to, n);
    else copy((const int32_t*)table + at, to, n);
    std::fill(to + n, slots + plan->slot_offset[p + 1], 0);
  }
  range[0] = low, range[1] = high;
}

// Let every tail grow by a token, or by `num_new`, and the items of a cut with them; write the slots
// of a step's query tokens, which are the last of each tail, and widen `range` by them. Returns 0,
// or 1 and does nothing where a tail has no room left.
int64_t prefix_append(Work* work, const Plan* plan, int32_t* slots, int64_t* lengths,
                      const int64_t* num_new, const void* new_slots, int64_t are_64_bit,
                      int64_t* range) {
  const int64_t first = plan->num_packs - plan->num_requests;
  auto growth = [=](int64_t p) { return num_new ? num_new[p - first] : 1; };
  for (int64_t p = first; p < plan->num_packs; p++)
    if (plan->slot_offset[p] + lengths[p] + growth(p) > plan->slot_offset[p + 1]) return 1;
  int64_t row = 0;
  for (int64_t p = first; p < plan->num_packs; p++) {
    lengths[p] += growth(p);
    int32_t* end = slots + plan->slot_offset[p] + lengths[p];
    for (int64_t left = plan->num_queries(p); left > 0; left--, row++) {
      const int64_t slot = are_64_bit ? ((const int64_t*)new_slots)[row]
                                      : ((const int32_t*)new_slots)[row];
      end[-left] = int32_t(slot);
      range[0] = std::min(range[0], slot), range[1] = std::max(range[1], slot);
    }
  }
  for (size_t i : work->growing) work->items[i].end += growth(work->items[i].pack);
  return 0;
}

// Run one layer. Returns 0, or 1 with the reason in `message`.
int64_t prefix_run(Work* work, const Plan* plan, const Layer* layer, char* message, int64_t size) {
  for (int64_t b = 0; b < plan->num_rows; b++) work->open[b] = work->contributions[b];
  Run run{*plan, *layer, *work, message, size};
  at::internal::lazy_init_num_threads();
  if (at::get_num_threads() == 1 || at::in_parallel_region() || work->items.size() == 1)
    take_items(&run);
  else
    GOMP_parallel(take_items, &run, 0, 0);
  return run.failed;
}
}
