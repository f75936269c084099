// Confidence trees of an EAGLE head, all levels in one call.
//
// What `TopK.grow` in drafters/growth.py does level by level (Li et al. 2024, EAGLE-2, sections 4.1-4.2): run the likeliest
// nodes of the last level, give each its likeliest children, keep the likeliest nodes of all. Nodes whose children could not be
// kept are not run.
#include <algorithm>
#include <vector>

#include "layers.h"

struct Head {
  // Of one layer.
  const Stack* stack;
  // [vocabulary, hidden]
  const bf16* embeddings;
  // Version 3 norms embedding and feature, which its layer reads side by side, and its output; null in version 1.
  const bf16 *embedding_norm, *feature_norm, *last_norm;
  int64_t norm_before_residual;
  // Version 1: embedding and feature, side by side, to what the layer reads; null in version 3.
  const Weight *fc, *lm_head;
  // The token of each output of the LM head; null: its number.
  const int64_t* ids;
};

struct Root {
  // The deepest level of the tree, the root's position among the head's entries.
  int64_t limit, position;
  // The slots of the entries up to the root's and of what lies behind it, see `Sequence`.
  int64_t visible_len;
  const int64_t* slots;
  int64_t first_slot;
};

struct Growth {
  int64_t num_sequences, max_nodes, depth, num_children, num_threads;
  const Root* roots;
  // The head's states [sequences, hidden] at the roots.
  const bf16* states;
  // Tables [position][head size].
  const bf16 *cos, *sin;
  bf16 *keys, *values;
  // [sequences, max_nodes], without the root: number among the expanded nodes or -1, and how likely a node is behind its parent.
  int64_t *tokens, *parents, *expanded;
  float* confidence;
  int64_t* num_nodes;
};

namespace {

struct Candidate {
  int64_t token;
  // Log-probability of the path, and of the node behind its parent.
  float score, own;
  // Among the candidates, -1: the root; among the nodes that were run, -1: not.
  int64_t parent, number;
};

// The tree of one sequence as it grows.
struct Tree {
  std::vector<Candidate> candidates;
  // Where the last level begins.
  long first = 0;
  // The candidates that are run next, or were last.
  std::vector<long> frontier;
  // Of each node that was run, the root first: its candidate, and who of them its ancestors are, itself included.
  std::vector<long> run{-1};
  std::vector<std::vector<long>> ancestors{{}};
  std::vector<uint8_t> tail_mask;
};

// The likeliest `count` outputs of a row and their log-probabilities.
void likeliest(const float* logits, long size, long count, long* at, float* logprobs) {
  float best = -INFINITY, total = 0;
  Floats most = all(-INFINITY), sums = all(0.0f);
  long i = 0;
  for (; i + 16 <= size; i += 16) most = larger(most, load_floats(logits + i));
  best = largest(most);
  for (; i < size; ++i) best = std::max(best, logits[i]);
  const Floats bound = all(best);
  for (i = 0; i + 16 <= size; i += 16) sums = sums + exponential(load_floats(logits + i) - bound);
  total = sum(sums);
  for (; i < size; ++i) total += std::exp(logits[i] - best);
  const float norm = best + std::log(total);
  long found = 0;
  float least = -INFINITY;
  for (long from = 0; from < size; from += 16) {
    const long end = std::min(from + 16, size);
    // Most pieces hold nothing that is among the best.
    if (found == count && end - from == 16 && largest(load_floats(logits + from)) <= least) continue;
    for (long n = from; n < end; ++n) {
      if (found == count && logits[n] <= least) continue;
      long place = found < count ? found++ : count - 1;
      for (; place > 0 && logits[at[place - 1]] < logits[n]; --place) at[place] = at[place - 1];
      at[place] = n;
      if (found == count) least = logits[at[count - 1]];
    }
  }
  for (long n = 0; n < count; ++n) logprobs[n] = logits[at[n]] - norm;
}

class Grower {
 public:
  Grower(const Head& head, const Growth& growth)
      : head_(head), growth_(growth), hidden_(head.stack->hidden_size), trees_(growth.num_sequences) {
    const long batch = growth.num_sequences, k = growth.num_children;
    // Tiles read rows in pairs of 16.
    const long rows = (batch * k + 2 * ROWS - 1) / (2 * ROWS) * 2 * ROWS, outputs = head.lm_head->outputs;
    const Stack& stack = *head.stack;
    const long attended = stack.num_heads * stack.head_size;
    const long queries_and_keys = attended + 2 * stack.num_groups * stack.head_size;
    // Of this thread, which the whole team's work is done for; kept from call to call.
    static thread_local Scratch memory[9];
    const auto take = [](Scratch& from, auto*& at, long count) { at = (std::remove_reference_t<decltype(at)>)from.get(count * sizeof *at); };
    take(memory[0], x_, rows * hidden_);
    take(memory[1], read_, rows * 2 * hidden_);
    take(memory[2], joined_, rows * 2 * hidden_);
    take(memory[3], normed_, rows * std::max(attended, hidden_));
    take(memory[4], wide_, rows * std::max(queries_and_keys, stack.layers[0].down.inputs));
    take(memory[5], states_, batch * most_run() * hidden_);
    take(memory[6], logits_, batch * k * outputs);
    take(memory[7], best_, batch * k * k);
    take(memory[8], logprobs_, batch * k * k);
    for (long b = 0; b < batch; ++b) {
      std::memcpy(state(b, 0), growth.states + b * hidden_, hidden_ * sizeof(bf16));
      if (growth.roots[b].limit > 0) rows_.push_back({b, 0});
    }
  }

