// Attention over pages: 16 rows (queries times the heads of a group) at a time, keys in the order of positions along each
// query's own path, in tiles of 32. A row's bits depend on its own path alone.
#pragma once
#include "sequence.h"
#include "tiles.h"
#include "transpose.h"

constexpr long TILE = 32;

// One block of 16 rows of one sequence and group.
class BlockByTiles : BlockOfRows {
 public:
  // `queries` and `out` are rows of the packed forward, `keys` and `values` one layer of the cache.
  BlockByTiles(const Sequence& sequence, const Heads& heads, long group, long first_row)
      : BlockOfRows(sequence, heads, group, first_row) {
    shared_ = sequence.tail_mask ? sequence.visible_len / TILE * TILE : sequence.num_keys;
    lasts_ = _mm512_load_si512(last_);
    tiles_ = (longest_ + TILE - 1) / TILE;
  }

  void run(const bf16* queries, long query_stride, const bf16* keys, const bf16* values, bf16* out, long out_stride) {
    static thread_local Scratch scores_memory, weights_memory, queries_memory;
    const long size = heads_.size;
    // [position][row], then [tile][row][position].
    scores_ = (float*)scores_memory.get(tiles_ * TILE * ROWS * sizeof(float));
    weights_ = (bf16*)weights_memory.get(tiles_ * BLOCK * sizeof(bf16));
    queries_ = (bf16*)queries_memory.get(ROWS * size * sizeof(bf16));
    pack_queries(queries, query_stride);
    const long common = shared_tiles();
    for (long tile = 0; tile < common; ++tile) score(tile, keys, -1);
    for (long at = common * TILE; at < tiles_ * TILE; ++at)
      _mm512_store_ps(scores_ + at * ROWS, _mm512_set1_ps(-INFINITY));
    each_tail([&](long tile, long query) { score(tile, keys, query); });
    const __m512 sums = exponentiate();
    for (long e = 0; e < size; e += 64) gather(values, e, common, sums, out, out_stride);
  }

 private:
  long shared_tiles() const {
    const long all = (shared_ + TILE - 1) / TILE;
    return all < tiles_ ? all : tiles_;
  }

  __mmask16 rows_of(long query) const {
    __mmask16 mask = 0;
    for (long r = 0; r < count_; ++r) mask |= (query < 0 || query_of(r) == query) << r;
    return mask;
  }

  // Tiles of keys that a query has for itself: the last of what all see, and its ancestors.
  template <typename Do>
  void each_tail(Do visit) {
    if (!sequence_.tail_mask) return;
    const long tail = sequence_.num_keys - sequence_.visible_len;
    static thread_local Scratch path_memory;
    path_ = (int64_t*)path_memory.get((TILE + tail) * sizeof(int64_t));
    for (long query = query_of(0); query <= query_of(count_ - 1); ++query) {
      path_len_ = 0;
      for (long key = shared_; key < sequence_.visible_len; ++key) path_[path_len_++] = sequence_.slot(key);
      for (long m = 0; m < tail; ++m)
        if (sequence_.tail_mask[query * tail + m]) path_[path_len_++] = sequence_.slot(sequence_.visible_len + m);
      for (long tile = shared_ / TILE; (tile * TILE - shared_) < path_len_; ++tile) visit(tile, query);
    }
  }

  // Where 16 keys or values of the path begin at position `at`, `query` < 0 for what all see; copied together where they
  // do not lie in one run, zeros behind the end.
  const bf16* sixteen(const bf16* cache, long at, long query, bf16* copy, long& stride) const {
    const long size = heads_.size, step = heads_.num_groups * size;
    const long offset = query < 0 ? at : at - shared_;
    const long end = query < 0 ? sequence_.num_keys : path_len_;
    const int64_t* slots = query < 0 ? sequence_.slots : path_;
    cache += group_ * size;
    if (offset + ROWS <= end) {
      const int64_t first = slots ? slots[offset] : sequence_.first_slot + offset;
      bool is_run = true;
      if (slots)
        for (long i = 1; i < ROWS; ++i) is_run &= slots[offset + i] == first + i;
      if (is_run) {
        stride = step;
        return cache + first * step;
      }
    }
    stride = size;
    for (long i = 0; i < ROWS; ++i) {
      const long key = offset + i;
      if (key < end)
        std::memcpy(copy + i * size, cache + (slots ? slots[key] : sequence_.first_slot + key) * step, size * 2);
      else
        std::memset(copy + i * size, 0, size * 2);
    }
    return copy;
  }

  // Tiles [pair of components][row][2], for 32 components each.
  void pack_queries(const bf16* queries, long stride) {
    for (long e = 0; e < heads_.size; e += DEPTH) {
      __m512i columns[16];
      load_columns(count_, [&](long r) { return queries + place_of(r, stride) + e; }, columns);
      for (long i = 0; i < 16; ++i) _mm512_store_si512(queries_ + e * ROWS + i * 32, columns[i]);
    }
  }

