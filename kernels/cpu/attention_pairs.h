// Attention over pages where the CPU multiplies pairs of bfloat16: 16 rows (queries times the heads of a group) side by side in
// a vector. A row's bits depend on its own path alone: scores are sums for themselves, and values are added pair by pair
// of positions, in the order of its path.
#pragma once
#include "sequence.h"
#include "transpose.h"

// One block of 16 rows of one sequence and group.
class BlockByPairs : BlockOfRows {
 public:
  // `queries` and `out` are rows of the packed forward, `keys` and `values` one layer of the cache.
  BlockByPairs(const Sequence& sequence, const Heads& heads, long group, long first_row)
      : BlockOfRows(sequence, heads, group, first_row) {
    common_ = sequence.tail_mask ? sequence.visible_len : longest_;
    pairs_ = (longest_ + 1) / 2;
  }

  void run(const bf16* queries, long query_stride, const bf16* keys, const bf16* values, bf16* out, long out_stride) {
    static thread_local Scratch queries_memory, scores_memory, weights_memory, results_memory, path_memory, runs_memory;
    queries_ = (Pairs*)queries_memory.get(heads_.size / 2 * sizeof(Pairs));
    scores_ = (Floats*)scores_memory.get(2 * pairs_ * sizeof(Floats));
    weights_ = (RowPair*)weights_memory.get(pairs_ * ROWS * sizeof(RowPair));
    results_ = (float*)results_memory.get(ROWS * heads_.size * sizeof(float));
    path_ = (int64_t*)path_memory.get((1 + sequence_.num_keys - sequence_.visible_len) * sizeof(int64_t));
    step_ = heads_.num_groups * heads_.size;
    runs_ = (int64_t*)runs_memory.get((sequence_.num_keys + 15) / 16 * sizeof(int64_t));
    for (long key = 0; key < sequence_.num_keys; key += 16) {
      const long count = sequence_.num_keys - key < 16 ? sequence_.num_keys - key : 16;
      runs_[key / 16] = sequence_.is_run(key, count) ? sequence_.slot(key) : -1;
    }
    keys += group_ * heads_.size;
    values += group_ * heads_.size;
    for (long e = 0; e < heads_.size; e += DEPTH)
      load_columns(count_, [&](long r) { return queries + place_of(r, query_stride) + e; }, queries_ + e / 2);
    alignas(64) float total[ROWS];
    if (count_ <= FEW) {
      weigh_few(keys, total);
    } else {
      score(keys);
      store_floats(total, exponentiate());
    }
    std::memset(results_, 0, ROWS * heads_.size * sizeof(float));
    // A pair that the tree divides belongs to each query's own path.
    const long even = sequence_.tail_mask ? common_ / 2 * 2 : common_;
    for (long e = 0; e < heads_.size; e += WIDTH) gather(values, e, even);
    if (sequence_.tail_mask)
      each_path(even, [&](long first, long rows, long len) { gather_path(values, first, rows, even, len); });
    for (long r = 0; r < count_; ++r) {
      bf16* to = out + place_of(r, out_stride);
      for (long e = 0; e < heads_.size; e += 16) store(to + e, load_floats(results_ + r * heads_.size + e) / all(total[r]));
    }
  }

 private:
  // Components whose values lie interleaved at a time, and pairs of positions.
  static constexpr long WIDTH = 32, TILE = 16;
  // So many rows are better told from one another, 16 keys side by side in a vector.
  static constexpr long FEW = 8;
  // Of the largest head that is served.
  static constexpr long MOST_PAIRS = 128;

  const bf16* at(const bf16* cache, long key) const { return cache + sequence_.slot(key) * step_; }

  // Where in the cache the 16 keys from `first` on lie in a row: within a page no slot has to be looked up. Null: they do not, or
  // `first` is no multiple of 16, or there are none.
  const bf16* run_at(const bf16* cache, long first) const {
    return first < sequence_.num_keys && first % 16 == 0 && runs_[first / 16] >= 0 ? cache + runs_[first / 16] * step_ : nullptr;
  }

