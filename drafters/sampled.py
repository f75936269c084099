"""Tree policies that draw: every node has a set number of children, some of them sampled from the draft law."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from specdec.drafters.growth import DraftRound, Grown, Static
from specdec.interfaces import Noise
from specdec.noise import RoundKey
from specdec.tree import DrawKind, TokenTree, TreeSpec


class Sampled:
    """`branching[d]` children for every node at depth d, drawn from the draft law: i.i.d. as in SpecInfer (Miao et al.
    2023, section 4.1; a token drawn twice is one node with two draws) or without replacement as in RSD (Jeon et al. 2024,
    section 3.2.1)."""

    def __init__(self, branching: Seq[int], kind: str = "iid") -> None:
        kinds = {"iid": DrawKind.IID, "without_replacement": DrawKind.WITHOUT_REPLACEMENT}
        if kind not in kinds:
            raise ValueError(f"kind={kind!r} is not a way to draw; choose one of {', '.join(kinds)}")
        self._setup(branching, num_fixed=[0] * len(branching), kind=kinds[kind])

    def _setup(self, branching: Seq[int], num_fixed: Seq[int], kind: DrawKind) -> None:
        if not branching or min(branching) < 1:
            raise ValueError(f"branching={list(branching)} must list at least one depth, each with at least one child")
        self._branching, self._num_fixed, self._kind = list(branching), list(num_fixed), kind
        # A slot is a possible node: slot 0 is the root, then level by level, children of one node side by side.
        self._widths = [1, *(math.prod(branching[: d + 1]) for d in range(len(branching)))]
        self.max_depth = len(branching)
        self.max_nodes = sum(self._widths)
        self.max_expanded = sum(self._widths[:-1])
        kinds = {kind} if any(f < b for f, b in zip(num_fixed, branching, strict=True)) else set()
        kinds |= {DrawKind.FIXED} if any(num_fixed) else set()
        self.spec = TreeSpec(frozenset(kinds), is_chain=max(branching) == 1)

    @property
    def branching(self) -> list[int]:
        """Children of a node at each depth."""
        return list(self._branching)

    def narrowed(self, width: int) -> Sampled:
        """The same way to draw with at most `width` children anywhere, the FIXED ones given up first."""
        if width < 1:
            raise ValueError(f"width={width}: a tree needs at least one child per node")
        narrow = copy.copy(self)
        branching = [min(children, width) for children in self._branching]
        cut = [before - after for before, after in zip(self._branching, branching, strict=True)]
        fixed = [max(f - c, 0) for f, c in zip(self._num_fixed, cut, strict=True)]
        narrow._setup(branching, fixed, self._kind)
        return narrow

    def admits(self, ranks: tuple[int, ...], num_nodes: int) -> bool:
        return len(ranks) <= self.max_depth and all(r < b for r, b in zip(ranks, self._branching, strict=False))

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        """Draws level by level; whether a child exists is settled by the limits and the draft law before it is drawn."""
        slots = _Slots(draft, self.max_depth)
        following, first = draft.expand_root(), 0
        for depth in range(min(self.max_depth, max(draft.limits))):
            width, children = self._widths[depth], self._branching[depth]
            laws_BWV = following.laws(slots.paths(first, width))
            live_BW = (
                slots.alive_BS[:, first : first + width] & (slots.limits[:, None] > depth) & (laws_BWV.sum(-1) > 0)
            )
            self._draw_level(slots, laws_BWV, live_BW, first, depth, noise)
            first += width
            if depth + 1 < min(self.max_depth, max(draft.limits)):
                level = slice(first, first + width * children)
                following = draft.expand(slots.tokens_BS[:, level], slots.parents_BS[:, level], depth + 1)
        return slots.compact(draft.vocab_size, expanded_slots=first)

    def _draw_level(
        self, slots: _Slots, laws_BWV: Tensor, live_BW: Tensor, first: int, depth: int, noise: Noise
    ) -> None:
        """Draws the children of the level's W nodes: sampled ones first, then the likeliest others as FIXED."""
        width, vocab = laws_BWV.shape[1:]
        num_fixed = self._num_fixed[depth]
        num_sampled = self._branching[depth] - num_fixed
        base = first + width
        tokens: list[Tensor] = []
        exists: list[Tensor] = []
        reached: list[Tensor] = []
        kinds: list[DrawKind] = []
        fixed_BWf = laws_BWV.topk(min(num_fixed, vocab), -1).indices
        if num_fixed and num_sampled:
            # The law that is sampled has the FIXED siblings removed, so that siblings differ and the rule can undo it.
            rest = laws_BWV.scatter(2, fixed_BWf, 0.0)
            total = rest.sum(-1, keepdim=True)
            laws = torch.where(total > 0, rest / total.clamp_min(torch.finfo(rest.dtype).tiny), rest)
        else:
            laws = laws_BWV
        remaining = laws
        for j in range(num_sampled):
            can = live_BW & (remaining.sum(-1) > 0)
            rows, nodes = can.nonzero(as_tuple=True)
            slot = base + nodes * self._branching[depth] + j
            drawn = noise.categorical(remaining[rows, nodes], RoundKey("draft", slot), rows)
            token = torch.zeros_like(live_BW, dtype=torch.int64).index_put((rows, nodes), drawn)
            twin = torch.full_like(token, j)
            for earlier in range(j - 1, -1, -1):
                twin = torch.where(can & exists[earlier] & (tokens[earlier] == token), reached[earlier], twin)
            tokens.append(token)
            exists.append(can)
            reached.append(twin)
            kinds.append(self._kind)
            if self._kind is DrawKind.WITHOUT_REPLACEMENT and j + 1 < num_sampled:
                remaining = remaining.scatter(2, token[..., None], 0.0)
                total = remaining.sum(-1, keepdim=True)
                remaining = torch.where(total > 0, remaining / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
        for j in range(num_fixed):
            # Where the vocabulary is smaller than that, the last places stay empty.
            token = fixed_BWf[..., min(j, vocab - 1)]
            tokens.append(token)
            exists.append(live_BW & (laws_BWV.gather(2, token[..., None]).squeeze(2) > 0) & (j < vocab))
            reached.append(torch.full_like(token, num_sampled + j))
            kinds.append(DrawKind.FIXED)
        slots.add_level(first, torch.stack(tokens, 2), torch.stack(exists, 2), torch.stack(reached, 2), kinds)
        if num_sampled:
            slots.laws.append(laws)


class Mixed(Sampled):
    """`branching[d]` children for every node at depth d: one sampled child, tested first, and the likeliest others FIXED."""

    def __init__(self, branching: Seq[int]) -> None:
        self._setup(branching, num_fixed=[children - 1 for children in branching], kind=DrawKind.IID)


def chain(depth: int, kind: str = "fixed") -> Static | Sampled:
    """The policy of one path of `depth` tokens: the likeliest at each step (`fixed`) or a sample of the draft law (`iid`)."""
    if depth < 1:
        raise ValueError(f"depth={depth}: a chain needs at least one drafted token")
    return Static([[0] * (d + 1) for d in range(depth)]) if kind == "fixed" else Sampled([1] * depth, kind)


class _Slots:
    """All possible nodes of the trees while they grow: which exist, what they carry, and which draw reached which."""

    def __init__(self, draft: DraftRound, depth: int) -> None:
        roots = draft.roots_B[:, None]
        self.limits = torch.tensor(draft.limits, device=roots.device)
        self.tokens_BS, self.parents_BS = roots, torch.full_like(roots, -1)
        self.alive_BS = torch.ones_like(roots, dtype=torch.bool)
        self.draws_BM, self.kinds_BM = roots.new_zeros(len(roots), 0), roots.new_zeros(len(roots), 0)
        self.paths_BSK = roots.new_full((*roots.shape, depth), -1)
        self.laws: list[Tensor] = []

    def paths(self, first: int, width: int) -> Tensor:
        return self.paths_BSK[:, first : first + width]

    def add_level(self, first: int, tokens: Tensor, exists: Tensor, reached: Tensor, kinds: list[DrawKind]) -> None:
        """Appends [B, W, b] children of the W slots from `first`; `reached` is the sibling a draw landed on."""
        width, children = tokens.shape[1:]
        base = first + width
        own = torch.arange(width * children, device=tokens.device).view(width, children)
        parents = (first + own // children).expand_as(tokens)
        draws = torch.where(exists, base + own - own % children + reached, -1)
        alive = exists & (reached == own % children)
        paths = self.paths_BSK[:, first:base].repeat_interleave(children, 1)
        depth = int((paths[0, 0] >= 0).sum()) if first else 0
        paths = paths.index_copy(2, torch.tensor([depth], device=paths.device), tokens.flatten(1)[..., None])
        self.tokens_BS = torch.cat([self.tokens_BS, tokens.flatten(1)], 1)
        self.parents_BS = torch.cat([self.parents_BS, parents.flatten(1)], 1)
        self.alive_BS = torch.cat([self.alive_BS, alive.flatten(1)], 1)
        self.draws_BM = torch.cat([self.draws_BM, draws.flatten(1)], 1)
        self.kinds_BM = torch.cat(
            [self.kinds_BM, torch.tensor(kinds, device=own.device).expand_as(tokens).flatten(1)], 1
        )
        self.paths_BSK = torch.cat([self.paths_BSK, paths], 1)

    def compact(self, vocab_size: int, expanded_slots: int) -> Grown:
        """The trees without the slots that never came to be."""
        index = torch.where(self.alive_BS, self.alive_BS.cumsum(1) - 1, -1)
        count_B = self.alive_BS.sum(1)
        order, inside = _pack(self.alive_BS, int(count_B.max()))
        parents = self.parents_BS.gather(1, order)
        parents = torch.where(parents >= 0, index.gather(1, parents.clamp_min(0)), -1)
        draw_order, drawn = _pack(
            self.draws_BM >= 0, int((self.draws_BM >= 0).sum(1).max()) if self.draws_BM.numel() else 0
        )
        draws = self.draws_BM.gather(1, draw_order)
        laws = None
        if self.laws:
            by_slot = torch.cat(self.laws, 1)
            has_law = inside & (order < by_slot.shape[1])
            rows = torch.arange(len(order), device=order.device)[:, None]
            laws = by_slot[rows, order.clamp_max(by_slot.shape[1] - 1)] * has_law[..., None]
        tree = TokenTree(
            torch.where(inside, self.tokens_BS.gather(1, order), 0),
            torch.where(inside, parents, -1),
            count_B,
            torch.where(drawn, index.gather(1, draws.clamp_min(0)), -1),
            torch.where(drawn, self.kinds_BM.gather(1, draw_order), DrawKind.FIXED),
            laws,
            vocab_size=vocab_size,
        )
        return Grown.within(self.limits, tree, torch.where(order < expanded_slots, order, -1))


def _pack(keep_BS: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices [B, width] of the kept entries in order, and which of them are real."""
    order = keep_BS.logical_not().sort(dim=1, stable=True).indices[:, :width]
    return order, keep_BS.gather(1, order)
