// The tiles of AMX: 16 rows of 64 bytes each, which are 16 floats or 32 bfloat16.
#pragma once
#include "common.h"
#include "simd.h"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// All eight tiles whole for as long as it lives. What was configured before comes back, for oneDNN may count on it.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    TileConfig whole;
    for (int i = 0; i < 8; ++i) {
      whole.bytes[i] = 64;
      whole.rows[i] = ROWS;
    }
    _tile_loadconfig(&whole);
  }
  ~Tiles() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }

 private:
  TileConfig before_;
};
