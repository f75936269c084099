// Products of rows with packed weights by tiles of AMX: [rows, in] x [in, out], 32 outputs at a time.
#pragma once
#include "tiles.h"
#include "weight.h"

// Products read 16 rows, so there must be memory behind the last.
constexpr bool READS_WHOLE_TILES = true;

// Reading this far ahead hides the memory's latency; all weights are read once per step, in order.
constexpr long AHEAD = 8 * BLOCK;

// A block as tiles read it: as it lies, or widened to `room`.
static inline const bf16* tile_of(const bf16* block, bf16*) { return block; }
static inline const bf16* tile_of(const int8_t* block, bf16* room) {
  for (long at = 0; at < BLOCK; at += 32) _mm512_storeu_si512(room + at, load_pairs(block + at));
  return room;
}

// Sums of up to 32 rows (two tiles where PAIRS) with two blocks of 16 outputs: [block][tile][16][16].
template <bool PAIRS, typename Number>
static inline void multiply(
    const bf16* rows, long stride, const Number* one, const Number* other, long inputs, float* sums) {
  constexpr long LINE = 64 / sizeof(Number), ahead = AHEAD * sizeof(bf16) / sizeof(Number);
  alignas(64) bf16 wide[2][BLOCK];
  _tile_zero(0);
  _tile_zero(2);
  if (PAIRS) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (long k = 0; k < inputs; k += DEPTH, one += BLOCK, other += BLOCK) {
    for (long line = 0; line < BLOCK; line += LINE) {
      _mm_prefetch(one + ahead + line, _MM_HINT_T1);
      _mm_prefetch(other + ahead + line, _MM_HINT_T1);
    }
    _tile_loadd(4, rows + k, stride * 2);
    if (PAIRS) _tile_loadd(5, rows + ROWS * stride + k, stride * 2);
    _tile_loadd(6, tile_of(one, wide[0]), 64);
    _tile_dpbf16ps(0, 4, 6);
    if (PAIRS) _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, tile_of(other, wide[1]), 64);
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

// Calls done(row, values of the first block's outputs, those of the second's) for each row.
template <typename Number, typename Done>
static inline void multiply_blocks(
    const bf16* rows, long count, const Weight& weight, long one, long other, Done done) {
  const Number *first = (const Number*)weight.column(one), *second = (const Number*)weight.column(other);
  const Ending first_ending = weight.ending(one), second_ending = weight.ending(other);
  const long stride = weight.inputs;
  alignas(64) float sums[4 * 256];
  for (long at = 0; at < count; at += 2 * ROWS) {
    const long some = count - at < 2 * ROWS ? count - at : 2 * ROWS;
    const bool pairs = some > ROWS;
    if (pairs)
      multiply<true>(rows + at * stride, stride, first, second, stride, sums);
    else
      multiply<false>(rows + at * stride, stride, first, second, stride, sums);
    for (long r = 0; r < some; ++r)
      done(at + r, first_ending.of(load_floats(sums + r * 16)), second_ending.of(load_floats(sums + 512 + r * 16)));
  }
}

template <typename Done>
static inline void multiply_all(const bf16* rows, long count, const Weight& weight, long one, long other, Done done) {
  if (weight.scales)
    multiply_blocks<int8_t>(rows, count, weight, one, other, done);
  else
    multiply_blocks<bf16>(rows, count, weight, one, other, done);
}

// This thread's part of rows x weight; done(row, block of 16 outputs, their values). Rows lie in memory up to a multiple
// of 16 of them. A row's sums do not depend on the other rows.
template <typename Done>
static inline void product(const bf16* rows, long count, const Weight& weight, Done done) {
  const long columns = weight.num_columns();
  long begin, end;
  share((columns + 1) / 2, begin, end);
  for (long pair = begin; pair < end; ++pair) {
    const long one = 2 * pair, other = one + 1 < columns ? one + 1 : one;
    multiply_all(rows, count, weight, one, other, [&](long row, Floats a, Floats b) {
      done(row, one, a);
      if (other != one) done(row, other, b);
    });
  }
}

// The same for two halves of the outputs that belong together: done(row, block of the half, first, second).
template <typename Done>
static inline void product_of_halves(const bf16* rows, long count, const Weight& weight, Done done) {
  const long half = weight.num_columns() / 2;
  long begin, end;
  share(half, begin, end);
  for (long block = begin; block < end; ++block)
    multiply_all(rows, count, weight, block, block + half,
                 [&](long row, Floats a, Floats b) { done(row, block, a, b); });
}
