// A weight [outputs, inputs] as blocks of 16 outputs and 32 inputs, a block's pairs of inputs behind one another: what a tile
// product of AMX reads as it lies, and what vectors of 16 outputs read in order. `bias` may be null.
#pragma once
#include "simd.h"

struct Weight {
  const bf16* blocks;
  const bf16* bias;
  long inputs, outputs;

  const bf16* column(long block) const { return blocks + block * ROWS * inputs; }
  long num_columns() const { return (outputs + ROWS - 1) / ROWS; }
  Floats added(long block) const { return bias ? load(bias + block * ROWS) : all(0.0f); }
};
