// Attention over pages by fused multiply-adds in float32: 16 rows (queries times the heads of a group) at a time, keys in the
// order of positions along each query's own path. A row's bits depend on its own path alone. Heads of any size.
#pragma once
#include <type_traits>

#include "sequence.h"
#include "transpose.h"

// 32 numbers, or the `count` that are left of a head, zeros behind them.
static inline void load_pairs(const bf16* from, long count, Floats& even, Floats& odd) {
  if (count >= 32) return load_pairs(from, even, odd);
  alignas(64) bf16 some[32] = {};
  std::memcpy(some, from, count * sizeof(bf16));
  load_pairs(some, even, odd);
}

static inline void store_pairs(bf16* to, long count, Floats even, Floats odd) {
  if (count >= 32) return store_pairs(to, even, odd);
  alignas(64) bf16 some[32];
  store_pairs(some, even, odd);
  std::memcpy(to, some, count * sizeof(bf16));
}

// One block of 16 rows of one sequence and group.
class BlockByFma : BlockOfRows {
 public:
  // `queries` and `out` are rows of the packed forward, `keys` and `values` one layer of the cache.
  BlockByFma(const Sequence& sequence, const Heads& heads, long group, long first_row)
      : BlockOfRows(sequence, heads, group, first_row) {
    shared_ = sequence.tail_mask ? sequence.visible_len : longest_;
    width_ = (longest_ + 15) / 16 * 16;
    padded_ = (heads.size + 31) / 32 * 32;
  }

  void run(const bf16* queries, long query_stride, const bf16* keys, const bf16* values, bf16* out, long out_stride) {
    static thread_local Scratch scores_memory, queries_memory, results_memory, path_memory;
    scores_ = (float*)scores_memory.get(ROWS * width_ * sizeof(float));
    queries_ = (float*)queries_memory.get(ROWS * padded_ * sizeof(float));
    results_ = (float*)results_memory.get(ROWS * padded_ * sizeof(float));
    path_ = (int64_t*)path_memory.get((longest_ + 1) * sizeof(int64_t));
    for (long r = 0; r < count_; ++r)
      for (long e = 0; e < heads_.size; e += 32) {
        Floats even, odd;
        load_pairs(queries + place_of(r, query_stride) + e, heads_.size - e, even, odd);
        store_floats(queries_ + r * padded_ + e, even);
        store_floats(queries_ + r * padded_ + e + 16, odd);
      }
    for (long p = 0; p < shared_; ++p) path_[p] = sequence_.slot(p);
    score_all(keys);
    float sums[ROWS];
    for (long r = 0; r < count_; ++r) sums[r] = exponentiate(r);
    std::memset(results_, 0, count_ * padded_ * sizeof(float));
    each_piece([&](long row, long rows, long from, long to) { gather(values, row, rows, from, to); });
    for (long r = 0; r < count_; ++r)
      for (long e = 0; e < heads_.size; e += 32) {
        const float* from = results_ + r * padded_ + e;
        const Floats total = all(sums[r]);
        store_pairs(out + place_of(r, out_stride) + e, heads_.size - e, load_floats(from) / total,
                    load_floats(from + 16) / total);
      }
  }

 private:
  // Rows that see the same keys at the positions [from, to): all rows what is before the tree, each query's its own path.
  // `path_` holds these keys' slots.
  template <typename Do>
  void each_piece(Do visit) {
    visit(0, count_, 0, shared_);
    if (!sequence_.tail_mask) return;
    const long tail = sequence_.num_keys - sequence_.visible_len;
    for (long row = 0, next; row < count_; row = next) {
      const long query = query_of(row);
      for (next = row; next < count_ && query_of(next) == query;) ++next;
      long end = shared_;
      for (long m = 0; m < tail; ++m)
        if (sequence_.tail_mask[query * tail + m]) path_[end++] = sequence_.slot(sequence_.visible_len + m);
      visit(row, next - row, shared_, end);
    }
  }

  // Calls visit(first row, how many) for pieces of at most MOST rows, a number that the compiler knows.
  template <long MOST, typename Do>
  static void in_pieces(long row, long rows, Do visit) {
    for (; rows >= MOST; row += MOST, rows -= MOST) visit(row, std::integral_constant<long, MOST>());
    if constexpr (MOST > 1)
      if (rows) in_pieces<MOST - 1>(row, rows, visit);
  }

  const bf16* at(const bf16* cache, long position) const {
    return cache + (path_[position] * heads_.num_groups + group_) * heads_.size;
  }

  // Scores [row][position] of each row's own path.
  void score_all(const bf16* keys) {
    score(keys, 0, shared_, scores_, width_);
    if (!sequence_.tail_mask) return;
    const long tail = sequence_.num_keys - shared_, width = (tail + 15) / 16 * 16;
    static thread_local Scratch tail_memory;
    float* of_tail = (float*)tail_memory.get(count_ * width * sizeof(float));
    score(keys, shared_, tail, of_tail, width);
    for (long r = 0; r < count_; ++r) {
      const uint8_t* sees = sequence_.tail_mask + query_of(r) * tail;
      long p = shared_;
      for (long m = 0; m < tail; ++m)
        if (sees[m]) scores_[r * width_ + p++] = of_tail[r * width + m];
    }
  }