  // Run by every thread of the team.
  void run() {
    for (;;) {
      answer();
      meeting_.wait();
      if (omp_get_thread_num() == 0) {
        take_children();
        is_done_ = ++depth_ >= growth_.depth || !choose_frontier();
        if (!is_done_) prepare();
      }
      meeting_.wait();
      if (is_done_) break;
      gather();
      meeting_.wait();
      if (head_.fc) {
        product(joined_, (long)rows_.size(), *head_.fc, [&](long row, long block, Floats sums) {
          store(x_ + row * hidden_ + block * 16, sums);
          store(read_ + row * hidden_ + block * 16, sums);
        });
        meeting_.wait();
      }
      run_layer(*head_.stack, step_, 0, x_, normed_, wide_, meeting_);
      long begin, end;
      share(rows_.size(), begin, end);
      for (long r = begin; r < end; ++r)
        std::memcpy(state(rows_[r].sequence, rows_[r].number), x_ + r * hidden_, hidden_ * sizeof(bf16));
      meeting_.wait();
    }
  }

  void keep() {
    for (long b = 0; b < growth_.num_sequences; ++b) keep(b);
  }

 private:
  struct Row {
    long sequence, number;
  };

  // Nodes of a sequence that are run, the root among them.
  long most_run() const { return 1 + (growth_.depth - 1) * growth_.num_children; }

  bf16* state(long b, long number) { return states_ + (b * most_run() + number) * hidden_; }

  // The likeliest children of the nodes that were run last.
  void answer() {
    const long count = rows_.size(), outputs = head_.lm_head->outputs, k = growth_.num_children;
    long begin, end;
    share(count, begin, end);
    for (long r = begin; r < end; ++r) {
      const bf16* from = state(rows_[r].sequence, rows_[r].number);
      if (head_.last_norm)
        norm(from, head_.last_norm, hidden_, head_.stack->eps, normed_ + r * hidden_);
      else
        std::memcpy(normed_ + r * hidden_, from, hidden_ * sizeof(bf16));
    }
    meeting_.wait();
    product(normed_, count, *head_.lm_head, [&](long row, long block, Floats sums) {
      // As a tensor of bfloat16 would hold them.
      alignas(64) float some[16];
      store_floats(some, rounded(sums));
      std::memcpy(logits_ + row * outputs + block * 16, some, std::min(16L, outputs - block * 16) * sizeof(float));
    });
    meeting_.wait();
    for (long r = begin; r < end; ++r)
      likeliest(logits_ + r * outputs, outputs, k, best_ + r * k, logprobs_ + r * k);
  }

  void take_children() {
    for (Tree& tree : trees_) tree.first = tree.candidates.size();
    for (size_t r = 0; r < rows_.size(); ++r) {
      Tree& tree = trees_[rows_[r].sequence];
      const long parent = tree.run[rows_[r].number];
      const float above = parent < 0 ? 0.0f : tree.candidates[parent].score;
      for (long i = 0; i < growth_.num_children; ++i) {
        const long output = best_[r * growth_.num_children + i];
        const float own = logprobs_[r * growth_.num_children + i];
        tree.candidates.push_back({head_.ids ? head_.ids[output] : output, above + own, own, parent, -1});
      }
    }
  }

  // What a node of this tree must score more than for any below it to be kept: a path is never likelier than its beginning.
  float least(const Tree& tree) const {
    const size_t kept = growth_.max_nodes;
    if (tree.candidates.size() < kept) return -INFINITY;
    std::vector<float> scores;
    for (const Candidate& one : tree.candidates) scores.push_back(one.score);
    std::nth_element(scores.begin(), scores.begin() + kept - 1, scores.end(), std::greater<float>());
    return scores[kept - 1];
  }

  // The nodes to run next; false: none.
  bool choose_frontier() {
    rows_.clear();
    for (long b = 0; b < growth_.num_sequences; ++b) {
      Tree& tree = trees_[b];
      tree.frontier.clear();
      if (growth_.roots[b].limit <= depth_) continue;
      const float bound = least(tree);
      for (size_t c = tree.first; c < tree.candidates.size(); ++c)
        if (tree.candidates[c].score > bound) tree.frontier.push_back(c);
      std::stable_sort(tree.frontier.begin(), tree.frontier.end(),
                       [&](long x, long y) { return tree.candidates[x].score > tree.candidates[y].score; });
      if ((long)tree.frontier.size() > growth_.num_children) tree.frontier.resize(growth_.num_children);
      for (const long c : tree.frontier) {
        Candidate& one = tree.candidates[c];
        one.number = tree.run.size();
        std::vector<long> line = tree.ancestors[one.parent < 0 ? 0 : tree.candidates[one.parent].number];
        line.push_back(one.number);
        tree.run.push_back(c);
        tree.ancestors.push_back(line);
        rows_.push_back({b, one.number});
      }
    }
    return !rows_.empty();
  }

