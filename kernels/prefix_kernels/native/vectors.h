// Vectors and element types of the native executor: loads, stores, exp, tanh, transposition.
//
// The compiler's vectors, as wide as the instructions that it may use, so that one source serves
// AVX-512, AVX2 and Arm. Intrinsics only where 16-bit floats are converted.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using c10::BFloat16;
using c10::Half;
constexpr float INF = std::numeric_limits<float>::infinity();

#if !defined(PREFIX_LANES)  // tests: as many as on other processors
#if defined(__AVX512F__)
#define PREFIX_LANES 16
#elif defined(__AVX__)
#define PREFIX_LANES 8
#else
#define PREFIX_LANES 4
#endif
#endif
constexpr int LANES = PREFIX_LANES;

typedef float F __attribute__((vector_size(LANES * 4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));
typedef uint32_t U __attribute__((vector_size(LANES * 4)));
typedef int16_t S16 __attribute__((vector_size(LANES * 2)));
typedef uint16_t U16 __attribute__((vector_size(LANES * 2)));
typedef uint8_t U8 __attribute__((vector_size(LANES)));

struct E4M3 { uint8_t bits; };
struct E5M2 { uint8_t bits; };

// Not by memcpy: GCC then reads a vector again for each of its uses.
template <class V> using Anywhere __attribute__((aligned(1), may_alias)) = V;
template <class V> V get(const void* from) { return *(const Anywhere<V>*)from; }
template <class V> void put(void* to, V x) { *(Anywhere<V>*)to = x; }
F splat(float x) { return x - F{}; }
F larger(F a, F b) { return a > b ? a : b; }  // b where a is NaN

F from_half(U16 x) {
#if defined(__AVX512F__) && PREFIX_LANES == 16
  return (F)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && PREFIX_LANES == 8
  return (F)_mm256_cvtph_ps((__m128i)x);
#else
  F y;
  for (int i = 0; i < LANES; i++) y[i] = c10::detail::fp16_ieee_to_fp32_value(x[i]);
  return y;
#endif
}

F load(const float* from) { return get<F>(from); }
F load(const BFloat16* from) { return (F)(__builtin_convertvector(get<U16>(from), U) << 16); }
F load(const Half* from) { return from_half(get<U16>(from)); }
F load(const E5M2* from) { return from_half(__builtin_convertvector(get<U8>(from), U16) << 8); }
F load(const E4M3* from) {  // the bits of a half 2**8 times smaller, subnormals included
  const U16 x = __builtin_convertvector(get<U8>(from), U16), magnitude = x & 0x7f;
  const F y = from_half((x & 0x80) << 8 | magnitude << 7) * 256.f;
  const S16 is_nan = magnitude == 0x7f;
  return (F)((U)y | (U)__builtin_convertvector(is_nan, I));
}

void store(float* to, F x) { put(to, x); }
void store(BFloat16* to, F x) {  // to nearest, ties to even
  const U bits = (U)x, nan = (U)(x != x);
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  put(to, __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), U16));
}
void store(Half* to, F x) {
#if defined(__AVX512F__) && PREFIX_LANES == 16
  put(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && PREFIX_LANES == 8
  put(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; i++) to[i] = Half(x[i]);
#endif
}

// The first `n` lanes; the others are 0. Nothing past the end of a row is read.
template <class T> F load_some(const T* from, int64_t n) {
  if (n >= LANES) return load(from);
  T part[LANES] = {};
  std::memcpy((void*)part, from, n * sizeof(T));
  return load(part);
}
template <class T> void store_some(T* to, F x, int64_t n) {
  if (n >= LANES) return store(to, x);
  T part[LANES];
  store(part, x);
  std::memcpy((void*)to, part, n * sizeof(T));
}

float sum_of(F x) {
  float y[LANES];
  put(y, x);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) y[i] += y[i + half];
  return y[0];
}
float largest_of(F x) {
  float y = x[0];
  for (int i = 1; i < LANES; i++) y = std::max(y, x[i]);
  return y;
}

