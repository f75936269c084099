// Sixteen floats at a time, in whatever registers the CPU has: `Floats`, their arithmetic, bfloat16 in and out.
#pragma once
#include <immintrin.h>

#include <initializer_list>

#include "common.h"

#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

// To bfloat16 and back: layers round where torch's eager operations do.
static inline Floats rounded(Floats x) { return widened(narrowed(x)); }

static inline Floats load(const bf16* from) { return widened(_mm256_loadu_si256((const __m256i*)from)); }

static inline void store(bf16* to, Floats x) { _mm256_storeu_si256((__m256i*)to, narrowed(x)); }

// The first `count` of them.
static inline void store_some(bf16* to, Floats x, long count) {
  alignas(32) bf16 all[16];
  store(all, x);
  std::memcpy(to, all, count * sizeof(bf16));
}

#ifndef __AVX512BF16__
// Two inputs of 16 outputs, and two of a row, widened; sums take the first before the second.
struct Pairs {
  Floats even, odd;
};
struct RowPair {
  float even, odd;
};

static inline Pairs load_pairs(const bf16* from) {
  Pairs pairs;
  load_pairs(from, pairs.even, pairs.odd);
  return pairs;
}
static inline Pairs load_pairs(const int8_t* from) { return {load_floats(from), load_floats(from + 16)}; }
static inline float widened(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
static inline RowPair row_pair(const bf16* from) { return {widened(from[0]), widened(from[1])}; }
static inline Floats plus_products(Floats c, const Pairs& weights, RowPair row) {
  return plus_product(plus_product(c, weights.even, all(row.even)), weights.odd, all(row.odd));
}
#endif

// exp(x) for x <= 88, to 2 units in the last place; 0 below -87 and for -inf.
static inline Floats exponential(Floats x) {
  const Floats n = nearest(x * all(1.44269504f));
  Floats r = less_product(x, n, all(0.693145752f));
  r = less_product(r, n, all(1.42860677e-6f));
  Floats y = all(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = plus_product(all(c), y, r);
  return zero_where_less(times_power(y, n), x, -87.0f);
}
