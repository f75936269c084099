"""A drafter among others: its trees with what they are worth, by how often such nodes of its own were right before."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from specdec.acceptance_stats import CONFIDENT, NodeRates, Offset, shifted, shifted_one
from specdec.interfaces import Commit, Drafter, Noise, TreePolicy
from specdec.model import PagedModel
from specdec.off_pages import completed
from specdec.pages import PagePool
from specdec.sequence import Sequence


@dataclass(frozen=True)
class Draft:
    """One drafter's tree behind a root: tokens and parents of its nodes (root first), where each is counted, and how likely
    it is to be right where its parent is (at the root anything)."""

    tokens: list[int]
    parents: list[int]
    cells: Seq[int]
    edges: list[float]

    @property
    def expected(self) -> float:
        """The expected number of accepted tokens, were this the tree that is verified."""
        return sum(path_probs(self.parents, self.edges)[1:])

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents) if parent == node]


@runtime_checkable
class ReadyMade(Protocol):
    """A drafter that needs no model: its trees cost next to nothing beside any forward."""

    def ready(
        self, sequences: Seq[Sequence], policy: TreePolicy
    ) -> list[tuple[list[int], list[int], list[float]]] | None:
        """Tokens, parents and confidence of each sequence's tree of FIXED nodes, root first; None where the policy draws."""
        ...

    def surest(self, sequence: Sequence) -> float:
        """The confidence of the node behind the root that it would name first; 0 where it has none."""
        ...


class Member:
    """A drafter whose trees become part of larger ones.

    Its opinion of its nodes is calibrated as they turn out (`NodeRates`), for each sequence on its own (`Offset`); nodes
    that were never verified are judged too, as far as the text reaches them. Accepted tokens reach it as nodes of its own
    tree; those that others drafted, as tokens it has not drafted. `drafts` are its last trees by sequence, until the text
    goes on.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self._rates = completed(drafter), NodeRates()
        self._ready = drafter if isinstance(drafter, ReadyMade) else None
        self._offsets: dict[int, Offset] = {}
        self.drafts: dict[int, Draft] = {}

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        """A new engine starts from what is known of none."""
        self._rates = NodeRates()
        self._offsets.clear()
        self.drafts.clear()
        self.drafter.bind(target, pool)

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> list[Draft]:
        """Its own tree for each sequence, all nodes FIXED."""
        ready = None if self._ready is None else self._ready.ready(sequences, policy)
        if ready is not None:
            drafts = [self._calibrated(one.id, *tree) for one, tree in zip(sequences, ready, strict=True)]
        else:
            drafts = self._grown(sequences, policy, noise)
        self.drafts.update({one.id: draft for one, draft in zip(sequences, drafts, strict=True)})
        return drafts

    def surest(self, sequence: Sequence) -> float:
        """How likely its first guess behind the root is to be right, of a drafter that needs no model."""
        assert self._ready is not None
        confidence, offset = self._ready.surest(sequence), self._offsets.get(sequence.id)
        if not confidence:
            return 0.0
        return shifted_one(self._rates.rate(self._rates.cell(1, confidence)), 0.0 if offset is None else offset.value)

    def _calibrated(self, id: int, tokens: list[int], parents: list[int], confidence: list[float]) -> Draft:
        offset = self._offsets.setdefault(id, Offset(CONFIDENT)).value
        depths, cells, edges = [0], [0], [math.nan]
        # Nodes of a tree share few cells.
        known: dict[int, float] = {}
        for parent, one in zip(parents[1:], confidence[1:], strict=True):
            depths.append(depths[parent] + 1)
            cell = self._rates.cell(depths[-1], one)
            if cell not in known:
                known[cell] = shifted_one(self._rates.rate(cell), offset)
            cells.append(cell)
            edges.append(known[cell])
        return Draft(tokens, parents, cells, edges)

    def _grown(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> list[Draft]:
        tree = self.drafter.propose(sequences, policy, noise).on_cpu
        tokens, parents, sizes = tree.tokens_BN.tolist(), tree.parents_BN.tolist(), tree.shape.sizes
        confidence_BN = None if tree.confidence_BN is None else tree.confidence_BN.numpy()
        cells_BN = self._rates.cells(np.array([_depths(row) for row in parents]), confidence_BN, np.array(parents))
        offsets = [self._offsets.setdefault(one.id, Offset(CONFIDENT)).value for one in sequences]
        edges = shifted(self._rates.rates(cells_BN), np.array(offsets)[:, None]).tolist()
        cells = cells_BN.tolist()
        return [
            Draft(tokens[row][:size], parents[row][:size], cells[row][:size], edges[row][:size])
            for row, size in enumerate(sizes)
        ]

    def observe(self, commits: Seq[Commit]) -> None:
        own: list[Commit] = []
        cells, hits = list[int](), list[bool]()
        for commit in commits:
            draft = self.drafts.pop(commit.sequence_id, None)
            if commit.nodes is None or draft is None:
                # A root alone is in any tree, and a copy of each commit would be most of the work.
                has_nodes = commit.nodes is not None and len(commit.nodes) > 1
                own.append(replace(commit, nodes=None) if has_nodes and not self._ready else commit)
            else:
                own += _translated(commit, self._follow(commit, draft, cells, hits))
        if cells:
            self._rates.observe(cells, hits)
        self.drafter.observe(own)

    def forget(self, sequence_ids: Seq[int]) -> None:
        for sequence_id in sequence_ids:
            self._offsets.pop(sequence_id, None)
            self.drafts.pop(sequence_id, None)
        self.drafter.forget(sequence_ids)

    def _follow(self, commit: Commit, draft: Draft, cells: list[int], hits: list[bool]) -> list[int]:
        """The nodes of its tree that the text went along, root first; notes for every child on the way whether it was right."""
        path, offset = [0], self._offsets[commit.sequence_id]
        for token in [*commit.token_ids[1:], commit.next_token]:
            children = draft.children(path[-1])
            if not children:
                break
            right = [node for node in children if draft.tokens[node] == token]
            cells += [draft.cells[node] for node in children]
            hits += [node in right for node in children]
            offset.observe(len(right) - sum(draft.edges[node] for node in children))
            if not right:
                break
            path += right
        return path[: len(commit.token_ids)]


def path_probs(parents: Seq[int], edges: Seq[float]) -> list[float]:
    """The product of `edges` along each node's path; 1 at the root."""
    probs = [1.0]
    for parent, edge in zip(parents[1:], edges[1:], strict=True):
        probs.append(probs[parent] * edge)
    return probs


def _depths(parents: list[int]) -> list[int]:
    """Edges from the root; 0 for padding."""
    depths = list[int]()
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def _translated(commit: Commit, path: list[int]) -> list[Commit]:
    """The commit with `path` as its nodes; tokens behind the path's end, which are nodes of others, come as a second one."""
    size = len(path)
    if size == len(commit.token_ids):
        return [replace(commit, nodes=path)]
    tokens, hidden = commit.token_ids, commit.hidden.items()
    drafted = Commit(
        commit.sequence_id,
        commit.start,
        tokens[:size],
        tokens[size],
        path,
        {layer: states[:size] for layer, states in hidden},
    )
    rest = Commit(
        commit.sequence_id,
        commit.start + size,
        tokens[size:],
        commit.next_token,
        None,
        {layer: states[size:] for layer, states in hidden},
    )
    return [drafted, rest]