  // 32 components from `e` on of `count` keys from `first` on, side by side; `run` is where they lie in a row. What lies `next` will
  // be read then: pages are anywhere, so that the hardware cannot guess it.
  template <typename To>
  void load_keys(const bf16* keys, long first, long count, long e, const bf16* run, const bf16* next, To* to) const {
    const auto ask = [&](long i) {
      if (next) _mm_prefetch((const char*)(next + i * step_ + e), _MM_HINT_T0);
    };
    if (run)
      load_columns(count, [&](long i) { return ask(i), run + i * step_ + e; }, to);
    else
      load_columns(count, [&](long i) { return ask(i), at(keys, first + i) + e; }, to);
  }

  // Scores [position][row] behind one another: of what all rows see, then of each row's own path.
  void score(const bf16* keys) {
    for (long p = 0; p < common_; p += 16) score_some(keys, p, common_ - p < 16 ? common_ - p : 16, scores_ + p);
    for (long p = common_; p < 2 * pairs_; ++p) scores_[p] = all(-INFINITY);
    if (!sequence_.tail_mask) return mask_later();
    const long tail = sequence_.num_keys - common_;
    static thread_local Scratch tail_memory;
    Floats* of_tail = (Floats*)tail_memory.get(tail * sizeof(Floats));
    for (long m = 0; m < tail; m += 16) score_some(keys, common_ + m, tail - m < 16 ? tail - m : 16, of_tail + m);
    for (long r = 0; r < count_; ++r) {
      const uint8_t* sees = sequence_.tail_mask + query_of(r) * tail;
      long p = common_;
      for (long m = 0; m < tail; ++m)
        if (sees[m]) ((float*)(scores_ + p++))[r] = ((float*)(of_tail + m))[r];
    }
    if (heads_.window > 0) mask_later();
  }

  // Of `count` keys in a row, up to 16, which are laid as [pair of components][key] first: one register then finds them all.
  void score_some(const bf16* keys, long key, long count, Floats* to) const {
    const bf16 *run = run_at(keys, key), *next = run_at(keys, key + 16);
    alignas(64) RowPair columns[MOST_PAIRS * 16];
    for (long e = 0; e < heads_.size; e += DEPTH)
      load_keys(keys, key, count, e, run, next, (__m512i*)columns + e / 2);
    Floats sums[16];
#pragma GCC unroll 16
    for (long j = 0; j < 16; ++j) sums[j] = all(0.0f);
    for (long e = 0; e < heads_.size / 2; ++e) {
      const Pairs queries = queries_[e];
#pragma GCC unroll 16
      for (long j = 0; j < 16; ++j) sums[j] = plus_products(sums[j], queries, columns[e * 16 + j]);
    }
    for (long j = 0; j < count; ++j) to[j] = sums[j] * all(heads_.scaling);
  }

  // What lies behind a row's position, or before its window, it does not see.
  void mask_later() {
    const __m512i lasts = _mm512_load_si512(last_);
    const __m512i window = _mm512_set1_epi32(heads_.window > 0 ? heads_.window : INT32_MAX / 2);
    for (long p = 0; p < longest_; ++p) {
      const __m512i position = _mm512_set1_epi32(p);
      const __mmask16 sees = _mm512_cmple_epi32_mask(position, lasts) &
                             _mm512_cmpgt_epi32_mask(_mm512_add_epi32(position, window), lasts);
      scores_[p] = _mm512_mask_mov_ps(all(-INFINITY), sees, scores_[p]);
    }
  }

  // Scores to pairs of weights before they are divided by their sums, which it returns.
  Floats exponentiate() {
    Floats best = all(-INFINITY), sums = all(0.0f);
    for (long p = 0; p < longest_; ++p) best = larger(best, scores_[p]);
    // Rows behind the last one see nothing.
    best = _mm512_maskz_mov_ps((1 << count_) - 1, best);
    for (long pair = 0; pair < pairs_; ++pair) {
      const Floats one = exponential(scores_[2 * pair] - best), other = exponential(scores_[2 * pair + 1] - best);
      sums = sums + one + other;
      store_pairs((bf16*)(weights_ + pair * ROWS), one, other);
    }
    return sums;
  }