// exp of x <= 0, to about one unit in the last place; at least 2**-126, and NaN of NaN.
F exp_of(F x) {
  F y = x * 1.44269504088896341f;
  y = y < -126.f ? splat(-126.f) : y;
  const F shifted = y + 12582912.f;  // 1.5 * 2**23: its low bits are y, rounded
  const F f = y - (shifted - 12582912.f);
  F p = splat(1.5403530e-4f);  // 2**f by its Taylor series
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  return p * (F)(((I)shifted << 23) + 0x3f800000);
}
F capped(F x, float cap) {  // cap * tanh(x / cap)
  const U sign = (U)x & 0x80000000u;
  const F ratio = (F)((U)x & 0x7fffffffu) * (1.f / cap), square = ratio * ratio;
  const F e = exp_of(ratio * -2.f);
  F series = square * 2.1869489e-2f - 5.3968254e-2f;  // where 1 - e would cancel
  series = series * square + 1.3333333e-1f;
  series = series * square - 3.3333333e-1f;
  series = (series * square + 1.f) * ratio;
  const F tanh = ratio < 0.25f ? series : (1.f - e) / (1.f + e);
  return (F)((U)(tanh * cap) | sign);
}

// Between x and y, lanes change places: those of x whose number has bit `S`, those of y without it.
template <int S, int... J> void exchange(F& x, F& y, std::integer_sequence<int, J...>) {
  const F a = x, b = y;
#if defined(__clang__)
  x = __builtin_shufflevector(a, b, ((J & S) ? LANES + (J ^ S) : J)...);
  y = __builtin_shufflevector(a, b, ((J & S) ? LANES + J : J ^ S)...);
#else
  x = __builtin_shuffle(a, b, I{((J & S) ? LANES + (J ^ S) : J)...});
  y = __builtin_shuffle(a, b, I{((J & S) ? LANES + J : J ^ S)...});
#endif
}
constexpr auto LANE_NUMBERS = std::make_integer_sequence<int, LANES>();

template <int S = LANES / 2> void transpose(F* rows) {  // [LANES][LANES] in place
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i | S], LANE_NUMBERS);
  if constexpr (S > 1) transpose<S / 2>(rows);
}
template <int S = LANES / 2>  // [LANES][LANES]: lane i is the sum of row i
__attribute__((always_inline)) inline F sums_of(F* rows) {
  for (int i = 0; i < S; i++) {
    exchange<S>(rows[i], rows[i | S], LANE_NUMBERS);
    rows[i] += rows[i | S];
  }
  if constexpr (S > 1) return sums_of<S / 2>(rows);
  return rows[0];
}

// Element types, numbered as in native_executor.py.
enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2 };
template <class T> constexpr Type type_of = std::is_same_v<T, float>      ? FLOAT32
                                            : std::is_same_v<T, BFloat16> ? BFLOAT16
                                                                          : FLOAT16;
constexpr int64_t ITEMSIZE[] = {4, 2, 2, 1, 1};

template <class From, class To> void convert_row(const void* from, void* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, n * sizeof(To));
  } else {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store((To*)to + i, load((const From*)from + i));
    if (i < n) store_some((To*)to + i, load_some((const From*)from + i, n - i), n - i);
  }
}
using Convert = void (*)(const void* from, void* to, int64_t n);
template <class To> Convert converter_from(int64_t from) {
  static const Convert all[] = {convert_row<float, To>, convert_row<BFloat16, To>,
                                convert_row<Half, To>, convert_row<E4M3, To>,
                                convert_row<E5M2, To>};
  return all[from];
}
Convert converter_to(int64_t to) {
  static const Convert all[] = {convert_row<float, float>, convert_row<float, BFloat16>,
                                convert_row<float, Half>};
  return all[to];
}

}  // namespace
