"""What drafts promise each request, learned from what became of those before: for FIXED trees, and for drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specdec.acceptance_stats import DrawRates, NodeRates, Offset, geometric, shifted
from specdec.drafters.sampled import Sampled
from specdec.interfaces import TreePolicy
from specdec.tree import DrawKind, TokenTree, TreeSpec


@dataclass
class RequestRecord:
    """What is known of one request: its offset, its drafts' profile (per depth: how often seen, and by price the nodes worth
    that much, as counts and as accepted tokens), and how many tokens it had when it was last drafted for."""

    offset: Offset = field(default_factory=Offset)
    seen_D: Tensor | None = None
    profile_2DP: Tensor | None = None
    drafted_len: int = 0


class Outlook(Protocol):
    """`policies[o]` is what option o grows, at `price_O[o]` per node; `can_prune`: nodes may go once they are drafted."""

    policies: list[TreePolicy]
    price_O: Tensor
    can_prune: bool

    def promise(self, records: Seq[RequestRecord]) -> tuple[Tensor, Tensor]:
        """Expected accepted tokens and nodes to verify, [B, D + 1, O]: depth d under option o."""
        ...

    def probs(self, tree: TokenTree, records: Seq[RequestRecord]) -> Tensor:
        """How likely each node [B, N] of a freshly drafted FIXED tree is to be accepted; 0 at roots and padding."""
        ...

    def learn(
        self,
        tree: TokenTree,
        records: Seq[RequestRecord],
        depths: Seq[int],
        option: int,
        emitted: Seq[Seq[int]],
        accepted: Seq[int],
    ) -> None:
        """A tree as it was drafted, to `depths` at most under `option`; the tokens that its rows then emitted, `accepted` of
        them from the tree."""
        ...


class FixedOutlook:
    """Trees whose every node is FIXED: drafted whole, then pruned to what is worth verifying.

    A node is accepted with the product of its path's rates. What the next draft will be like is taken from the request's last
    ones: a histogram per depth of how likely their nodes were, mixed with that of all requests while it is new.
    """

    can_prune = True
    _NEW, _OWN, _ALL = 2.0, 0.15, 0.02

    def __init__(self, policy: TreePolicy) -> None:
        self.rates = NodeRates()
        self.price_O = geometric(1.0, 0.005, 18)
        self.policies = [policy] * len(self.price_O)
        shape = (policy.max_depth, len(self.price_O))
        # One node per depth, right three times of five, until something has been seen.
        self._seen_D = torch.ones(policy.max_depth, dtype=torch.float64)
        self._profile_2DP = torch.zeros(2, *shape, dtype=torch.float64)
        for depth in range(policy.max_depth):
            prob = torch.tensor(0.6 ** (depth + 1), dtype=torch.float64)
            at = int(self._price_below(prob))
            if at < len(self.price_O):
                self._profile_2DP[:, depth, at] = torch.stack([torch.ones_like(prob), prob])

    def promise(self, records: Seq[RequestRecord]) -> tuple[Tensor, Tensor]:
        seen_BD = torch.stack([self._own(one)[0] for one in records])
        own_B2DP = torch.stack([self._own(one)[1] for one in records])
        before = torch.ones(len(records), dtype=torch.float64)
        blended = []
        for depth in range(len(self._seen_D)):
            shared_2P = self._profile_2DP[:, depth]
            # A request that did better than others one level up is expected to do so here.
            prior_B2P = shared_2P * before[:, None, None].clamp(0, 2)
            weight = (seen_BD[:, depth] / (seen_BD[:, depth] + self._NEW))[:, None, None]
            level_B2P = weight * own_B2DP[:, :, depth] + (1 - weight) * prior_B2P
            before = level_B2P[:, 1].sum(1) / shared_2P[1].sum().clamp_min(1e-6)
            blended.append(level_B2P)
        totals_B2DP = torch.stack(blended, 2).cumsum(2).cumsum(3)
        nodes, gain = torch.nn.functional.pad(totals_B2DP, (0, 0, 1, 0)).unbind(1)
        return gain, nodes

    def probs(self, tree: TokenTree, records: Seq[RequestRecord]) -> Tensor:
        depth_BN, _, edge_BN = self._edges(tree, records)
        return _path_products(tree, edge_BN) * (depth_BN > 0)

    def learn(
        self,
        tree: TokenTree,
        records: Seq[RequestRecord],
        depths: Seq[int],
        option: int,
        emitted: Seq[Seq[int]],
        accepted: Seq[int],
    ) -> None:
        depth_BN, cells_BN, edge_BN = self._edges(tree, records)
        self._note_profile(depth_BN, _path_products(tree, edge_BN), records, depths)
        reached_BN, hit_BN = follow(tree, emitted)
        self.rates.observe(cells_BN[reached_BN], hit_BN[reached_BN])
        surprise_BN = torch.where(reached_BN, hit_BN.double() - edge_BN, 0.0)
        for record, row, depth_N, reached_N in zip(records, surprise_BN, depth_BN, reached_BN, strict=True):
            for depth in depth_N[reached_N].unique().tolist():
                record.offset.observe(float(row[depth_N == depth].sum()))

    def _own(self, record: RequestRecord) -> tuple[Tensor, Tensor]:
        if record.seen_D is None or record.profile_2DP is None:
            return torch.zeros_like(self._seen_D), torch.zeros_like(self._profile_2DP)
        return record.seen_D, record.profile_2DP

    def _edges(self, tree: TokenTree, records: Seq[RequestRecord]) -> tuple[Tensor, Tensor, Tensor]:
        """Depths, cells and rates behind the parent [B, N], the rates moved by the requests' offsets; on the CPU."""
        depth_BN, parents_BN = tree.depth_BN.cpu(), tree.parents_BN.cpu()
        unknown = torch.full(depth_BN.shape, torch.nan)
        confidence_BN = unknown if tree.confidence_BN is None else tree.confidence_BN.cpu()
        cells_BN = self.rates.cells(depth_BN, confidence_BN, parents_BN)
        offsets_B = torch.tensor([one.offset.value for one in records], dtype=torch.float64)
        return depth_BN, cells_BN, shifted(self.rates.rates(cells_BN), offsets_B[:, None])

    def _price_below(self, probs: Tensor) -> Tensor:
        """The first price that is not above each probability."""
        return torch.searchsorted(-self.price_O, -probs.contiguous())

    def _note_profile(
        self, depth_BN: Tensor, probs_BN: Tensor, records: Seq[RequestRecord], depths: Seq[int]
    ) -> None:
        batch, levels, prices = len(records), len(self._seen_D), len(self.price_O)
        at_BN = self._price_below(probs_BN)
        counted = (depth_BN > 0) & (at_BN < prices)
        rows = torch.arange(batch)[:, None].expand_as(depth_BN)
        cell = ((rows * levels + depth_BN - 1) * prices + at_BN)[counted]
        new_2 = [
            torch.zeros(batch * levels * prices, dtype=torch.float64).index_add_(0, cell, values[counted])
            for values in (torch.ones_like(probs_BN), probs_BN)
        ]
        new_B2DP = torch.stack(new_2).view(2, batch, levels, prices).transpose(0, 1)
        drafted_BD = torch.arange(levels) < torch.tensor(list(depths))[:, None]
        seen_BD = torch.stack([self._own(one)[0] for one in records]) + drafted_BD
        own_B2DP = torch.stack([self._own(one)[1] for one in records])
        step_BD = torch.where(drafted_BD, (1 / seen_BD.clamp_min(1)).clamp_min(self._OWN), 0.0)
        own_B2DP = own_B2DP + step_BD[:, None, :, None] * (new_B2DP - own_B2DP)
        for record, seen_D, profile_2DP in zip(records, seen_BD, own_B2DP, strict=True):
            record.seen_D, record.profile_2DP = seen_D, profile_2DP
        num_D = drafted_BD.sum(0).double()
        mean_2DP = (new_B2DP * drafted_BD[:, None, :, None]).sum(0) / num_D.clamp_min(1)[:, None]
        self._seen_D = self._seen_D + num_D
        step_D = (num_D / self._seen_D).clamp_min(self._ALL) * (num_D > 0)
        self._profile_2DP = self._profile_2DP + step_D[:, None] * (mean_2DP - self._profile_2DP)


