"""Prompt lookup: what followed the last few tokens earlier in the prompt or the output will follow them again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from specdec.drafters.growth import FixedPolicy, GrowingPolicy
from specdec.int_tensor import int_tensor
from specdec.interfaces import Commit, Noise, TreePolicy
from specdec.model import PagedModel
from specdec.off_pages import OffPages
from specdec.pages import PagePool
from specdec.sequence import Sequence
from specdec.tree import TokenTree


class NGramIndex:
    """Where each n-gram of a growing token list has occurred; adding a token costs the same however long the list is."""

    def __init__(self, min_ngram: int, max_ngram: int, max_matches: int) -> None:
        self.tokens: list[int] = []
        self.max_ngram, self._max_matches = max_ngram, max_matches
        # By size, the largest first: the last place of every n-gram, and for each place the one before it of the same n-gram
        # (-1: none). A place is the index behind the n-gram that ends before it.
        self._places: list[tuple[int, dict[tuple[int, ...], int], list[int]]] = [
            (size, {}, [-1] * size) for size in range(max_ngram, min_ngram - 1, -1)
        ]

    def extend(self, tokens: Seq[int]) -> None:
        for token in tokens:
            place = len(self.tokens)
            for size, last, before in self._places:
                if size <= place:
                    ngram = tuple(self.tokens[place - size :])
                    before.append(last.get(ngram, -1))
                    last[ngram] = place
            self.tokens.append(token)

    def matches(self, context: Seq[int]) -> list[int]:
        """Places that followed the end of `context` before, longest n-gram first, then most recent, without repeats."""
        found: dict[int, None] = {}
        for size, last, before in self._places:
            if size <= len(context):
                place = last.get(tuple(context[len(context) - size :]), -1)
                for _ in range(self._max_matches):
                    if place < 0:
                        break
                    found.setdefault(place)
                    place = before[place]
        return list(found)

    def first_match(self) -> int | None:
        """The first of the places that followed the end of the list before."""
        for size, last, _ in self._places:
            if size <= len(self.tokens) and (place := last.get(tuple(self.tokens[-size:]))) is not None:
                return place
        return None

    def overlap(self, place: int, at_most: int = 16) -> int:
        """How many tokens before `place` are those at the end of the list."""
        ends = zip(reversed(self.tokens[max(place - at_most, 0) : place]), reversed(self.tokens), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))

    def continuation(self, place: int, length: int) -> list[int]:
        """The tokens from `place` on; where they run into the end of the list, the repetition is carried on."""
        tail = self.tokens[place : place + length]
        period = len(self.tokens) - place
        return [tail[i % period] for i in range(length)]


class NGramDrafter(OffPages):
    """Prompt lookup over prompt and output (Saxena 2023, prompt-lookup-decoding; Yang et al. 2023, LLMA), no model needed.

    The last `max_ngram` down to `min_ngram` tokens are looked up; the continuations of up to `max_matches` occurrences of
    each n-gram are merged into one tree, longest match first, then most recent, as far as the policy admits. A policy that
    draws gets, as its law, how often each token followed one of these occurrences.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(self, min_ngram: int = 1, max_ngram: int = 4, max_matches: int = 8) -> None:
        if not 1 <= min_ngram <= max_ngram or max_matches < 1:
            raise ValueError(
                f"min_ngram={min_ngram}, max_ngram={max_ngram}, max_matches={max_matches}: "
                f"they must satisfy 1 <= min_ngram <= max_ngram and max_matches >= 1"
            )
        self._settings = (min_ngram, max_ngram, max_matches)
        self._indexes: dict[int, NGramIndex] = {}
        self._vocab_size = 0
        self._device = torch.device("cpu")

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        self._vocab_size, self._device = target.vocab_size, target.device
        self._indexes.clear()

    def observe(self, commits: Seq[Commit]) -> None:
        """Reads along in prompts, one chunk behind, so that no step has a long one to read. The rest waits until somebody asks;
        of many texts nobody does."""
        for commit in commits:
            one = commit.sequence
            if one is not None and 0 < commit.start < one.prompt_len:
                self._read(one, commit.start)

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
        rows = self.ready(sequences, policy)
        if rows is not None:
            trees = [(tokens, parents) for tokens, parents, _ in rows]
            confidence = [confidence for _, _, confidence in rows]
            return TokenTree.from_lists(trees, self._vocab_size, confidence, self._device)
        # Only laws are counted here, no likeliest tokens ranked.
        if not (isinstance(policy, GrowingPolicy) and policy.spec.is_sampled):
            raise ValueError(f"drafter ngram cannot follow the policy {type(policy).__name__}")
        return policy.grow(_NGramRound(self, sequences), noise).tree

    def ready(
        self, sequences: Seq[Sequence], policy: TreePolicy
    ) -> list[tuple[list[int], list[int], list[float]]] | None:
        """See `ReadyMade`."""
        if not isinstance(policy, FixedPolicy):
            return None
        return [self._merge(self._index(one), policy, one.max_draft_depth) for one in sequences]

    def surest(self, sequence: Sequence) -> float:
        """See `ReadyMade`."""
        index = self._index(sequence)
        place = index.first_match()
        return 0.0 if place is None else _confidence(index.overlap(place), 0)

    def forget(self, sequence_ids: Seq[int]) -> None:
        for sequence_id in sequence_ids:
            self._indexes.pop(sequence_id, None)

    def _index(self, sequence: Sequence) -> NGramIndex:
        return self._read(sequence, len(sequence.token_ids))

    def _read(self, sequence: Sequence, end: int) -> NGramIndex:
        index = self._indexes.get(sequence.id)
        if index is None:
            index = self._indexes[sequence.id] = NGramIndex(*self._settings)
        index.extend(sequence.token_ids[len(index.tokens) : end])
        return index

    def _merge(self, index: NGramIndex, policy: FixedPolicy, limit: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and confidence of one tree: the continuations as paths, a new branch taking the next rank of its
        parent."""
        depth = min(policy.max_depth, limit)
        tokens, parents = [index.tokens[-1]], [-1]
        ranks: list[tuple[int, ...]] = [()]
        child_of: dict[tuple[int, int], int] = {}
        num_children = [0]
        confidence = [math.nan]
        for place in index.matches(index.tokens) if depth else ():
            node, size = 0, index.overlap(place)
            for token in index.continuation(place, depth):
                child = child_of.get((node, token))
                if child is None:
                    rank = (*ranks[node], num_children[node])
                    if not policy.admits(rank, len(tokens)):
                        break
                    child = child_of[node, token] = len(tokens)
                    num_children[node] += 1
                    num_children.append(0)
                    tokens.append(token)
                    parents.append(node)
                    ranks.append(rank)
                    confidence.append(_confidence(size + len(rank) - 1, rank[-1]))
                node = child
            if len(tokens) >= policy.max_nodes:
                break
        return tokens, parents, confidence


def _confidence(context: int, rank: int) -> float:
    """The longer the context that matches, drafted tokens included, the surer: roughly how often such guesses are right. In one
    tree its order alone counts; whoever compares it with what others say counts for himself."""
    return context / (context + 2) * 0.25**rank


class _NGramRound:
    """Lets a policy that draws grow from the frequencies of what followed each node's context."""

    def __init__(self, drafter: NGramDrafter, sequences: Seq[Sequence]) -> None:
        self._indexes = [drafter._index(one) for one in sequences]
        self.roots_B = int_tensor([one.root for one in sequences], drafter._device)
        self.limits = [one.max_draft_depth for one in sequences]
        self.vocab_size = drafter._vocab_size

    def expand_root(self) -> _NGramNext:
        return _NGramNext(self)

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> _NGramNext:
        return _NGramNext(self)

    def law(self, row: int, path: list[int]) -> Tensor:
        index = self._indexes[row]
        counts = torch.zeros(self.vocab_size)
        context = index.tokens[-index.max_ngram :] + path
        for place in index.matches(context):
            counts[index.tokens[place]] += 1
        return counts / counts.sum().clamp_min(1)


class _NGramNext:
    def __init__(self, draft: _NGramRound) -> None:
        self._draft = draft

    def laws(self, paths_BWK: Tensor) -> Tensor:
        laws = [
            torch.stack([self._draft.law(row, [token for token in path if token >= 0]) for path in paths])
            for row, paths in enumerate(paths_BWK.tolist())
        ]
        return torch.stack(laws).to(self._draft.roots_B.device)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("policies without chance take ready-made paths")
