// The largest of each row of logits, as Python calls it.
#include "common.h"

namespace {

// Whole numbers in the order of the values: -0 is 0, and what is no number is larger than all that are.
inline __m256i ordered(__m256i x) {
  const __m256i size = _mm256_set1_epi16(0x7fff);
  const __m256i key = _mm256_xor_si256(x, _mm256_and_si256(_mm256_srai_epi16(x, 15), size));
  const __m256i is_none = _mm256_cmpgt_epi16(_mm256_and_si256(x, size), _mm256_set1_epi16(0x7f80));
  const __m256i value = _mm256_sub_epi16(key, _mm256_cmpeq_epi16(key, _mm256_set1_epi16(-1)));
  return _mm256_blendv_epi8(value, size, is_none);
}

// Sixteen of a row of `count` from `at` on; what lies behind its end is smaller than all numbers.
inline __m256i load(const bf16* row, long at, long count) {
  if (at + 16 <= count) return ordered(_mm256_loadu_si256((const __m256i*)(row + at)));
  int16_t keys[16], some[16] = {};
  std::memcpy(some, row + at, (count - at) * sizeof(bf16));
  _mm256_storeu_si256((__m256i*)keys, ordered(_mm256_loadu_si256((const __m256i*)some)));
  for (long i = count - at; i < 16; ++i) keys[i] = INT16_MIN;
  return _mm256_loadu_si256((const __m256i*)keys);
}

// The place of the first of the largest: in which part it lies is found first, then where.
int64_t first_largest(const bf16* row, long count) {
  constexpr long PART = 1024;
  int most = INT16_MIN;
  long part = 0;
  for (long from = 0; from < count; from += PART) {
    const long to = from + PART < count ? from + PART : count;
    __m256i here = _mm256_set1_epi16(INT16_MIN);
    for (long at = from; at < to; at += 16) here = _mm256_max_epi16(here, load(row, at, count));
    int16_t keys[16];
    _mm256_storeu_si256((__m256i*)keys, here);
    for (int key : keys)
      if (key > most) most = key, part = from;
  }
  for (long at = part;; at += 16) {
    const __m256i same = _mm256_cmpeq_epi16(load(row, at, count), _mm256_set1_epi16((int16_t)most));
    if (const unsigned found = (unsigned)_mm256_movemask_epi8(same)) return at + __builtin_ctz(found) / 2;
  }
}

}  // namespace

// To `to` the place of the largest number of each of `count` rows [width], the first of equal ones; `rows` are those of `logits`
// that are asked for, null: the first.
extern "C" void specdec_largest(const bf16* logits, const int64_t* rows, int64_t count, int64_t width, int64_t* to,
                                int64_t num_threads) {
#pragma omp parallel for num_threads(count < num_threads ? count : num_threads)
  for (long i = 0; i < count; ++i) to[i] = first_largest(logits + (rows ? rows[i] : i) * width, width);
}
