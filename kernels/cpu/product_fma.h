// Products of rows with packed weights by fused multiply-adds in float32: [rows, in] x [in, out]. Every sum runs over the
// inputs in their order, so a row's bits do not depend on the rows beside it.
#pragma once
#include "weight.h"

constexpr bool READS_WHOLE_TILES = false;
// What only tiles need: a state of the thread's.
struct Tiles {
  Tiles() {}
};

// Sums are kept in registers: some rows times some columns of 16 outputs.
constexpr long MOST_ROWS = SUMS < 12 ? SUMS : 12;
constexpr long MOST_COLUMNS = 4;
// So many rows, widened to float32, stay near while the weights go by once.
constexpr long CHUNK = 48;
// Reading this far ahead hides the memory's latency; all weights are read once per step, in order.
constexpr long AHEAD = 64;

// Rows lie as [input][row]; sums go to [column][row] at `column_stride` floats from one column to the next.
typedef void (*Multiply)(const float* rows, const bf16* column, long inputs, float* sums, long column_stride);

template <long NUM_ROWS, long NUM_COLUMNS>
static void multiply(const float* rows, const bf16* column, long inputs, float* sums, long column_stride) {
  const long next = inputs * ROWS;
  Floats kept[NUM_COLUMNS][NUM_ROWS];
#pragma GCC unroll 4
  for (long c = 0; c < NUM_COLUMNS; ++c)
#pragma GCC unroll 12
    for (long r = 0; r < NUM_ROWS; ++r) kept[c][r] = all(0.0f);
  for (long k = 0; k < inputs; k += 2, rows += 2 * NUM_ROWS) {
    // Behind a column's end comes what the next call reads there.
    const bf16* ahead = column + (k + AHEAD) * ROWS + (k + AHEAD < inputs ? 0 : (NUM_COLUMNS - 1) * next);
#pragma GCC unroll 4
    for (long c = 0; c < NUM_COLUMNS; ++c) {
      Floats even, odd;
      load_pairs(column + c * next + k * ROWS, even, odd);
      _mm_prefetch(ahead + c * next, _MM_HINT_T0);
#pragma GCC unroll 12
      for (long r = 0; r < NUM_ROWS; ++r) {
        kept[c][r] = plus_product(kept[c][r], even, all(rows[r]));
        kept[c][r] = plus_product(kept[c][r], odd, all(rows[NUM_ROWS + r]));
      }
    }
  }
#pragma GCC unroll 4
  for (long c = 0; c < NUM_COLUMNS; ++c)
#pragma GCC unroll 12
    for (long r = 0; r < NUM_ROWS; ++r) store_floats(sums + c * column_stride + r * ROWS, kept[c][r]);
}

template <long NUM_ROWS, long NUM_COLUMNS>
constexpr Multiply multiply_of() {
  if constexpr (NUM_ROWS * NUM_COLUMNS <= SUMS)
    return multiply<NUM_ROWS, NUM_COLUMNS>;
  else
    return nullptr;
}

template <long NUM_COLUMNS>
static Multiply multiply_rows(long num_rows) {
  static_assert(MOST_ROWS == 6 || MOST_ROWS == 12);
  switch (num_rows) {
    case 1: return multiply_of<1, NUM_COLUMNS>();
    case 2: return multiply_of<2, NUM_COLUMNS>();
    case 3: return multiply_of<3, NUM_COLUMNS>();
    case 4: return multiply_of<4, NUM_COLUMNS>();
    case 5: return multiply_of<5, NUM_COLUMNS>();
    case 6: return multiply_of<6, NUM_COLUMNS>();
    case 7: return multiply_of<7, NUM_COLUMNS>();
    case 8: return multiply_of<8, NUM_COLUMNS>();
    case 9: return multiply_of<9, NUM_COLUMNS>();
    case 10: return multiply_of<10, NUM_COLUMNS>();
    case 11: return multiply_of<11, NUM_COLUMNS>();
    default: return multiply_of<12, NUM_COLUMNS>();
  }
}