class DrawnOutlook:
    """Trees with drawn nodes: how deep and how wide they are is settled before anything is drawn, and nothing goes afterwards.

    Narrower policies that the rule `accepts` are options too.
    """

    can_prune = False

    def __init__(self, policy: TreePolicy, accepts: Callable[[TreeSpec], str | None]) -> None:
        self._depth = policy.max_depth
        variants: list[TreePolicy] = [policy]
        if isinstance(policy, Sampled):
            narrower = [policy.narrowed(width) for width in range(1, max(policy.branching))]
            variants = [*(one for one in narrower if accepts(one.spec) is None), policy]
        widths = [one.branching if isinstance(one, Sampled) else [1] * self._depth for one in variants]
        self._widths_DV = torch.tensor(widths).T
        if isinstance(policy, Sampled):
            nodes_DV = self._widths_DV.cumprod(0).cumsum(0).double()
        else:
            # Of a policy that only tells its largest tree, levels are taken to be alike.
            nodes_DV = torch.arange(1, self._depth + 1)[:, None] * (policy.max_nodes - 1) / self._depth
        prices = geometric(1.0, 0.005, 12)
        self.price_O = prices.repeat(len(variants))
        self.policies = [one for one in variants for _ in prices]
        self._variant_O = torch.arange(len(variants)).repeat_interleave(len(prices))
        self._nodes_DO = torch.nn.functional.pad(nodes_DV, (0, 0, 1, 0))[:, self._variant_O]
        self.rates = DrawRates(self._depth, int(self._widths_DV.max()))

    def promise(self, records: Seq[RequestRecord]) -> tuple[Tensor, Tensor]:
        rates_DV = self.rates.rates().gather(1, self._widths_DV)
        offsets_B = torch.tensor([one.offset.value for one in records], dtype=torch.float64)
        gain_BDV = shifted(rates_DV, offsets_B[:, None, None]).cumprod(1).cumsum(1)
        gain_BDO = torch.nn.functional.pad(gain_BDV, (0, 0, 1, 0))[..., self._variant_O]
        return gain_BDO, self._nodes_DO.expand_as(gain_BDO)

    def probs(self, tree: TokenTree, records: Seq[RequestRecord]) -> Tensor:
        raise AssertionError("drawn nodes are never pruned")

    def learn(
        self,
        tree: TokenTree,
        records: Seq[RequestRecord],
        depths: Seq[int],
        option: int,
        emitted: Seq[Seq[int]],
        accepted: Seq[int],
    ) -> None:
        widths = self._widths_DV[:, self._variant_O[option]].tolist()
        expected_D = self.rates.rates()[torch.arange(self._depth), widths]
        for record, depth, count in zip(records, depths, accepted, strict=True):
            for level in range(min(depth, count + 1)):
                prob = float(shifted(expected_D[level], torch.tensor(record.offset.value, dtype=torch.float64)))
                record.offset.observe(float(level < count) - prob)
                self.rates.observe(level, widths[level], 1, float(level < count))


