"""Several drafters, one tree: what each of them drafts, joined by common prefixes within one node budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Seq

from specdec.drafters.member import Draft, Member, ReadyMade, path_probs
from specdec.drafters.pruning import shallower
from specdec.interfaces import Commit, Drafter, Noise, PagedDrafter, TreePolicy
from specdec.model import PagedModel
from specdec.pages import PagePool
from specdec.sequence import Sequence
from specdec.tree import TokenTree

# Tokens, parents, and how likely each node is to be right where its parent is (root: NaN).
Joined = tuple[list[int], list[int], list[float]]


class UnionDrafter:
    """Joins the trees of `drafters`: equal paths become one, and of all nodes the policy's `max_nodes` likeliest are kept.

    A node's probability is the product along its path of how often such nodes turned out right, counted online per drafter
    by depth, confidence and request; a node of several drafters has the largest. Where the policy's trees are chains, the
    path of the longest expected acceptance is kept. Drafters are asked in the order given: once one expects `enough` of the
    levels that a tree may have to be accepted (above 1: never), those behind it are spared in that row and step, so the
    cheap ones go first. What they miss they catch up with.

    Only FIXED trees are joined: these may be merged and pruned freely under every rule that accepts them, whereas the rules
    for drawn nodes need to know how each was drawn, and that it was not dropped afterwards. Raises ValueError for a policy
    that draws, for no drafters, and where they do not fit the target.
    """

    def __init__(self, drafters: Seq[Drafter], enough: float = 0.8) -> None:
        if not drafters:
            raise ValueError("drafters is empty: a union needs at least one drafter")
        if not enough > 0:
            raise ValueError(f"enough={enough} must be > 0: a share of a tree's levels")
        self.members, self._enough = [Member(one) for one in drafters], enough
        self._num_ready = len([*itertools.takewhile(lambda one: isinstance(one, ReadyMade), drafters)])
        self.feature_layers: tuple[int, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether `look` tells all there is: no drafter needs a model."""
        return self._num_ready == len(self.members)

    @property
    def covers_unasked(self) -> bool:
        return all(one.covers_unasked for one in self.drafters)

    @property
    def drafters(self) -> list[PagedDrafter]:
        return [member.drafter for member in self.members]

    def bind(self, target: PagedModel, pool: PagePool) -> None:
        self._vocab_size, self._device = target.vocab_size, target.device
        for member in self.members:
            member.bind(target, pool)
        self.feature_layers = tuple(sorted({layer for one in self.drafters for layer in one.feature_layers}))

    def observe(self, commits: Seq[Commit]) -> None:
        for member in self.members:
            member.observe(commits)

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
        drafts: list[list[Draft]] = [[] for _ in sequences]
        limits = [min(policy.max_depth, one.max_draft_depth) for one in sequences]
        self._ask(self.members, sequences, drafts, limits, policy, noise)
        return self.tree(self.join(sequences, drafts, policy))

    def look(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise, least: float = 0.0) -> list[list[Draft]]:
        """What the first drafters, those that need no model, have for each sequence: an answer that costs next to nothing,
        from which it may be seen whether to ask the others. Of sequences where a drafter's first guess is less than `least`
        likely to be right, it has nothing."""
        check_policy(policy)
        drafts: list[list[Draft]] = [[] for _ in sequences]
        for member in self.members[: self._num_ready]:
            rows = [row for row, one in enumerate(sequences) if least <= 0 or member.surest(one) >= least]
            if rows:
                asked = [sequences[row] for row in rows]
                for row, draft in zip(rows, member.propose(asked, policy, noise), strict=True):
                    drafts[row].append(draft)
        return drafts

    def complete(
        self, sequences: Seq[Sequence], drafts: list[list[Draft]], depths: Seq[int], policy: TreePolicy, noise: Noise
    ) -> None:
        """Adds to what `look` has found what the other drafters have, down to `depths`."""
        self._ask(self.members[self._num_ready :], sequences, drafts, depths, policy, noise)

    def join(self, sequences: Seq[Sequence], drafts: Seq[Seq[Draft]], policy: TreePolicy) -> list[Joined]:
        """One tree for each sequence of what there is."""
        return [
            joined(one.root, found, policy.max_nodes, policy.spec.is_chain)
            for one, found in zip(sequences, drafts, strict=True)
        ]

    def tree(self, rows: Seq[Joined]) -> TokenTree:
        trees = [(tokens, parents) for tokens, parents, _ in rows]
        return TokenTree.from_lists(trees, self._vocab_size, [edges for _, _, edges in rows], self._device)

    def _ask(
        self,
        members: Seq[Member],
        sequences: Seq[Sequence],
        drafts: list[list[Draft]],
        depths: Seq[int],
        policy: TreePolicy,
        noise: Noise,
    ) -> None:
        check_policy(policy)
        wanted = list(depths)
        for member in members:
            if not any(wanted):
                break
            for row, draft in enumerate(member.propose(sequences, shallower(policy, wanted), noise)):
                drafts[row].append(draft)
            wanted = [
                0 if not limit or found[-1].expected >= self._enough * limit else limit
                for limit, found in zip(wanted, drafts, strict=True)
            ]

    def covered(self, sequence_id: int) -> int:
        return min(one.covered(sequence_id) for one in self.drafters)

    def note(self, sequence_id: int, end: int) -> tuple[object, ...]:
        return tuple(one.note(sequence_id, end) for one in self.drafters)

    def adopt(self, sequence: Sequence, num_positions: int, notes: Seq[tuple[object, ...]]) -> None:
        for one, own in zip(self.drafters, zip(*notes, strict=True), strict=True):
            one.adopt(sequence, num_positions, own)

    def num_unread(self, sequence: Sequence) -> int:
        return max(one.num_unread(sequence) for one in self.drafters)

    def forget(self, sequence_ids: Seq[int]) -> None:
        for member in self.members:
            member.forget(sequence_ids)


