// Sixteen floats in two registers.
#pragma once

struct Floats {
  __m256 low, high;
};

static inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats load_floats(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
// 16 whole numbers.
static inline Floats load_floats(const int8_t* from) {
  const __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
  const __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)));
  return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
}
static inline void store_floats(float* to, Floats x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
static inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
static inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
static inline Floats operator-(Floats a) { return {-a.low, -a.high}; }
static inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
static inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }
static inline Floats larger(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
static inline Floats nearest(Floats x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, how), _mm256_round_ps(x.high, how)};
}

// c + a * b and c - a * b, rounded once.
static inline Floats plus_product(Floats c, Floats a, Floats b) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline Floats less_product(Floats c, Floats a, Floats b) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

static inline __m256 times_power(__m256 x, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(n, _mm256_set1_ps(127.0f)));
  const __m256i exponent = _mm256_add_epi32(whole, _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
// x * 2^n for whole n from -126 on; no further than 2^127.
static inline Floats times_power(Floats x, Floats n) { return {times_power(x.low, n.low), times_power(x.high, n.high)}; }

// y, but 0 where x < bound.
static inline Floats zero_where_less(Floats y, Floats x, float bound) {
  const __m256 least = _mm256_set1_ps(bound);
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.low, least, _CMP_LT_OQ), y.low),
          _mm256_andnot_ps(_mm256_cmp_ps(x.high, least, _CMP_LT_OQ), y.high)};
}

static inline float sum(Floats x) {
  const __m256 eight = x.low + x.high;
  __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  four += _mm_movehl_ps(four, four);
  return four[0] + four[1];
}
static inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return four[0] > four[1] ? four[0] : four[1];
}

static inline __m256 widened(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
static inline Floats widened(__m256i x) {
  return {widened(_mm256_castsi256_si128(x)), widened(_mm256_extracti128_si256(x, 1))};
}

// To the nearest, ties to even, in the upper halves; what is no number stays none.
static inline __m256i rounded_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i none = _mm256_set1_epi32(0x7fc00000);
  return _mm256_blendv_epi8(up, none, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
static inline __m256i narrowed(Floats x) {
  const __m256i low = _mm256_srli_epi32(rounded_bits(x.low), 16), high = _mm256_srli_epi32(rounded_bits(x.high), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}

static inline void split_pairs(__m256i pairs, __m256& even, __m256& odd) {
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}
// Of 32 numbers in a row those at even and those at odd places.
static inline void load_pairs(const bf16* from, Floats& even, Floats& odd) {
  split_pairs(_mm256_loadu_si256((const __m256i*)from), even.low, odd.low);
  split_pairs(_mm256_loadu_si256((const __m256i*)(from + 16)), even.high, odd.high);
}

static inline void store_pairs(bf16* to, __m256 even, __m256 odd) {
  const __m256i low = _mm256_srli_epi32(rounded_bits(even), 16);
  const __m256i high = _mm256_and_si256(rounded_bits(odd), _mm256_set1_epi32(0xffff0000));
  _mm256_storeu_si256((__m256i*)to, _mm256_or_si256(low, high));
}
// The reverse, rounded.
static inline void store_pairs(bf16* to, Floats even, Floats odd) {
  store_pairs(to, even.low, odd.low);
  store_pairs(to + 16, even.high, odd.high);
}

// Sums of 16 floats that fit the registers beside what a product needs.
constexpr long SUMS = 6;
