"""How often a drafter's r-th guess is right at each depth, counted along given texts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.growth import DraftRound, Grown
from specdec.interfaces import Commit, Drafter, Noise
from specdec.kv_cache import KVCache
from specdec.model import PagedModel, Segment
from specdec.noise import CounterNoise
from specdec.off_pages import completed
from specdec.pages import PagePool, PageTable
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence
from specdec.tree import DrawKind, TokenTree, TreeSpec


@dataclass(frozen=True)
class RankAccuracies:
    """`hits[d][r]` of the `counts[d]` times that depth d + 1 was drafted behind the text's own tokens, the drafter's r-th
    best guess was the text's next token. Counts of several texts add up."""

    hits: list[list[int]]
    counts: list[int]

    @property
    def rates(self) -> list[list[float]]:
        """Accuracies per depth and rank, as `choices.best_choices` takes them; depths never drafted are left out."""
        pairs = zip(self.hits, self.counts, strict=True)
        return [[hit / count for hit in hits] for hits, count in pairs if count]

    def __add__(self, other: RankAccuracies) -> RankAccuracies:
        hits = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.hits, other.hits, strict=True)]
        return RankAccuracies(hits, [a + b for a, b in zip(self.counts, other.counts, strict=True)])


def measure_accuracies(
    drafter: Drafter,
    target: PagedModel,
    texts: Seq[Seq[int]],
    depth: int,
    num_ranks: int,
    stride: int = 1,
    first_roots: Seq[int] | None = None,
) -> RankAccuracies:
    """Leads a drafter that follows growing policies along `texts`, token ids that the target itself would write, all in one
    batch; every `stride`-th token is a root from which `depth` further tokens are looked for among its `num_ranks` best.
    `first_roots` says per text where the first root may lie (None: at the second token), behind a prompt for instance.

    The target runs each text once and only for the drafter's features; `drafter` is bound to it afterwards. Raises
    ValueError for numbers below 1 and for texts that are too short to draft anything.
    """
    if min(depth, num_ranks, stride) < 1:
        raise ValueError(f"depth={depth}, num_ranks={num_ranks}, stride={stride} must be >= 1")
    if not any(len(text) > 2 for text in texts):
        raise ValueError("no text has three tokens: nothing can be drafted behind the second")
    firsts = [1] * len(texts) if first_roots is None else [max(first, 1) for first in first_roots]
    chosen = [(text, first) for text, first in zip(texts, firsts, strict=True) if len(text) > 2]
    walk = _Walk(drafter, target, [text for text, _ in chosen], [first for _, first in chosen], depth)
    probe = _Probe(depth, num_ranks)
    try:
        for root in range(min(walk.first_roots), max(map(len, texts)) - 1, stride):
            if walk.rows(root):
                walk.advance(root)
                probe.look(walk, root)
    finally:
        walk.close()
    return RankAccuracies(probe.hits_DR.tolist(), probe.counts_D.tolist())