  void score(long tile, const bf16* keys, long query) {
    alignas(64) bf16 copies[2][ROWS * 256];
    alignas(64) float sums[TILE * ROWS];
    long strides[2];
    const bf16* from[2];
    for (long half = 0; half < 2; ++half)
      from[half] = sixteen(keys, tile * TILE + half * ROWS, query, copies[half], strides[half]);
    // Two sums at a time: one waits for the result before it.
    _tile_zero(0);
    _tile_zero(1);
    for (long e = 0; e < heads_.size; e += DEPTH) {
      _tile_loadd(2, queries_ + e * ROWS, 64);
      _tile_loadd(3, from[0] + e, strides[0] * 2);
      _tile_dpbf16ps(0, 3, 2);
      _tile_loadd(4, from[1] + e, strides[1] * 2);
      _tile_dpbf16ps(1, 4, 2);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + ROWS * ROWS, 64);
    const __mmask16 rows = rows_of(query);
    const __m512 scaling = _mm512_set1_ps(heads_.scaling);
    const __m512i window = _mm512_set1_epi32(heads_.window > 0 ? heads_.window : INT32_MAX / 2);
    for (long i = 0; i < TILE; ++i) {
      const __m512i position = _mm512_set1_epi32(tile * TILE + i);
      const __mmask16 sees = _mm512_cmple_epi32_mask(position, lasts_) &
                             _mm512_cmpgt_epi32_mask(_mm512_add_epi32(position, window), lasts_);
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums + i * ROWS), scaling);
      _mm512_mask_store_ps(scores_ + (tile * TILE + i) * ROWS, rows,
                           _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), sees, scaled));
    }
  }

  // Weights before they are divided by their sums, which it returns.
  __m512 exponentiate() {
    __m512 best = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
    for (long at = 0; at < tiles_ * TILE; ++at) best = _mm512_max_ps(best, _mm512_load_ps(scores_ + at * ROWS));
    // Rows behind the last one see nothing.
    best = _mm512_maskz_mov_ps(rows_of(-1), best);
    for (long tile = 0; tile < tiles_; ++tile) {
      __m512i pairs[16];
      for (long i = 0; i < 16; ++i) {
        const float* from = scores_ + (tile * TILE + 2 * i) * ROWS;
        const __m512 one = exponential(_mm512_sub_ps(_mm512_load_ps(from), best));
        const __m512 other = exponential(_mm512_sub_ps(_mm512_load_ps(from + ROWS), best));
        sums = _mm512_add_ps(_mm512_add_ps(sums, one), other);
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(other));
        pairs[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      transpose(pairs);
      for (long r = 0; r < ROWS; ++r) _mm512_store_si512(weights_ + tile * BLOCK + r * TILE, pairs[r]);
    }
    return sums;
  }

  // 64 components (or the 32 that are left) of the results.
  void gather(const bf16* values, long e, long common, __m512 sums, bf16* out, long out_stride) {
    const long width = heads_.size - e < 64 ? heads_.size - e : 64;
    for (int i = 0; i < 4; ++i) zero(i);
    for (long tile = 0; tile < common; ++tile) {
      interleave(values, tile, e, width, -1);
      add(weights_ + tile * BLOCK, width);
    }
    each_tail([&](long tile, long query) {
      // Rows of other queries add nothing.
      alignas(64) bf16 own[BLOCK];
      const __mmask16 rows = rows_of(query);
      for (long r = 0; r < ROWS; ++r)
        _mm512_store_si512(own + r * TILE, rows >> r & 1 ? _mm512_load_si512(weights_ + tile * BLOCK + r * TILE)
                                                        : _mm512_setzero_si512());
      interleave(values, tile, e, width, query);
      add(own, width);
    });
    alignas(64) float result[4][256], total[ROWS];
    _tile_stored(0, result[0], 64);
    _tile_stored(1, result[1], 64);
    _tile_stored(2, result[2], 64);
    _tile_stored(3, result[3], 64);
    _mm512_store_ps(total, sums);
    for (long r = 0; r < count_; ++r) {
      bf16* to = out + place_of(r, out_stride) + e;
      for (long i = 0; i < width / 16; ++i)
        store(to + i * 16, _mm512_div_ps(_mm512_load_ps(result[i] + r * 16), _mm512_set1_ps(total[r])));
    }
  }

  static void zero(int tile) {
    switch (tile) {
      case 0: _tile_zero(0); break;
      case 1: _tile_zero(1); break;
      case 2: _tile_zero(2); break;
      default: _tile_zero(3);
    }
  }

  // The tile's values as [16 components][pair of positions][component][2].
  void interleave(const bf16* values, long tile, long e, long width, long query) {
    alignas(64) bf16 copy[ROWS * 256];
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) {
      low[i] = i / 2 + (i % 2) * 32;
      high[i] = low[i] + 16;
    }
    const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
    for (long half = 0; half < 2; ++half) {
      long stride;
      const bf16* from = sixteen(values, tile * TILE + half * ROWS, query, copy, stride);
      for (long pair = 0; pair < 8; ++pair)
        for (long c = 0; c < width; c += 32) {
          const __m512i one = _mm512_loadu_si512(from + 2 * pair * stride + e + c);
          const __m512i other = _mm512_loadu_si512(from + (2 * pair + 1) * stride + e + c);
          bf16* to = values_ + c / 16 * BLOCK + (half * 8 + pair) * 32;
          _mm512_store_si512(to, _mm512_permutex2var_epi16(one, first, other));
          _mm512_store_si512(to + BLOCK, _mm512_permutex2var_epi16(one, second, other));
        }
    }
  }

  void add(const bf16* weights, long width) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(5, values_, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, values_ + BLOCK, 64);
    _tile_dpbf16ps(1, 4, 6);
    if (width <= 32) return;
    _tile_loadd(5, values_ + 2 * BLOCK, 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, values_ + 3 * BLOCK, 64);
    _tile_dpbf16ps(3, 4, 6);
  }

  long shared_, tiles_;
  __m512i lasts_;
  float* scores_ = nullptr;
  bf16 *weights_ = nullptr, *queries_ = nullptr;
  int64_t* path_ = nullptr;
  long path_len_ = 0;
  alignas(64) bf16 values_[4 * BLOCK];
};
