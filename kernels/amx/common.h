// Types and arithmetic that the kernels share: bfloat16 rows, tiles of AMX, the exponential, where torch rounds.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

typedef uint16_t bf16;

// A tile is 16 rows of 64 bytes: 16 floats, or 32 bfloat16.
constexpr long ROWS = 16;
constexpr long DEPTH = 32;
// Numbers in a packed block of 16 outputs and 32 inputs.
constexpr long BLOCK = ROWS * DEPTH;

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

// Memory that only grows, one piece per thread and purpose.
class Scratch {
 public:
  ~Scratch() { std::free(at_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(at_);
      size_ = (bytes + 4095) / 4096 * 4096;
      at_ = std::aligned_alloc(64, size_);
    }
    return at_;
  }

 private:
  void* at_ = nullptr;
  size_t size_ = 0;
};

static inline __m512 load(const bf16* from) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

static inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

// To bfloat16 and back: layers round where torch's eager operations do.
static inline __m512 rounded(__m512 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// exp(x) for x <= 88, to 2 units in the last place; 0 below -87 and for -inf.
static inline __m512 exponential(__m512 x) {
  const __mmask16 is_zero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_maskz_mov_ps(~is_zero, _mm512_scalef_ps(y, n));
}

// The share of `count` pieces that this thread of the team does.
static inline void share(long count, long& begin, long& end) {
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  begin = count * me / threads;
  end = count * (me + 1) / threads;
}
