// Attention of the tokens of many sequences over their pages.
#pragma once
#include "attention_fma.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
typedef BlockByTiles BlockByHalves;
#elif defined(__AVX512BF16__)
#include "attention_pairs.h"
typedef BlockByPairs BlockByHalves;
#endif

template <typename Block>
struct Kind {
  typedef Block type;
};

// This thread's part of the attention of all sequences.
static inline void attend(const Sequence* sequences, long count, const Heads& heads, const bf16* queries, long query_stride,
                          const bf16* keys, const bf16* values, bf16* out, long out_stride) {
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  long number = 0;
  const auto attend_all = [&](auto block) {
    for (long s = 0; s < count; ++s)
      for (long row = 0; row < sequences[s].num_queries * heads.per_group(); row += ROWS)
        for (long group = 0; group < heads.num_groups; ++group)
          if (number++ % threads == me)
            typename decltype(block)::type(sequences[s], heads, group, row)
                .run(queries, query_stride, keys, values, out, out_stride);
  };
#ifdef __AVX512BF16__
  if (heads.size % DEPTH == 0 && heads.size <= 256 && !heads.sinks) return attend_all(Kind<BlockByHalves>());
#endif
  attend_all(Kind<BlockByFma>());
}