  // What `score` and `exponentiate` do, for few rows: the same products and sums in the same order, so the same bits.
  void weigh_few(const bf16* keys, float* total) {
    static thread_local Scratch scores_memory, tail_memory;
    const long width = (longest_ + 15) / 16 * 16;
    float* scores = (float*)scores_memory.get(count_ * width * sizeof(float));
    score_few(keys, 0, common_, scores, width);
    if (sequence_.tail_mask) {
      const long tail = sequence_.num_keys - common_, tail_width = (tail + 15) / 16 * 16;
      float* of_tail = (float*)tail_memory.get(count_ * tail_width * sizeof(float));
      score_few(keys, common_, tail, of_tail, tail_width);
      for (long r = 0; r < count_; ++r) {
        const uint8_t* sees = sequence_.tail_mask + query_of(r) * tail;
        long p = common_;
        for (long m = 0; m < tail; ++m)
          if (sees[m]) scores[r * width + p++] = of_tail[r * tail_width + m];
      }
    }
    for (long r = 0; r < count_; ++r) total[r] = exponentiate_one(scores + r * width, width, r);
  }

  // Scores of `count` keys from `first` on, to [row][key].
  void score_few(const bf16* keys, long first, long count, float* to, long width) const {
    typedef void (BlockByPairs::*Score)(const bf16*, long, long, float*, long) const;
    static constexpr Score of[] = {&BlockByPairs::score_rows<1>, &BlockByPairs::score_rows<2>, &BlockByPairs::score_rows<3>,
                                   &BlockByPairs::score_rows<4>, &BlockByPairs::score_rows<5>, &BlockByPairs::score_rows<6>,
                                   &BlockByPairs::score_rows<7>, &BlockByPairs::score_rows<8>};
    static_assert(sizeof of / sizeof *of == FEW);
    for (long p = 0; p < count; p += 16)
      (this->*of[count_ - 1])(keys, first + p, count - p < 16 ? count - p : 16, to + p, width);
  }

  template <long NUM>
  void score_rows(const bf16* keys, long first, long count, float* to, long width) const {
    const bf16 *run = run_at(keys, first), *next = run_at(keys, first + 16);
    Floats sums[NUM];
#pragma GCC unroll 8
    for (long r = 0; r < NUM; ++r) sums[r] = all(0.0f);
    for (long e = 0; e < heads_.size; e += DEPTH) {
      __m512i columns[16];
      load_keys(keys, first, count, e, run, next, columns);
      for (long i = 0; i < 16; ++i) {
        const RowPair* queries = (const RowPair*)(queries_ + e / 2 + i);
#pragma GCC unroll 8
        for (long r = 0; r < NUM; ++r) sums[r] = plus_products(sums[r], columns[i], queries[r]);
      }
    }
#pragma GCC unroll 8
    for (long r = 0; r < NUM; ++r) store_floats(to + r * width, sums[r] * all(heads_.scaling));
  }

  // A row's scores to weights, and their sum.
  float exponentiate_one(float* scores, long width, long row) {
    const long end = last_[row] + 1, begin = heads_.window > 0 && end > heads_.window ? end - heads_.window : 0;
    for (long p = 0; p < begin; ++p) scores[p] = -INFINITY;
    for (long p = end; p < width; ++p) scores[p] = -INFINITY;
    Floats best = all(-INFINITY);
    for (long p = 0; p < width; p += 16) best = larger(best, load_floats(scores + p));
    best = all(largest(best));
    for (long p = 0; p < width; p += 16) {
      const Floats some = exponential(load_floats(scores + p) - best);
      store_floats(scores + p, some);
      alignas(32) RowPair pairs[8];
      _mm256_store_si256((__m256i*)pairs, narrowed(some));
      for (long i = 0; i < 8 && p / 2 + i < pairs_; ++i) weights_[(p / 2 + i) * ROWS + row] = pairs[i];
    }
    float total = 0;
    for (long p = begin; p < end; ++p) total += scores[p];
    return total;
  }