def outlook_for(policy: TreePolicy, accepts: Callable[[TreeSpec], str | None]) -> Outlook:
    """What fits the policy's trees."""
    if policy.spec.kinds <= {DrawKind.FIXED}:
        return FixedOutlook(policy)
    return DrawnOutlook(policy, accepts)


def follow(tree: TokenTree, emitted: Seq[Seq[int]]) -> tuple[Tensor, Tensor]:
    """Which nodes [B, N] had an emitted path for parent, and which of them the text went on with; on the CPU.

    Nodes that were pruned before they were verified are told too: every token emitted behind a node says which child of it
    would have been right.
    """
    tokens_BN, parents_BN, is_node_BN = tree.tokens_BN.cpu(), tree.parents_BN.cpu(), tree.is_node_BN.cpu()
    longest = max(map(len, emitted), default=0)
    emitted_BT = torch.tensor([[*one, *[-1] * (longest - len(one))] for one in emitted], dtype=torch.int64)
    reached_BN, hit_BN = torch.zeros(2, *tokens_BN.shape, dtype=torch.bool)
    at_B = torch.zeros(len(tokens_BN), dtype=torch.int64)
    for token_B in emitted_BT.unbind(1):
        children_BN = is_node_BN & (parents_BN == at_B[:, None]) & (at_B >= 0)[:, None] & (token_B >= 0)[:, None]
        taken_BN = children_BN & (tokens_BN == token_B[:, None])
        reached_BN, hit_BN = reached_BN | children_BN, hit_BN | taken_BN
        at_B = torch.where(taken_BN.any(1), taken_BN.int().argmax(1), -1)
        if not bool((at_B >= 0).any()):
            break
    return reached_BN, hit_BN


def _path_products(tree: TokenTree, edge_BN: Tensor) -> Tensor:
    """The product of `edge_BN` along each node's path, the root's 1; padding is 0."""
    product_BN = torch.zeros_like(edge_BN)
    product_BN[:, 0] = 1.0
    parents_BN, depth_BN = tree.parents_BN.cpu().clamp_min(0), tree.depth_BN.cpu()
    for depth in range(1, int(depth_BN.max()) + 1):
        product_BN = torch.where(depth_BN == depth, product_BN.gather(1, parents_BN) * edge_BN, product_BN)
    return product_BN
