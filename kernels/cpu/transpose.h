// What is loaded by rows and wanted by columns.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
// 16 x 16 numbers of 32 bits, rows to columns.
static inline void transpose(__m512i v[16]) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// 32 numbers of each of up to 16 rows, row r's at `at(r)`, as [pair of numbers][row]; zeros where there is no row.
template <typename At>
static inline void load_columns(long count, At at, __m512i columns[16]) {
  for (long r = 0; r < 16; ++r) columns[r] = r < count ? _mm512_loadu_si512(at(r)) : _mm512_setzero_si512();
  transpose(columns);
}

// The same as floats: the first numbers of the pairs as [pair][row], then the second ones, 16 by 16 each.
template <typename At>
static inline void load_columns(long count, At at, float* to) {
  __m512i columns[16];
  load_columns(count, at, columns);
  for (long i = 0; i < 16; ++i) {
    Floats even, odd;
    split_pairs(columns[i], even, odd);
    store_floats(to + i * 16, even);
    store_floats(to + (16 + i) * 16, odd);
  }
}
#else
// 8 x 8 numbers of 32 bits, rows to columns.
static inline void transpose(__m256i v[8]) {
  __m256i a[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    a[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) v[i] = a[i];
}

// 32 numbers of each of up to 16 rows, row r's at `at(r)`: the first numbers of their pairs as [pair][row], then the second ones,
// 16 by 16 each; zeros where there is no row.
template <typename At>
static inline void load_columns(long count, At at, float* to) {
  for (long half = 0; half < 16; half += 8)
    for (long from = 0; from < 16; from += 8) {
      __m256i v[8];
      for (long r = 0; r < 8; ++r)
        v[r] = half + r < count ? _mm256_loadu_si256((const __m256i*)(at(half + r) + 2 * from)) : _mm256_setzero_si256();
      transpose(v);
      for (long i = 0; i < 8; ++i) {
        float* place = to + (from + i) * 16 + half;
        __m256 even, odd;
        split_pairs(v[i], even, odd);
        _mm256_storeu_ps(place, even);
        _mm256_storeu_ps(place + 256, odd);
      }
    }
}
#endif
