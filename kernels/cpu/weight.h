// A weight [outputs, inputs] as blocks of 16 outputs and 32 inputs, a block's pairs of inputs behind one another: what a tile
// product of AMX reads as it lies, and what vectors of 16 outputs read in order. `bias` may be null.
//
// Of 8 bits, a pair is the first input's 16 numbers and then the second's, which are widened before anything reads them.
#pragma once
#include "simd.h"

// What becomes of the sums of a block of 16 outputs.
struct Ending {
  Floats scale, bias;

  Floats of(Floats sums) const { return plus_product(bias, sums, scale); }
};

struct Weight {
  // bfloat16; where there are `scales`, one per output, whole numbers of 8 bits that these multiply.
  const void* blocks;
  const bf16* bias;
  const float* scales;
  long inputs, outputs;

  const void* column(long block) const {
    return (const char*)blocks + block * ROWS * inputs * (scales ? sizeof(int8_t) : sizeof(bf16));
  }
  long num_columns() const { return (outputs + ROWS - 1) / ROWS; }
  Ending ending(long block) const {
    return {scales ? load_floats(scales + block * ROWS) : all(1.0f), bias ? load(bias + block * ROWS) : all(0.0f)};
  }
};