def check_policy(policy: TreePolicy) -> None:
    """Raises ValueError for a policy whose trees cannot be joined."""
    if policy.spec.is_sampled:
        raise ValueError(
            f"drafter union joins trees without chance, and {type(policy).__name__} draws nodes: "
            f"use a policy top_k, static or coupled, or one drafter alone"
        )


def join(first: Drafter, second: Drafter, enough: float) -> UnionDrafter:
    """A union of two, as configs name them."""
    return UnionDrafter([first, second], enough)


def joined(root: int, drafts: Seq[Draft], max_nodes: int, is_chain: bool = False) -> Joined:
    """Tokens, parents and probabilities behind the parent (root: NaN) of one tree from several, the likeliest nodes first;
    of equally likely ones those of the earlier drafter."""
    drafts = [draft for draft in drafts if len(draft.tokens) > 1]
    if not drafts:
        return [root], [-1], [math.nan]
    if len(drafts) == 1 and len(drafts[0].tokens) <= max_nodes and not is_chain:
        return drafts[0].tokens, drafts[0].parents, [math.nan, *drafts[0].edges[1:]]
    tokens, parents, edges = [root], [-1], [math.nan]
    child_of: dict[tuple[int, int], int] = {}
    for draft in drafts:
        # Where each node of this drafter's has its place among those of all.
        place = [0]
        for token, parent, edge in zip(draft.tokens[1:], draft.parents[1:], draft.edges[1:], strict=True):
            above = place[parent]
            node = child_of.get((above, token))
            if node is None:
                node = child_of[above, token] = len(tokens)
                tokens.append(token)
                parents.append(above)
                edges.append(edge)
            elif edge > edges[node]:
                edges[node] = edge
            place.append(node)
    probs = path_probs(parents, edges)
    if is_chain:
        kept = _best_path(parents, probs)
    else:
        # A child is at most as likely as its parent and stands behind it, so a stable sort keeps it with its parent.
        kept = [0, *sorted(range(1, len(tokens)), key=probs.__getitem__, reverse=True)[: max_nodes - 1]]
    return part((tokens, parents, edges), kept)


def part(tree: Joined, kept: Seq[int]) -> Joined:
    """The tree of the `kept` nodes, the root first and parents before their children."""
    tokens, parents, edges = tree
    number = {node: i for i, node in enumerate(kept)}
    kept_parents = [-1, *(number[parents[node]] for node in kept[1:])]
    return [tokens[node] for node in kept], kept_parents, [edges[node] for node in kept]


def _best_path(parents: list[int], probs: list[float]) -> list[int]:
    """The nodes of the path with the longest expected acceptance, root first."""
    expected = [0.0]
    for parent, prob in zip(parents[1:], probs[1:], strict=True):
        expected.append(expected[parent] + prob)
    path = [expected.index(max(expected))]
    while path[-1]:
        path.append(parents[path[-1]])
    return path[::-1]