class _Walk:
    """Texts as sequences on pages, their features, and how far the drafter has come."""

    _CHUNK = 512

    def __init__(
        self, drafter: Drafter, target: PagedModel, texts: Seq[Seq[int]], first_roots: list[int], depth: int
    ) -> None:
        self.first_roots = first_roots
        self.drafter, self.device, self.texts = drafter, target.device, [list(text) for text in texts]
        pool = PagePool(0)
        pool.grow(sum(pool.pages_for(len(text) + depth) for text in texts))
        completed(drafter).bind(target, pool)
        layers, cache = tuple(drafter.feature_layers), target.new_cache(pool)
        self._tables = [PageTable(pool) for _ in texts]
        self._hidden: list[dict[int, Tensor]] = []
        for text, table in zip(self.texts, self._tables, strict=True):
            table.reserve(len(text) + depth, 0)
            # Without features to show, the target has nothing to say here.
            begins = range(0, len(text) if layers else 0, self._CHUNK)
            found = [self._forward(target, cache, table, text, begin, layers) for begin in begins]
            self._hidden.append({layer: torch.cat([hidden[layer] for hidden in found]) for layer in layers})
        self._sequences = [
            Sequence(i, text[:1], SamplingParams(), 0, table, len(text) + depth + 1, target.max_positions)
            for i, (text, table) in enumerate(zip(self.texts, self._tables, strict=True))
        ]

    def _forward(
        self, target: PagedModel, cache: KVCache, table: PageTable, text: list[int], begin: int, layers: tuple[int, ...]
    ) -> dict[int, Tensor]:
        tokens = torch.tensor(text[begin : begin + self._CHUNK], device=self.device)
        positions = torch.arange(begin, begin + len(tokens), device=self.device)
        no_rows = torch.tensor([], dtype=torch.int64, device=self.device)
        return target.forward([Segment(table, begin, tokens, positions)], cache, no_rows, layers).hidden

    def rows(self, root: int) -> list[int]:
        """The texts that go on behind token `root`, and whose first root is not behind it."""
        return [i for i, text in enumerate(self.texts) if self.first_roots[i] <= root < len(text) - 1]

    def sequences(self, root: int) -> list[Sequence]:
        return [self._sequences[i] for i in self.rows(root)]

    def advance(self, root: int) -> None:
        """Makes everything before token `root` final and shows it to the drafter."""
        commits = []
        for i in self.rows(root):
            one, text, begin = self._sequences[i], self.texts[i], self._sequences[i].num_computed
            hidden = {layer: states[begin:root] for layer, states in self._hidden[i].items()}
            commits.append(Commit(i, begin, text[begin:root], text[root], None, hidden))
            one.token_ids, one.num_computed = text[: root + 1], root
        self.drafter.observe(commits)

    def close(self) -> None:
        self.drafter.forget(range(len(self.texts)))
        for table in self._tables:
            table.release()


class _Probe:
    """Grows the text's own continuation instead of a tree and notes at which rank the drafter has each of its tokens."""

    spec = TreeSpec(frozenset({DrawKind.FIXED}), is_chain=True)

    def __init__(self, depth: int, num_ranks: int) -> None:
        self.max_depth, self.max_nodes, self.max_expanded = depth, depth + 1, depth
        self.hits_DR = torch.zeros(depth, num_ranks, dtype=torch.int64)
        self.counts_D = torch.zeros(depth, dtype=torch.int64)

    def look(self, walk: _Walk, root: int) -> None:
        sequences = walk.sequences(root)
        futures = [walk.texts[i][root + 1 : root + 1 + self.max_depth] for i in walk.rows(root)]
        self._futures_BD = torch.tensor([[*one, *[-1] * (self.max_depth - len(one))] for one in futures])
        noise = CounterNoise([0] * len(sequences), [root] * len(sequences), [root] * len(sequences), walk.device)
        walk.drafter.propose(sequences, self, noise)

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        batch, ranks = len(draft.limits), self.hits_DR.shape[1]
        following = draft.expand_root()
        for depth in range(max(draft.limits)):
            next_B = self._futures_BD[:, depth]
            is_known_B = (next_B >= 0) & (torch.tensor(draft.limits) > depth)
            guesses_Bk, logprobs_Bk = (values[:, 0].cpu() for values in following.top(ranks))
            is_hit_Bk = (guesses_Bk == next_B[:, None]) & (logprobs_Bk > -torch.inf)
            self.hits_DR[depth] += is_hit_Bk[is_known_B].sum(0)
            self.counts_D[depth] += is_known_B.sum()
            if depth + 1 < max(draft.limits):
                tokens_B1 = next_B.clamp_min(0)[:, None].to(draft.roots_B.device)
                following = draft.expand(tokens_B1, torch.full_like(tokens_B1, depth), depth + 1)
        tree = TokenTree.roots(draft.roots_B, draft.vocab_size)
        return Grown(tree, torch.zeros(batch, 1, dtype=torch.int64))
