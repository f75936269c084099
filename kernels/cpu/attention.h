// Attention of the tokens of many sequences over their pages.
#pragma once
#ifdef __AMX_BF16__
#include "attention_amx.h"
#else
#include "attention_fma.h"
#endif

// This thread's part of the attention of all sequences.
static inline void attend(const Sequence* sequences, long count, const Heads& heads, const bf16* queries, long query_stride,
                          const bf16* keys, const bf16* values, bf16* out, long out_stride) {
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  long number = 0;
  for (long s = 0; s < count; ++s)
    for (long row = 0; row < sequences[s].num_queries * heads.per_group(); row += ROWS)
      for (long group = 0; group < heads.num_groups; ++group)
        if (number++ % threads == me)
          Block(sequences[s], heads, group, row).run(queries, query_stride, keys, values, out, out_stride);
}