  // What the layer is told of this level.
  void prepare() {
    sequences_.clear();
    positions_.clear();
    slots_.clear();
    for (size_t r = 0; r < rows_.size();) {
      const long b = rows_[r].sequence;
      Tree& tree = trees_[b];
      const Root& root = growth_.roots[b];
      // The root is part of what all see.
      const long tail = tree.run.size() - 1, count = tree.frontier.size();
      tree.tail_mask.assign(count * tail, 0);
      Sequence one{(int64_t)r, count, root.visible_len, root.visible_len + tail, root.slots, root.first_slot,
                   tree.tail_mask.data()};
      for (long i = 0; i < count; ++i, ++r) {
        for (const long number : tree.ancestors[rows_[r].number]) tree.tail_mask[i * tail + number - 1] = 1;
        positions_.push_back(root.position + depth_);
        slots_.push_back(one.slot(root.visible_len + rows_[r].number - 1));
      }
      sequences_.push_back(one);
    }
    step_ = {(int64_t)rows_.size(), (int64_t)sequences_.size(), growth_.num_threads, sequences_.data(), positions_.data(),
             slots_.data(), growth_.cos, growth_.sin, &growth_.keys, &growth_.values, &unwanted_, read_};
  }

  // What the layer reads and what it adds to: each node's embedding beside the state of its parent.
  void gather() {
    long begin, end;
    share(rows_.size(), begin, end);
    for (long r = begin; r < end; ++r) {
      Tree& tree = trees_[rows_[r].sequence];
      const Candidate& one = tree.candidates[tree.run[rows_[r].number]];
      const bf16* embedding = head_.embeddings + one.token * hidden_;
      const bf16* feature = state(rows_[r].sequence, one.parent < 0 ? 0 : tree.candidates[one.parent].number);
      if (head_.fc) {
        std::memcpy(joined_ + 2 * r * hidden_, embedding, hidden_ * sizeof(bf16));
        std::memcpy(joined_ + (2 * r + 1) * hidden_, feature, hidden_ * sizeof(bf16));
        continue;
      }
      bf16* read = read_ + 2 * r * hidden_;
      norm(embedding, head_.embedding_norm, hidden_, head_.stack->eps, read);
      norm(feature, head_.feature_norm, hidden_, head_.stack->eps, read + hidden_);
      std::memcpy(x_ + r * hidden_, head_.norm_before_residual ? read + hidden_ : feature, hidden_ * sizeof(bf16));
    }
  }

  void keep(long b) {
    Tree& tree = trees_[b];
    std::vector<long> order(tree.candidates.size());
    for (size_t c = 0; c < order.size(); ++c) order[c] = c;
    // A parent scores at least its child and stands before it, so a stable sort keeps parents with their children.
    std::stable_sort(order.begin(), order.end(),
                     [&](long x, long y) { return tree.candidates[x].score > tree.candidates[y].score; });
    if ((long)order.size() > growth_.max_nodes) order.resize(growth_.max_nodes);
    std::sort(order.begin(), order.end());
    std::vector<long> node(tree.candidates.size(), 0);
    const long base = b * growth_.max_nodes;
    for (size_t n = 0; n < order.size(); ++n) {
      const Candidate& one = tree.candidates[order[n]];
      node[order[n]] = n + 1;
      growth_.tokens[base + n] = one.token;
      growth_.parents[base + n] = one.parent < 0 ? 0 : node[one.parent];
      growth_.expanded[base + n] = one.number;
      growth_.confidence[base + n] = std::exp(one.own);
    }
    growth_.num_nodes[b] = order.size();
  }

  const Head& head_;
  const Growth& growth_;
  long hidden_, depth_ = 0;
  bool is_done_ = false;
  std::vector<Tree> trees_;
  // The nodes that are run next, or were last.
  std::vector<Row> rows_;
  std::vector<Sequence> sequences_;
  std::vector<int64_t> positions_, slots_;
  bf16 *x_, *read_, *joined_, *normed_, *wide_, *states_;
  float *logits_, *logprobs_;
  long* best_;
  bf16* unwanted_ = nullptr;
  Step step_;
  Meeting meeting_;
};

}  // namespace

extern "C" void specdec_grow(const Head* head, const Growth* growth) {
  Grower grower(*head, *growth);
#pragma omp parallel num_threads(growth->num_threads)
  {
    Tiles tiles;
    grower.run();
  }
  grower.keep();
}
