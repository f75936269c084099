// Products of rows with packed weights by tiles of AMX: [rows, in] x [in, out], 32 outputs at a time.
#pragma once
#include "tiles.h"
#include "weight.h"

// Products read 16 rows, so there must be memory behind the last.
constexpr bool READS_WHOLE_TILES = true;

// Reading this far ahead hides the memory's latency; all weights are read once per step, in order.
constexpr long AHEAD = 8 * BLOCK;

// Sums of up to 32 rows (two tiles where PAIRS) with two blocks of 16 outputs: [block][tile][16][16].
template <bool PAIRS>
static inline void multiply(const bf16* rows, long stride, const bf16* one, const bf16* other, long inputs, float* sums) {
  _tile_zero(0);
  _tile_zero(2);
  if (PAIRS) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (long k = 0; k < inputs; k += DEPTH, one += BLOCK, other += BLOCK) {
    for (long line = 0; line < BLOCK; line += 32) {
      _mm_prefetch(one + AHEAD + line, _MM_HINT_T1);
      _mm_prefetch(other + AHEAD + line, _MM_HINT_T1);
    }
    _tile_loadd(4, rows + k, stride * 2);
    if (PAIRS) _tile_loadd(5, rows + ROWS * stride + k, stride * 2);
    _tile_loadd(6, one, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (PAIRS) _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, other, 64);
    _tile_dpbf16ps(2, 4, 7);
    if (PAIRS) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 512, 64);
  if (PAIRS) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// Calls done(row, sums of the first block, sums of the second) for each row and the two blocks.
template <typename Done>
static inline void multiply_all(
    const bf16* rows, long count, long stride, const bf16* one, const bf16* other, long inputs, Done done) {
  alignas(64) float sums[4 * 256];
  for (long at = 0; at < count; at += 2 * ROWS) {
    const long some = count - at < 2 * ROWS ? count - at : 2 * ROWS;
    const bool pairs = some > ROWS;
    if (pairs)
      multiply<true>(rows + at * stride, stride, one, other, inputs, sums);
    else
      multiply<false>(rows + at * stride, stride, one, other, inputs, sums);
    for (long r = 0; r < some; ++r) done(at + r, load_floats(sums + r * 16), load_floats(sums + 512 + r * 16));
  }
}

// This thread's part of rows x weight; done(row, block of 16 outputs, sums with bias). Rows lie in memory up to a multiple
// of 16 of them. A row's sums do not depend on the other rows.
template <typename Done>
static inline void product(const bf16* rows, long count, const Weight& weight, Done done) {
  const long columns = weight.num_columns();
  long begin, end;
  share((columns + 1) / 2, begin, end);
  for (long pair = begin; pair < end; ++pair) {
    const long one = 2 * pair, other = one + 1 < columns ? one + 1 : one;
    const Floats first = weight.added(one), second = weight.added(other);
    multiply_all(rows, count, weight.inputs, weight.column(one), weight.column(other), weight.inputs,
                 [&](long row, Floats a, Floats b) {
                   done(row, one, a + first);
                   if (other != one) done(row, other, b + second);
                 });
  }
}

// The same for two halves of the outputs that belong together: done(row, block of the half, first, second).
template <typename Done>
static inline void product_of_halves(const bf16* rows, long count, const Weight& weight, Done done) {
  const long half = weight.num_columns() / 2;
  long begin, end;
  share(half, begin, end);
  for (long block = begin; block < end; ++block) {
    const Floats first = weight.added(block), second = weight.added(block + half);
    multiply_all(rows, count, weight.inputs, weight.column(block), weight.column(block + half), weight.inputs,
                 [&](long row, Floats a, Floats b) {
                   done(row, block, a + first, b + second);
                 });
  }
}
