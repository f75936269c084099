// Linear layers and whole stacks of decoder layers in bfloat16, as Python calls them.
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layers.h"

extern "C" {

// 1 where the operating system lets this process use what the kernels need.
int specdec_can_run() {
#ifdef __AMX_BF16__
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return 1;
#endif
}

// Numbers of room that `specdec_run` wants for the normed rows and for the wide ones.
void specdec_room(const Stack* stack, int64_t num_tokens, int64_t* normed, int64_t* wide) {
  const long rows = (num_tokens + 2 * ROWS - 1) / (2 * ROWS) * 2 * ROWS;
  const long attended = stack->num_heads * stack->head_size;
  const long qkv = attended + 2 * stack->num_groups * stack->head_size;
  const long inner = stack->layers[0].down.inputs;
  *normed = rows * (attended > stack->hidden_size ? attended : stack->hidden_size);
  *wide = rows * (qkv > inner ? qkv : inner);
}

// The rows `x` through all layers, in place, those that are asked for moved to the front; the cache holds the keys and values of
// all of them afterwards.
void specdec_run(const Stack* stack, const Step* step, bf16* x, bf16* normed, bf16* wide) {
  Meeting meeting;
#pragma omp parallel num_threads(step->num_threads)
  {
    Tiles tiles;
    for (long layer = 0; layer < stack->num_layers; ++layer) run_layer(*stack, *step, layer, x, normed, wide, meeting);
  }
}

// Attention of packed queries [tokens, heads, size] over one layer of the cache.
void specdec_attend(const Sequence* sequences, int64_t count, const Heads* heads, const bf16* queries, const bf16* keys,
                    const bf16* values, bf16* out, int64_t num_threads) {
  const long stride = heads->num_heads * heads->size;
#pragma omp parallel num_threads(num_threads)
  {
    Tiles tiles;
    attend(sequences, count, *heads, queries, stride, keys, values, out, stride);
  }
}

// norm(x[rows[i]]) to row i of `to`, which are `stride` apart; `rows` null: all of them.
void specdec_norm(const bf16* x, const int64_t* rows, int64_t count, const bf16* weight, int64_t size, float eps, bf16* to,
                  int64_t stride) {
  for (long i = 0; i < count; ++i) norm(x + (rows ? rows[i] : i) * size, weight, size, eps, to + i * stride);
}

// rows [count, inputs] x weight to [count, outputs]; the weight may have been filled up to more inputs.
void specdec_linear(const bf16* rows, int64_t count, int64_t inputs, const Weight* weight, bf16* to, int64_t num_threads) {
  const long outputs = weight->outputs, width = weight->inputs;
#pragma omp parallel num_threads(num_threads)
  {
    Tiles tiles;
    const bf16* whole = rows;
    if (width != inputs || (READS_WHOLE_TILES && count % ROWS)) {
      static thread_local Scratch copy;
      bf16* copied = (bf16*)copy.get((count + ROWS) * width * sizeof(bf16));
      for (long r = 0; r < count; ++r) {
        std::memcpy(copied + r * width, rows + r * inputs, inputs * sizeof(bf16));
        std::memset(copied + r * width + inputs, 0, (width - inputs) * sizeof(bf16));
      }
      whole = copied;
    }
    product(whole, count, *weight, [&](long row, long block, Floats sums) {
      bf16* at = to + row * outputs + block * 16;
      const long left = outputs - block * 16;
      if (left >= 16)
        store(at, sums);
      else
        store_some(at, sums, left);
    });
  }
}
}
