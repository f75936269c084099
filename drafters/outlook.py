"""What drafts promise each request, learned from what became of those before: for FIXED trees, and for drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.acceptance_stats import CONFIDENT, DrawRates, Ints, NodeRates, Offset, shifted
from specdec.cost import Array
from specdec.drafters.sampled import Sampled
from specdec.interfaces import TreePolicy
from specdec.tree import DrawKind, TokenTree, TreeSpec


@dataclass
class RequestRecord:
    """What is known of one request: its offset, its drafts' profile (per depth: how often seen, and by price the nodes worth
    that much, as counts and as accepted tokens), and how many tokens it had when it was last drafted for."""

    offset: Offset
    seen_D: Array | None = None
    profile_2DP: Array | None = None
    drafted_len: int = 0


@dataclass(frozen=True)
class Scores:
    """Freshly drafted FIXED trees on the host: tokens, parents and depths (-1: padding) of the nodes [B, N], how likely each is
    behind its parent, and how likely it is to be accepted (0 at roots and padding); where each is counted (None: whoever
    drafted them counts for himself)."""

    tokens_BN: Ints
    parents_BN: Ints
    depth_BN: Ints
    edge_BN: Array
    probs_BN: Array
    cells_BN: Ints | None = None

    @staticmethod
    def of_lists(rows: Seq[tuple[list[int], list[int], list[float]]]) -> Scores:
        """Of ragged lists of tokens, parents and likelihoods behind the parent."""
        width = max(len(tokens) for tokens, _, _ in rows)
        shape = (len(rows), width)
        tokens_BN, parents_BN, depth_BN = (np.full(shape, -1) for _ in range(3))
        edge_BN, probs_BN = np.zeros((2, *shape))
        for row, (tokens, parents, edges) in enumerate(rows):
            size, depths, probs = len(tokens), [0], [1.0]
            for parent, edge in zip(parents[1:], edges[1:], strict=True):
                depths.append(depths[parent] + 1)
                probs.append(probs[parent] * edge)
            probs[0] = 0.0
            tokens_BN[row, :size], parents_BN[row, :size], depth_BN[row, :size] = tokens, parents, depths
            edge_BN[row, :size], probs_BN[row, :size] = edges, probs
        return Scores(tokens_BN, parents_BN, depth_BN, edge_BN, probs_BN)


@dataclass(frozen=True)
class Outcome:
    """What became of a row: to which depth it was drafted at most, the tokens it then emitted, and how many of them were
    drafted nodes."""

    depth: int
    emitted: Seq[int]
    num_accepted: int


class Outlook(Protocol):
    """`policies[o]` is what option o grows."""

    policies: list[TreePolicy]

    def record(self) -> RequestRecord:
        """Of a request of which nothing is known yet."""
        ...

    def promise(self, records: Seq[RequestRecord], ready: Scores | None = None) -> tuple[Array, Array]:
        """Expected accepted tokens and nodes to verify, [B, D + 1, O]: depth d under option o; `ready` are trees that are there
        whatever is drafted."""
        ...

    def score(self, tree: TokenTree, records: Seq[RequestRecord]) -> Scores | None:
        """How good the drafted nodes are; None where it makes no difference, for drawn nodes stay."""
        ...

    def learn(self, scores: Scores | None, records: Seq[RequestRecord], option: int, outcomes: Seq[Outcome]) -> None:
        """What became of each row, its tree as it was scored; rows of depth 0 tell nothing."""
        ...


class FixedOutlook:
    """Trees whose every node is FIXED: drafted whole, then pruned to what is worth verifying.

    A node is accepted with the product of its path's rates. What the next draft will be like is taken from the request's last
    ones: a histogram per depth of how likely their nodes were, mixed with that of all requests while it is new. Option o keeps
    the nodes that are worth its price.
    """

    _NEW, _OWN, _ALL = 2.0, 0.15, 0.02

    def __init__(self, policy: TreePolicy) -> None:
        self.rates = NodeRates()
        self._price_O = np.geomspace(1.0, 0.005, 18)
        self.policies = [policy] * len(self._price_O)
        # One node per depth, right three times of five, until something has been seen.
        self._seen_D = np.ones(policy.max_depth)
        self._profile_2DP = np.zeros((2, policy.max_depth, len(self._price_O)))
        probs: Array = np.full(policy.max_depth, 0.6).cumprod()
        at = self._price_below(probs)
        for depth in range(int((at < len(self._price_O)).sum())):
            self._profile_2DP[:, depth, at[depth]] = 1.0, probs[depth]

    def record(self) -> RequestRecord:
        return RequestRecord(Offset(CONFIDENT))

    def promise(self, records: Seq[RequestRecord], ready: Scores | None = None) -> tuple[Array, Array]:
        seen_BD, own_B2DP = self._own(records)
        weight_BD = seen_BD / (seen_BD + self._NEW)
        shared_D = np.maximum(self._profile_2DP[1].sum(1), 1e-6)
        own_BD = own_B2DP[:, 1].sum(2)
        prior_BD = np.array(
            [self._prior(*row) for row in zip(weight_BD.tolist(), (own_BD / shared_D).tolist(), strict=True)]
        )
        totals = weight_BD[:, None, :, None] * own_B2DP + prior_BD[:, None, :, None] * self._profile_2DP
        nodes, gain = np.moveaxis(_from_nothing(totals.cumsum(3).cumsum(2), 2), 1, 0)
        if ready is not None:
            # Drafters often agree, so what is there counts where it is the better part, and never on top.
            ready_gain, ready_nodes = (one[:, None] for one in self._worth(ready))
            nodes = np.where(gain > ready_gain, nodes, ready_nodes)
            gain = np.maximum(gain, ready_gain)
        return gain, nodes

    def score(self, tree: TokenTree, records: Seq[RequestRecord]) -> Scores:
        tree = tree.on_cpu
        tokens_BN, parents_BN, depth_BN = tree.tokens_BN.numpy(), tree.shape.parents_BN, tree.shape.depth_BN
        confidence_BN = None if tree.confidence_BN is None else tree.confidence_BN.numpy()
        cells_BN = self.rates.cells(depth_BN, confidence_BN, parents_BN)
        offsets_B = np.array([one.offset.value for one in records])
        edge_BN = shifted(self.rates.rates(cells_BN), offsets_B[:, None])
        return Scores(tokens_BN, parents_BN, depth_BN, edge_BN, _accepted(parents_BN, depth_BN, edge_BN), cells_BN)

    def learn(self, scores: Scores | None, records: Seq[RequestRecord], option: int, outcomes: Seq[Outcome]) -> None:
        assert scores is not None
        self._note_profile(scores, records, [one.depth for one in outcomes])
        if scores.cells_BN is None:
            return
        reached_BN, hit_BN = follow(scores, [one.emitted if one.depth else () for one in outcomes])
        self.rates.observe(scores.cells_BN[reached_BN].tolist(), hit_BN[reached_BN].tolist())
        surprise_BN = (hit_BN - scores.edge_BN) * reached_BN
        depths_BN = scores.depth_BN * reached_BN
        for depth in range(1, int(depths_BN.max()) + 1):
            at_BN = depths_BN == depth
            for row in at_BN.any(1).nonzero()[0]:
                records[row].offset.observe(float(surprise_BN[row][at_BN[row]].sum()))

    def _worth(self, scores: Scores) -> tuple[Array, Array]:
        """Accepted tokens and nodes [B, O] that such trees promise under each option."""
        is_kept_BNO = scores.probs_BN[..., None] >= self._price_O
        return (scores.probs_BN[..., None] * is_kept_BNO).sum(1), is_kept_BNO.sum(1).astype(float)

    def _prior(self, weights: list[float], ratios: list[float]) -> list[float]:
        """How much of the profile of all requests is in what is expected of one, by depth: it is known for itself with these
        weights and did so much better there."""
        before, priors = 1.0, list[float]()
        for weight, ratio in zip(weights, ratios, strict=True):
            # A request that did better than others one level up is expected to do so here.
            priors.append((1 - weight) * min(before, 2.0))
            before = weight * ratio + priors[-1]
        return priors

    def _own(self, records: Seq[RequestRecord]) -> tuple[Array, Array]:
        none_D, none_2DP = np.zeros_like(self._seen_D), np.zeros_like(self._profile_2DP)
        seen = [none_D if one.seen_D is None else one.seen_D for one in records]
        return np.stack(seen), np.stack([none_2DP if one.profile_2DP is None else one.profile_2DP for one in records])

    def _price_below(self, probs: Array) -> Ints:
        """The first price that is not above each probability."""
        return np.searchsorted(-self._price_O, -probs)

    def _note_profile(self, scores: Scores, records: Seq[RequestRecord], depths: Seq[int]) -> None:
        batch, levels, prices = len(records), len(self._seen_D), len(self._price_O)
        at_BN = self._price_below(scores.probs_BN)
        counted = (scores.depth_BN > 0) & (scores.depth_BN <= levels) & (at_BN < prices)
        cell_BN = (np.arange(batch)[:, None] * levels + scores.depth_BN - 1) * prices + at_BN
        size, cell = batch * levels * prices, cell_BN[counted]
        count, gain = np.bincount(cell, minlength=size), np.bincount(cell, scores.probs_BN[counted], size)
        new_B2DP = np.stack([count, gain]).reshape(2, batch, levels, prices).swapaxes(0, 1)
        drafted_BD = np.arange(levels) < np.array(depths)[:, None]
        seen_BD, own_B2DP = self._own(records)
        seen_BD = seen_BD + drafted_BD
        step_BD = np.maximum(1 / np.maximum(seen_BD, 1), self._OWN) * drafted_BD
        own_B2DP = own_B2DP + step_BD[:, None, :, None] * (new_B2DP - own_B2DP)
        for record, seen_D, profile_2DP in zip(records, seen_BD, own_B2DP, strict=True):
            record.seen_D, record.profile_2DP = seen_D, profile_2DP
        num_D = drafted_BD.sum(0)
        mean_2DP = (new_B2DP * drafted_BD[:, None, :, None]).sum(0) / np.maximum(num_D, 1)[:, None]
        self._seen_D = self._seen_D + num_D
        step_D = np.maximum(num_D / self._seen_D, self._ALL) * (num_D > 0)
        self._profile_2DP += step_D[:, None] * (mean_2DP - self._profile_2DP)


class DrawnOutlook:
    """Trees with drawn nodes: how deep and how wide they are is settled before anything is drawn, and nothing goes afterwards.

    Narrower policies that the rule `accepts` are options too.
    """

    def __init__(self, policy: TreePolicy, accepts: Callable[[TreeSpec], str | None]) -> None:
        self._depth = policy.max_depth
        variants: list[TreePolicy] = [policy]
        if isinstance(policy, Sampled):
            narrower = [policy.narrowed(width) for width in range(1, max(policy.branching))]
            variants = [*(one for one in narrower if accepts(one.spec) is None), policy]
        widths = [one.branching if isinstance(one, Sampled) else [1] * self._depth for one in variants]
        self._widths_DV = np.array(widths).T
        if isinstance(policy, Sampled):
            nodes_DV = self._widths_DV.cumprod(0).cumsum(0).astype(float)
        else:
            # Of a policy that only tells its largest tree, levels are taken to be alike.
            nodes_DV = np.arange(1.0, self._depth + 1)[:, None] * (policy.max_nodes - 1) / self._depth
        self.policies = variants
        self._nodes_DV = _from_nothing(nodes_DV, 0)
        self.rates = DrawRates(self._depth, int(self._widths_DV.max()))

    def record(self) -> RequestRecord:
        return RequestRecord(Offset())

    def promise(self, records: Seq[RequestRecord], ready: Scores | None = None) -> tuple[Array, Array]:
        rates_DV = np.take_along_axis(self.rates.rates(), self._widths_DV, 1)
        offsets_B = np.array([one.offset.value for one in records])
        gain_BDV = shifted(rates_DV, offsets_B[:, None, None]).cumprod(1).cumsum(1)
        gain_BDV = _from_nothing(gain_BDV, 1)
        return gain_BDV, np.broadcast_to(self._nodes_DV, gain_BDV.shape)

    def score(self, tree: TokenTree, records: Seq[RequestRecord]) -> None:
        return None

    def learn(self, scores: Scores | None, records: Seq[RequestRecord], option: int, outcomes: Seq[Outcome]) -> None:
        widths = self._widths_DV[:, option].tolist()
        expected_D = self.rates.rates()[np.arange(self._depth), widths]
        for record, one in zip(records, outcomes, strict=True):
            for level in range(min(one.depth, one.num_accepted + 1)):
                is_hit = float(level < one.num_accepted)
                record.offset.observe(is_hit - float(shifted(expected_D[level], np.array(record.offset.value))))
                self.rates.observe(level, widths[level], 1, is_hit)


def outlook_for(policy: TreePolicy, accepts: Callable[[TreeSpec], str | None]) -> Outlook:
    """What fits the policy's trees."""
    if policy.spec.kinds <= {DrawKind.FIXED}:
        return FixedOutlook(policy)
    return DrawnOutlook(policy, accepts)


