// A stack of decoder layers over pages: norm, attention, norm, gated linear unit, as Llama has them.
#pragma once
#include "attention.h"
#include "product.h"

struct Layer {
  const bf16* norm1;
  Weight qkv;
  const bf16 *query_norm, *key_norm;
  Weight out;
  const bf16* norm2;
  Weight gate_up, down;
  int64_t window;
};

struct Stack {
  int64_t num_layers, hidden_size, num_heads, num_groups, head_size;
  float eps, scaling;
  const Layer* layers;
};

struct Step {
  int64_t num_tokens, num_sequences, num_threads;
  const Sequence* sequences;
  const int64_t *positions, *slots;
  // Tables [position][head size].
  const bf16 *cos, *sin;
  // One address per layer.
  bf16 *const *keys, *const *values;
  // Where the hidden states behind each layer are wanted, null where not.
  bf16* const* hidden;
  // What the first layer's queries, keys and values are made of, up to a multiple of 32 rows; null: its normed input.
  const bf16* read;
  // The rows, ascending, whose states behind the last layer are asked for, and the sequences with no other queries than them;
  // null: all.
  const int64_t* asked;
  int64_t num_asked, num_asked_sequences;
  const Sequence* asked_sequences;
};

// Llama's: float32 inside, rounded before the weight is multiplied.
static inline void norm(const bf16* x, const bf16* weight, long size, float eps, bf16* to) {
  Floats squares = all(0.0f);
  for (long i = 0; i < size; i += 16) squares = plus_product(squares, load(x + i), load(x + i));
  const Floats scale = all(1.0f / std::sqrt(sum(squares) / size + eps));
  for (long i = 0; i < size; i += 16) store(to + i, load(weight + i) * rounded(load(x + i) * scale));
}

// The halves of a head against each other.
static inline void rotate(bf16* x, const bf16* cos, const bf16* sin, long size) {
  const long half = size / 2;
  for (long i = 0; i < half; i += 16) {
    const Floats a = load(x + i), b = load(x + half + i);
    store(x + i, rounded(a * load(cos + i)) + rounded((all(0.0f) - b) * load(sin + i)));
    store(x + half + i, rounded(b * load(cos + half + i)) + rounded(a * load(sin + half + i)));
  }
}

static inline void norm_rows(const bf16* x, long count, const bf16* weight, const Stack& stack, bf16* to) {
  long begin, end;
  share(count, begin, end);
  for (long t = begin; t < end; ++t)
    norm(x + t * stack.hidden_size, weight, stack.hidden_size, stack.eps, to + t * stack.hidden_size);
}

// Adds to the residual stream what `weight` makes of the rows.
static inline void project_back(const bf16* rows, long count, const Weight& weight, bf16* x, long size) {
  product(rows, count, weight, [&](long row, long block, Floats sums) {
    bf16* to = x + row * size + block * 16;
    store(to, load(to) + rounded(sums));
  });
}

// Turns the new tokens' queries and keys by their positions; keys and values go to their slots.
static inline void place(const Stack& stack, const Layer& layer, const Step& step, long number, bf16* qkv) {
  const long size = stack.head_size, heads = stack.num_heads, groups = stack.num_groups;
  const long width = (heads + 2 * groups) * size, each = heads + groups;
  long begin, end;
  share(step.num_tokens * each, begin, end);
  for (long i = begin; i < end; ++i) {
    const long token = i / each, head = i % each;
    bf16* x = qkv + token * width + head * size;
    const bf16* weight = head < heads ? layer.query_norm : layer.key_norm;
    if (weight) norm(x, weight, size, stack.eps, x);
    rotate(x, step.cos + step.positions[token] * size, step.sin + step.positions[token] * size, size);
    if (head < heads) continue;
    const long at = (step.slots[token] * groups + head - heads) * size;
    std::memcpy(step.keys[number] + at, x, size * 2);
    std::memcpy(step.values[number] + at, x + groups * size, size * 2);
  }
}

// The rows `x` through a layer, in place; through the last one only those that are asked for, which are then the first.
static inline void run_layer(const Stack& stack, const Step& step, long number, bf16* x, bf16* normed, bf16* wide,
                             Meeting& meeting) {
  const Layer& layer = stack.layers[number];
  const long size = stack.hidden_size;
  long count = step.num_tokens;
  const long attended = stack.num_heads * stack.head_size, width = attended + 2 * stack.num_groups * stack.head_size;
  const bf16* read = number == 0 && step.read ? step.read : normed;
  if (read == normed) norm_rows(x, count, layer.norm1, stack, normed);
  meeting.wait();
  product(read, count, layer.qkv,
          [&](long row, long block, Floats sums) { store(wide + row * width + block * 16, sums); });
  meeting.wait();
  place(stack, layer, step, number, wide);
  meeting.wait();
  const Heads heads{stack.num_heads, stack.num_groups, stack.head_size, stack.scaling, layer.window};
  if (number + 1 == stack.num_layers && step.asked) {
    // Of other rows there is nothing left to do: their keys and values are all that anybody will read.
    count = step.num_asked;
    if (!count) return;
    attend(step.asked_sequences, step.num_asked_sequences, heads, wide, width, step.keys[number], step.values[number],
           normed, attended);
    meeting.wait();
    for (long i = 0; i < count && omp_get_thread_num() == 0; ++i) {
      const long row = step.asked[i];
      if (row == i) continue;
      std::memcpy(normed + i * attended, normed + row * attended, attended * 2);
      std::memcpy(x + i * size, x + row * size, size * 2);
    }
    meeting.wait();
  } else {
    attend(step.sequences, step.num_sequences, heads, wide, width, step.keys[number], step.values[number], normed, attended);
    meeting.wait();
  }
  project_back(normed, count, layer.out, x, size);
  meeting.wait();
  norm_rows(x, count, layer.norm2, stack, normed);
  meeting.wait();
  const long inner = layer.down.inputs;
  product_of_halves(normed, count, layer.gate_up, [&](long row, long block, Floats gate, Floats up) {
    gate = rounded(gate);
    const Floats silu = gate / (all(1.0f) + exponential(all(0.0f) - gate));
    store(wide + row * inner + block * 16, rounded(silu) * rounded(up));
  });
  meeting.wait();
  project_back(wide, count, layer.down, x, size);
  meeting.wait();
  if (step.hidden[number]) {
    long begin, end;
    share(count, begin, end);
    std::memcpy(step.hidden[number] + begin * size, x + begin * size, (end - begin) * size * 2);
  }
}