static Multiply multiply_for(long num_rows, long num_columns) {
  switch (num_columns) {
    case 1: return multiply_rows<1>(num_rows);
    case 2: return multiply_rows<2>(num_rows);
    case 3: return multiply_rows<3>(num_rows);
    default: return multiply_rows<4>(num_rows);
  }
}

// Up to CHUNK rows in groups of about one size, each widened and laid as [input][row].
class WideRows {
 public:
  WideRows(const bf16* rows, long count, long inputs) : count_(count), inputs_(inputs) {
    static thread_local Scratch memory;
    at_ = (float*)memory.get(count * inputs * sizeof(float));
    groups_ = (count + MOST_ROWS - 1) / MOST_ROWS;
    for (long group = 0; group < groups_; ++group) {
      const long first = first_of(group), size = first_of(group + 1) - first;
      float* to = at_ + first * inputs;
      alignas(64) float wide[ROWS];
      for (long r = 0; r < size; ++r)
        for (long k = 0; k < inputs; k += ROWS) {
          store_floats(wide, load(rows + (first + r) * inputs + k));
          for (long i = 0; i < ROWS; ++i) to[(k + i) * size + r] = wide[i];
        }
    }
  }

  // Columns that one pass over the weights may take.
  long columns_at_once() const {
    const long most = SUMS / first_of(1);
    return most < MOST_COLUMNS ? (most < 1 ? 1 : most) : MOST_COLUMNS;
  }

  // Sums of all rows with `num_columns` columns from `column` on: [column][row][16].
  void multiply_by(const bf16* column, long num_columns, float* sums) const {
    for (long group = 0; group < groups_; ++group) {
      const long first = first_of(group);
      multiply_for(first_of(group + 1) - first, num_columns)(at_ + first * inputs_, column, inputs_, sums + first * ROWS,
                                                              count_ * ROWS);
    }
  }

 private:
  // Larger groups come first.
  long first_of(long group) const {
    const long size = count_ / groups_, larger = count_ % groups_;
    return group * size + (group < larger ? group : larger);
  }

  long count_, inputs_, groups_;
  float* at_;
};

// This thread's part of rows x weight; done(row, block of 16 outputs, sums with bias).
template <typename Done>
static inline void product(const bf16* rows, long count, const Weight& weight, Done done) {
  alignas(64) float sums[MOST_COLUMNS * CHUNK * ROWS];
  long begin, end;
  share(weight.num_columns(), begin, end);
  for (long at = 0; at < count; at += CHUNK) {
    const long some = count - at < CHUNK ? count - at : CHUNK;
    const WideRows wide(rows + at * weight.inputs, some, weight.inputs);
    const long most = wide.columns_at_once();
    for (long block = begin; block < end; block += most) {
      const long columns = end - block < most ? end - block : most;
      wide.multiply_by(weight.column(block), columns, sums);
      for (long c = 0; c < columns; ++c) {
        const Floats bias = weight.added(block + c);
        for (long r = 0; r < some; ++r) done(at + r, block + c, load_floats(sums + (c * some + r) * ROWS) + bias);
      }
    }
  }
}

// The same for two halves of the outputs that belong together: done(row, block of the half, first, second).
template <typename Done>
static inline void product_of_halves(const bf16* rows, long count, const Weight& weight, Done done) {
  alignas(64) float sums[2][MOST_COLUMNS * CHUNK * ROWS];
  const long half = weight.num_columns() / 2;
  long begin, end;
  share(half, begin, end);
  for (long at = 0; at < count; at += CHUNK) {
    const long some = count - at < CHUNK ? count - at : CHUNK;
    const WideRows wide(rows + at * weight.inputs, some, weight.inputs);
    const long most = wide.columns_at_once();
    for (long block = begin; block < end; block += most) {
      const long columns = end - block < most ? end - block : most;
      for (long part = 0; part < 2; ++part) wide.multiply_by(weight.column(block + part * half), columns, sums[part]);
      for (long c = 0; c < columns; ++c) {
        const Floats first = weight.added(block + c), second = weight.added(block + c + half);
        for (long r = 0; r < some; ++r)
          done(at + r, block + c, load_floats(sums[0] + (c * some + r) * ROWS) + first,
               load_floats(sums[1] + (c * some + r) * ROWS) + second);
      }
    }
  }
}
