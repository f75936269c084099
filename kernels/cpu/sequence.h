// What attention is told of each sequence and of the heads.
#pragma once
#include "simd.h"

struct Sequence {
  int64_t row, num_queries, visible_len, num_keys;
  // The slot of every key; null: one run from `first_slot`.
  const int64_t* slots;
  int64_t first_slot;
  // [queries, num_keys - visible_len], null: causal, the queries being the last keys.
  const uint8_t* tail_mask;

  int64_t slot(int64_t key) const { return slots ? slots[key] : first_slot + key; }

  // Whether `count` keys from `first` on lie one behind another.
  bool is_run(int64_t first, int64_t count) const {
    if (!slots) return true;
    bool is_run = true;
    for (int64_t i = 1; i < count; ++i) is_run &= slots[first + i] == slots[first] + i;
    return is_run;
  }
};

struct Heads {
  int64_t num_heads, num_groups, size;
  float scaling;
  int64_t window;
  // A logit per head that takes part in the softmax and has no value; null: none.
  const float* sinks = nullptr;

  long per_group() const { return num_heads / num_groups; }
};


// Up to 16 rows of one sequence and group: its queries times the heads of the group.
class BlockOfRows {
 public:
  BlockOfRows(const Sequence& sequence, const Heads& heads, long group, long first_row)
      : sequence_(sequence), heads_(heads), group_(group), first_(first_row) {
    const long total = sequence.num_queries * heads.per_group(), tail = sequence.num_keys - sequence.visible_len;
    count_ = total - first_ < ROWS ? total - first_ : ROWS;
    for (long r = 0; r < count_; ++r) {
      const long query = query_of(r);
      if (sequence.tail_mask) {
        long seen = 0;
        for (long m = 0; m < tail; ++m) seen += sequence.tail_mask[query * tail + m];
        last_[r] = sequence.visible_len + seen - 1;
      } else {
        last_[r] = sequence.num_keys - sequence.num_queries + query;
      }
      if (last_[r] + 1 > longest_) longest_ = last_[r] + 1;
    }
    for (long r = count_; r < ROWS; ++r) last_[r] = -1;
  }

 protected:
  long query_of(long row) const { return (first_ + row) / heads_.per_group(); }
  long head_of(long row) const { return group_ * heads_.per_group() + (first_ + row) % heads_.per_group(); }
  // Numbers of a row's query, or of its part of the result, behind those of the packed row `stride` wide.
  long place_of(long row, long stride) const {
    return (sequence_.row + query_of(row)) * stride + head_of(row) * heads_.size;
  }

  const Sequence& sequence_;
  const Heads& heads_;
  long group_, first_, count_, longest_ = 0;
  // The position behind which each row sees nothing; -1 where there is no row.
  alignas(64) int32_t last_[ROWS];
};