  // Two positions' components, the first's and the second's side by side.
  static void interleave(const bf16* one, const bf16* other, Pairs& low, Pairs& high) {
    alignas(64) static constexpr uint16_t ORDER[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i first = _mm512_loadu_si512(one), second = other ? _mm512_loadu_si512(other) : _mm512_setzero_si512();
    low = _mm512_permutex2var_epi16(first, _mm512_load_si512(ORDER[0]), second);
    high = _mm512_permutex2var_epi16(first, _mm512_load_si512(ORDER[1]), second);
  }

  // Adds 32 components of the values at the positions before `end`, weighted, to all rows.
  void gather(const bf16* values, long e, long end) {
    Pairs near[2 * TILE];
    for (long from = 0; from < end; from += 2 * TILE) {
      const long pairs = (end - from < 2 * TILE ? end - from + 1 : 2 * TILE) / 2;
      for (long i = 0; i < pairs; ++i) {
        const long p = from + 2 * i, within = p % 16 * step_ + e;
        if (const bf16* next = run_at(values, p - p % 16 + 2 * TILE)) {
          _mm_prefetch((const char*)(next + within), _MM_HINT_T0);
          _mm_prefetch((const char*)(next + within + step_), _MM_HINT_T0);
        }
        const bf16* run = run_at(values, p - p % 16);
        const bf16 *one = run ? run + within : at(values, p) + e, *other = nullptr;
        if (p + 1 < end) other = run ? one + step_ : at(values, p + 1) + e;
        interleave(one, other, near[2 * i], near[2 * i + 1]);
      }
      const RowPair* weights = weights_ + from / 2 * ROWS;
      long r = 0;
      for (; r + 8 <= count_; r += 8) add<8>(near, weights, pairs, r, e);
      if (r + 4 <= count_) add<4>(near, weights, pairs, r, e), r += 4;
      if (r + 3 == count_) add<3>(near, weights, pairs, r, e);
      if (r + 2 == count_) add<2>(near, weights, pairs, r, e);
      if (r + 1 == count_) add<1>(near, weights, pairs, r, e);
    }
  }

  template <long NUM>
  void add(const Pairs* values, const RowPair* weights, long pairs, long row, long e) {
    Floats low[NUM], high[NUM];
    float* results = results_ + row * heads_.size + e;
#pragma GCC unroll 8
    for (long r = 0; r < NUM; ++r) {
      low[r] = load_floats(results + r * heads_.size);
      high[r] = load_floats(results + r * heads_.size + 16);
    }
    for (long i = 0; i < pairs; ++i) {
      const Pairs a = values[2 * i], b = values[2 * i + 1];
#pragma GCC unroll 8
      for (long r = 0; r < NUM; ++r) {
        const RowPair weight = weights[i * ROWS + row + r];
        low[r] = plus_products(low[r], a, weight);
        high[r] = plus_products(high[r], b, weight);
      }
    }
#pragma GCC unroll 8
    for (long r = 0; r < NUM; ++r) {
      store_floats(results + r * heads_.size, low[r]);
      store_floats(results + r * heads_.size + 16, high[r]);
    }
  }

  // Calls visit(first row, rows, len) for the rows of each query; `path_` holds the slots of what they see from position
  // `from` on.
  template <typename Do>
  void each_path(long from, Do visit) {
    const long tail = sequence_.num_keys - sequence_.visible_len;
    for (long row = 0, next; row < count_; row = next) {
      const long query = query_of(row);
      for (next = row; next < count_ && query_of(next) == query;) ++next;
      long len = 0;
      for (long key = from; key < sequence_.visible_len; ++key) path_[len++] = sequence_.slot(key);
      for (long m = 0; m < tail; ++m)
        if (sequence_.tail_mask[query * tail + m]) path_[len++] = sequence_.slot(sequence_.visible_len + m);
      visit(row, next - row, len);
    }
  }

  void gather_path(const bf16* values, long first, long rows, long from, long len) {
    Pairs near[2];
    for (long i = 0; i < len; i += 2)
      for (long e = 0; e < heads_.size; e += WIDTH) {
        interleave(values + path_[i] * step_ + e, i + 1 < len ? values + path_[i + 1] * step_ + e : nullptr, near[0], near[1]);
        const RowPair* weights = weights_ + (from + i) / 2 * ROWS;
        for (long r = first; r < first + rows; ++r) add<1>(near, weights, 1, r, e);
      }
  }

  // Positions that all rows see alike, pairs of them that some row sees, numbers from one slot to the next.
  long common_, pairs_, step_ = 0;
  // [pair of components][row].
  Pairs* queries_ = nullptr;
  Floats* scores_ = nullptr;
  RowPair* weights_ = nullptr;
  float* results_ = nullptr;
  int64_t* path_ = nullptr;
  // Of every 16 keys the first slot, -1 where they do not lie in a row.
  int64_t* runs_ = nullptr;
};
