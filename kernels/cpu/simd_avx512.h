// Sixteen floats in one register.
#pragma once

typedef __m512 Floats;

static inline Floats all(float x) { return _mm512_set1_ps(x); }
static inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
static inline void store_floats(float* to, Floats x) { _mm512_storeu_ps(to, x); }
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }

// c + a * b and c - a * b, rounded once.
static inline Floats plus_product(Floats c, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats less_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }

// x * 2^n for whole n.
static inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

// y, but 0 where x < bound.
static inline Floats zero_where_less(Floats y, Floats x, float bound) {
  return _mm512_maskz_mov_ps(~_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_LT_OQ), y);
}

static inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
static inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

static inline Floats widened(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m256i narrowed(Floats x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  // To the nearest, ties to even; what is no number stays none.
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

// Of 32 numbers in a row those at even and those at odd places.
static inline void split_pairs(__m512i pairs, Floats& even, Floats& odd) {
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}
static inline void load_pairs(const bf16* from, Floats& even, Floats& odd) {
  split_pairs(_mm512_loadu_si512(from), even, odd);
}

// 16 whole numbers.
static inline Floats load_floats(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

// The reverse, rounded.
static inline void store_pairs(bf16* to, Floats even, Floats odd) {
  const __m512i low = _mm512_cvtepu16_epi32(narrowed(even)), high = _mm512_cvtepu16_epi32(narrowed(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

#ifdef __AVX512BF16__
// Two inputs of 16 outputs, and two of a row, multiplied as they lie, twice as many at a time as floats are.
typedef __m512i Pairs;
typedef uint32_t RowPair;

static inline Pairs load_pairs(const bf16* from) { return _mm512_loadu_si512(from); }
// Whole numbers of 8 bits are bfloat16 as they are: the lower halves of their floats are zeros.
static inline Pairs load_pairs(const int8_t* from) {
  const __m512i even = _mm512_castps_si512(load_floats(from)), odd = _mm512_castps_si512(load_floats(from + 16));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}
static inline RowPair row_pair(const bf16* from) {
  RowPair pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}
static inline Floats plus_products(Floats c, Pairs weights, RowPair row) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(row), (__m512bh)weights);
}
#endif

// Sums of 16 floats that fit the registers beside what a product needs.
constexpr long SUMS = 24;
