// Products of rows with packed weights by multiply-adds in vectors of 16 outputs: [rows, in] x [in, out]. Every sum runs over
// the pairs of inputs in their order, so a row's bits do not depend on the rows beside it.
#pragma once
#include <utility>

#ifdef __AVX512BF16__
#include "transpose.h"
#endif
#include "weight.h"

constexpr bool READS_WHOLE_TILES = false;
// What only tiles need: a state of the thread's.
struct Tiles {
  Tiles() {}
};

// So many rows stay near while the weights go by once.
constexpr long CHUNK = 48;
// Reading this many inputs of bfloat16 ahead hides the memory's latency, behind a column's end too: all weights are read once per step, in
// order. (One stream of them: four at once came at half the pace where it was measured.)
constexpr long AHEAD = 256;

// Rows lie as [pair of inputs][row]; their sums, which registers keep, go to [row][16 outputs].
typedef void (*Multiply)(const RowPair* rows, const void* column, long inputs, float* sums);

template <typename Number, long NUM_ROWS>
static void multiply(const RowPair* rows, const void* from, long inputs, float* sums) {
  constexpr long ahead = AHEAD * sizeof(bf16) / sizeof(Number);
  const Number* column = (const Number*)from;
  Floats kept[NUM_ROWS];
#pragma GCC unroll 24
  for (long r = 0; r < NUM_ROWS; ++r) kept[r] = all(0.0f);
  for (long k = 0; k < inputs; k += 2, rows += NUM_ROWS) {
    const Pairs weights = load_pairs(column + k * ROWS);
    _mm_prefetch(column + (k + ahead) * ROWS, _MM_HINT_T0);
#pragma GCC unroll 24
    for (long r = 0; r < NUM_ROWS; ++r) kept[r] = plus_products(kept[r], weights, rows[r]);
  }
#pragma GCC unroll 24
  for (long r = 0; r < NUM_ROWS; ++r) store_floats(sums + r * ROWS, kept[r]);
}

template <typename Number, long... ROWS_LESS_ONE>
static Multiply multiply_for(long num_rows, std::integer_sequence<long, ROWS_LESS_ONE...>) {
  static constexpr Multiply of[] = {multiply<Number, ROWS_LESS_ONE + 1>...};
  return of[num_rows - 1];
}

// Rows to [pair of inputs][row].
static inline void pair_rows(const bf16* rows, long count, long inputs, RowPair* to) {
#ifdef __AVX512BF16__
  if (count == 1) {
    std::memcpy(to, rows, inputs * sizeof(bf16));
    return;
  }
  for (long first = 0; first < count; first += ROWS) {
    const long some = count - first < ROWS ? count - first : ROWS;
    for (long k = 0; k < inputs; k += DEPTH) {
      __m512i columns[16];
      load_columns(some, [&](long r) { return rows + (first + r) * inputs + k; }, columns);
      for (long i = 0; i < 16; ++i)
        _mm512_mask_storeu_epi32(to + (k / 2 + i) * count + first, (1 << some) - 1, columns[i]);
    }
  }
#else
  for (long r = 0; r < count; ++r)
    for (long k = 0; k < inputs / 2; ++k) to[k * count + r] = row_pair(rows + r * inputs + 2 * k);
#endif
}

// Up to CHUNK rows in groups of about one size, each laid as [pair of inputs][row].
class PairedRows {
 public:
  PairedRows(const bf16* rows, long count, long inputs) : count_(count), inputs_(inputs) {
    static thread_local Scratch memory;
    at_ = (RowPair*)memory.get(count * inputs / 2 * sizeof(RowPair));
    groups_ = (count + SUMS - 1) / SUMS;
    for (long group = 0; group < groups_; ++group) {
      const long first = first_of(group);
      pair_rows(rows + first * inputs, first_of(group + 1) - first, inputs, at_ + first * inputs / 2);
    }
  }

  // Sums of all rows with a block of 16 outputs of the weight: [row][16].
  void multiply_by(const Weight& weight, long block, float* sums) const {
    constexpr auto sizes = std::make_integer_sequence<long, SUMS>();
    for (long group = 0; group < groups_; ++group) {
      const long first = first_of(group), size = first_of(group + 1) - first;
      const Multiply multiply = weight.scales ? multiply_for<int8_t>(size, sizes) : multiply_for<bf16>(size, sizes);
      multiply(at_ + first * inputs_ / 2, weight.column(block), inputs_, sums + first * ROWS);
    }
  }

 private:
  // Larger groups come first.
  long first_of(long group) const {
    const long size = count_ / groups_, larger = count_ % groups_;
    return group * size + (group < larger ? group : larger);
  }

  long count_, inputs_, groups_;
  RowPair* at_;
};

// Calls visit(first row, how many, those rows, column) for chunks of the rows and this thread's share of the columns.
template <typename Visit>
static inline void each_chunk(const bf16* rows, long count, long inputs, long columns, Visit visit) {
  long begin, end;
  share(columns, begin, end);
  for (long at = 0; at < count; at += CHUNK) {
    const long some = count - at < CHUNK ? count - at : CHUNK;
    const PairedRows paired(rows + at * inputs, some, inputs);
    for (long block = begin; block < end; ++block) visit(at, some, paired, block);
  }
}

// This thread's part of rows x weight; done(row, block of 16 outputs, their values).
template <typename Done>
static inline void product(const bf16* rows, long count, const Weight& weight, Done done) {
  alignas(64) float sums[CHUNK * ROWS];
  each_chunk(rows, count, weight.inputs, weight.num_columns(), [&](long at, long some, const PairedRows& paired, long block) {
    paired.multiply_by(weight, block, sums);
    const Ending ending = weight.ending(block);
    for (long r = 0; r < some; ++r) done(at + r, block, ending.of(load_floats(sums + r * ROWS)));
  });
}

// The same for two halves of the outputs that belong together: done(row, block of the half, first, second).
template <typename Done>
static inline void product_of_halves(const bf16* rows, long count, const Weight& weight, Done done) {
  alignas(64) float sums[2][CHUNK * ROWS];
  const long half = weight.num_columns() / 2;
  each_chunk(rows, count, weight.inputs, half, [&](long at, long some, const PairedRows& paired, long block) {
    paired.multiply_by(weight, block, sums[0]);
    paired.multiply_by(weight, block + half, sums[1]);
    const Ending first = weight.ending(block), second = weight.ending(block + half);
    for (long r = 0; r < some; ++r)
      done(at + r, block, first.of(load_floats(sums[0] + r * ROWS)), second.of(load_floats(sums[1] + r * ROWS)));
  });
}