def follow(scores: Scores, emitted: Seq[Seq[int]]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which nodes [B, N] had the emitted tokens' path for parent, and which of them the text went on with.

    Nodes that were pruned before they were verified are told too: every token emitted behind a node says which child of it
    would have been right.
    """
    tokens_BN, parents_BN = scores.tokens_BN, scores.parents_BN
    reached_BN, hit_BN = np.zeros((2, *tokens_BN.shape), dtype=bool)
    at_B = np.where([len(one) > 0 for one in emitted], 0, -2)
    for step in range(max(map(len, emitted), default=0)):
        token_B = np.array([one[step] if step < len(one) else -1 for one in emitted])
        # -1 is the parent of the root and of padding, -2 of nobody.
        children_BN = parents_BN == np.where(token_B >= 0, at_B, -2)[:, None]
        taken_BN = children_BN & (tokens_BN == token_B[:, None])
        reached_BN |= children_BN
        hit_BN |= taken_BN
        at_B = np.where(taken_BN.any(1), taken_BN.argmax(1), -2)
        if (at_B < 0).all():
            break
    return reached_BN, hit_BN


def _accepted(parents_BN: Ints, depth_BN: Ints, edge_BN: Array) -> Array:
    """The product of `edge_BN` along each node's path; 0 at roots and padding."""
    product_BN = np.where(depth_BN == 0, 1.0, 0.0)
    above_BN = np.maximum(parents_BN, 0)
    for depth in range(1, int(depth_BN.max()) + 1):
        behind_BN = np.take_along_axis(product_BN, above_BN, 1) * edge_BN
        product_BN = np.where(depth_BN == depth, behind_BN, product_BN)
    return product_BN * (depth_BN > 0)


def _from_nothing(totals: Array, axis: int) -> Array:
    """Totals per depth with a zero for depth 0 in front."""
    first = np.zeros_like(np.take(totals, [0], axis))
    return np.concatenate([first, totals], axis)
