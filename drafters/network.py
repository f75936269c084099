"""What drafters that run a network have in common: from sequences and a policy to a tree, from logits to laws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeVar

import torch
from torch import Tensor, nn

from specdec.drafters.growth import DraftRound, GrowingPolicy, Grown
from specdec.int_tensor import int_tensor
from specdec.interfaces import Noise, TreePolicy
from specdec.model import PagedModel
from specdec.packing import can_pack, pack_linears
from specdec.sampling import BatchSampling, log_confidence
from specdec.sequence import Sequence, batch_sampling
from specdec.tree import TokenTree


class NetworkDrafter:
    """Base of the drafters whose trees any growing policy grows from a network's logits."""

    name: str
    vocab_size: int
    device: torch.device

    def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
        if not isinstance(policy, GrowingPolicy):
            raise ValueError(f"drafter {self.name} cannot follow the policy {type(policy).__name__}")
        limits = [max(min(policy.max_depth, one.max_draft_depth, self._limit(one)), 0) for one in sequences]
        if not any(limits):
            return TokenTree.roots(int_tensor([one.root for one in sequences]), self.vocab_size).to(self.device)
        grown = policy.grow(self._round(sequences, limits), noise)
        self._note(sequences, grown)
        return grown.tree

    def _limit(self, sequence: Sequence) -> int:
        """The deepest level that the network can draft behind this root; below 1 it drafts nothing."""
        raise NotImplementedError

    def _round(self, sequences: Seq[Sequence], limits: list[int]) -> DraftRound:
        raise NotImplementedError

    def _note(self, sequences: Seq[Sequence], grown: Grown) -> None:
        """Takes notice of the trees that were grown."""


class NetworkRound:
    """What every round of such a drafter knows: the roots, the limits, and how logits become laws."""

    def __init__(self, drafter: NetworkDrafter, sequences: Seq[Sequence], limits: list[int]) -> None:
        self.sequences, self.limits = sequences, limits
        self.device, self.vocab_size = drafter.device, drafter.vocab_size
        self.roots_B = int_tensor([one.root for one in sequences], self.device)
        self._sampling: BatchSampling | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the laws of nodes with equal logits may differ by the drafted tokens above them."""
        return any(one.params.has_penalties for one in self.sequences)

    def laws(self, logits_BWV: Tensor, paths_BWK: Tensor) -> Tensor:
        """Draft laws [B, W, V] under each request's own parameters."""
        if self._sampling is None:
            self._sampling = batch_sampling(self.sequences, self.vocab_size, self.device)
        batch, width, vocab = logits_BWV.shape
        rows = torch.arange(batch, device=self.device).repeat_interleave(width)
        probs = self._sampling.probabilities(logits_BWV.reshape(-1, vocab), rows, paths_BWK.flatten(0, 1))
        return probs.view(batch, width, vocab)


class NextLogits:
    """Next-token logits of W nodes per sequence, as scores for confidence trees or as laws to draw from.

    `logits_BWR` are over the target's vocabulary, or over the part of it that `ids_R` names.
    """

    def __init__(self, draft: NetworkRound, logits_BWR: Tensor, ids_R: Tensor | None = None) -> None:
        self._draft, self._logits_BWR, self._ids_R = draft, logits_BWR, ids_R

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        best = log_confidence(self._logits_BWR).topk(min(k, self._logits_BWR.shape[-1]))
        tokens = best.indices if self._ids_R is None else self._ids_R[best.indices]
        missing = k - tokens.shape[-1]
        pad = torch.nn.functional.pad
        return pad(tokens, (0, missing)), pad(best.values, (0, missing), value=-torch.inf)

    def laws(self, paths_BWK: Tensor) -> Tensor:
        if self._ids_R is None:
            return self._draft.laws(self._logits_BWR, paths_BWK)
        logits_BWV = self._logits_BWR.new_full((*self._logits_BWR.shape[:2], self._draft.vocab_size), -torch.inf)
        laws_BWV = self._draft.laws(logits_BWV.index_copy(2, self._ids_R, self._logits_BWR), paths_BWK)
        # A request may ban every token that the drafter knows; it then has nothing to say.
        return torch.where(laws_BWV.isnan(), 0.0, laws_BWV)


NetworkT = TypeVar("NetworkT", bound=nn.Module)


def fitted(network: NetworkT, target: PagedModel, run: Callable[[NetworkT], object], int8: bool = False) -> NetworkT:
    """The network as it serves: on the target's device, in its number format, its linear layers packed where that pays.

    A copy wherever anything has to be changed, for the network may be in training. `run` is one forward of it. `int8`: see
    `specdec.packing.pack_linears`.
    """
    tensors = [*network.parameters(), *network.buffers()]
    kinds = {(one.device, one.dtype if one.is_floating_point() else target.dtype) for one in tensors}
    packs = can_pack(target.device, target.dtype)
    if not packs and kinds == {(target.device, target.dtype)}:
        return network
    served = copy.deepcopy(network).to(target.device, target.dtype).requires_grad_(False).eval()
    if packs:
        with torch.inference_mode():
            pack_linears(served, lambda: run(served), int8)
    return served