  // Scores of `count` keys from `first` on, to [row][key], 16 keys side by side in a vector: each is a sum for itself.
  void score(const bf16* keys, long first, long count, float* to, long width) {
    static thread_local Scratch columns_memory;
    float* columns = (float*)columns_memory.get(padded_ * 16 * sizeof(float));
    for (long k = 0; k < count; k += 16) {
      for (long e = 0; e < padded_; e += 32) load_keys(keys, first + k, count - k < 16 ? count - k : 16, e, columns + e * 16);
      in_pieces<SUMS < 12 ? 2 : 8>(0, count_, [&](long row, auto number) {
        constexpr long NUM = decltype(number)::value;
        Floats even[NUM], odd[NUM];
#pragma GCC unroll 8
        for (long r = 0; r < NUM; ++r) even[r] = odd[r] = all(0.0f);
        for (long e = 0; e < padded_; e += 32) {
          const float *query = queries_ + row * padded_ + e, *key = columns + e * 16;
          for (long i = 0; i < 16; ++i) {
            const Floats a = load_floats(key + i * 16), b = load_floats(key + (16 + i) * 16);
#pragma GCC unroll 8
            for (long r = 0; r < NUM; ++r) {
              even[r] = plus_product(even[r], a, all(query[r * padded_ + i]));
              odd[r] = plus_product(odd[r], b, all(query[r * padded_ + 16 + i]));
            }
          }
        }
#pragma GCC unroll 8
        for (long r = 0; r < NUM; ++r)
          store_floats(to + (row + r) * width + k, (even[r] + odd[r]) * all(heads_.scaling));
      });
    }
  }

  // 32 components of `count` keys, as `load_columns` lays them. The next ones are asked for: pages are anywhere, so that the
  // hardware cannot guess what will be read.
  void load_keys(const bf16* keys, long key, long count, long e, float* to) const {
    const auto place = [&](long key) {
      return keys + (sequence_.slot(key) * heads_.num_groups + group_) * heads_.size + e;
    };
    const auto from = [&](long i) {
      if (key + i + 16 < sequence_.num_keys) _mm_prefetch((const char*)place(key + i + 16), _MM_HINT_T0);
      return place(key + i);
    };
    if (heads_.size - e >= 32) return load_columns(count, from, to);
    alignas(64) bf16 some[16][32] = {};
    for (long i = 0; i < count; ++i) std::memcpy(some[i], from(i), (heads_.size - e) * sizeof(bf16));
    load_columns(count, [&](long i) { return some[i]; }, to);
  }

  // Scores to weights before they are divided by their sum, which it returns.
  float exponentiate(long row) {
    float* scores = scores_ + row * width_;
    const long end = last_[row] + 1, hidden = heads_.window > 0 && end > heads_.window ? end - heads_.window : 0;
    for (long p = 0; p < hidden; ++p) scores[p] = -INFINITY;
    for (long p = end; p < width_; ++p) scores[p] = -INFINITY;
    Floats best = all(-INFINITY), sums = all(0.0f);
    for (long p = 0; p < width_; p += 16) best = larger(best, load_floats(scores + p));
    const float sink = heads_.sinks ? heads_.sinks[head_of(row)] : -INFINITY;
    const float most = std::fmax(largest(best), sink);
    const Floats bound = all(most);
    for (long p = 0; p < width_; p += 16) {
      const Floats weights = exponential(load_floats(scores + p) - bound);
      store_floats(scores + p, weights);
      sums = sums + weights;
    }
    return sum(sums) + (heads_.sinks ? std::exp(sink - most) : 0.0f);
  }

  // Adds the values at some positions to what the rows have, a few of them at a time, widened once for all rows.
  void gather(const bf16* values, long row, long rows, long from, long to) {
    constexpr long NEAR = 32;
    static thread_local Scratch near_memory;
    float* near = (float*)near_memory.get(NEAR * padded_ * sizeof(float));
    for (long p = from; p < to; p += NEAR) {
      const long count = to - p < NEAR ? to - p : NEAR;
      for (long i = 0; i < count; ++i)
        for (long e = 0; e < padded_; e += 32) {
          Floats even, odd;
          if (p + i + NEAR < to) _mm_prefetch((const char*)(at(values, p + i + NEAR) + e), _MM_HINT_T0);
          load_pairs(at(values, p + i) + e, heads_.size - e, even, odd);
          store_floats(near + i * padded_ + e, even);
          store_floats(near + i * padded_ + e + 16, odd);
        }
      in_pieces<SUMS < 12 ? 2 : 8>(row, rows, [&](long first, auto number) {
        constexpr long NUM = decltype(number)::value;
        for (long e = 0; e < padded_; e += 32) {
          const float *weights = scores_ + first * width_ + p, *some = near + e;
          float* results = results_ + first * padded_ + e;
          Floats even[NUM], odd[NUM];
#pragma GCC unroll 8
          for (long r = 0; r < NUM; ++r) {
            even[r] = load_floats(results + r * padded_);
            odd[r] = load_floats(results + r * padded_ + 16);
          }
          for (long i = 0; i < count; ++i, some += padded_) {
            const Floats a = load_floats(some), b = load_floats(some + 16);
#pragma GCC unroll 8
            for (long r = 0; r < NUM; ++r) {
              const Floats weight = all(weights[r * width_ + i]);
              even[r] = plus_product(even[r], a, weight);
              odd[r] = plus_product(odd[r], b, weight);
            }
          }
#pragma GCC unroll 8
          for (long r = 0; r < NUM; ++r) {
            store_floats(results + r * padded_, even[r]);
            store_floats(results + r * padded_ + 16, odd[r]);
          }
        }
      });
    }
  }

  // Positions before the tree; scores of a row, and numbers of a head, up to a multiple of 16 and 32.
  long shared_, width_, padded_;
  float *scores_ = nullptr, *queries_ = nullptr, *results_ = nullptr;
  int64_t* path_ = nullptr;
};
