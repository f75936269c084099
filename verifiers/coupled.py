"""The rule of coupled drafting: the target's token is the winner of a race that the drafter could watch."""

from __future__ import annotations

from torch import Tensor

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import GumbelKey, Key, PositionKey, RoundKey
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import on_device
from specdec.verifiers.follow import Follow


class Coupled:
    """Follows the target as `follow` does, its tokens drawn by Gumbel noise keyed by absolute position, which the tree policy
    `coupled` adds to the draft's logits too (Daliri et al. 2025, "Coupling without communication and drafter-invariant
    speculative decoding").

    The emitted tokens are a function of that noise and the target alone: the same for any tree, drafter and pruning, and
    those of plain decoding under this rule with the same seed.
    """

    name = "coupled"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if (verdict := on_device.follow(tree, laws, noise, is_gumbel=True)) is not None:
            return verdict
        return Follow()(tree, laws, _Gumbel(noise))


class _Gumbel:
    """Noise that draws the target's tokens by Gumbel noise."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise

    def bernoulli(self, prob_B: Tensor, key: RoundKey, rows: Tensor) -> Tensor:
        return self._noise.bernoulli(prob_B, key, rows)

    def categorical(self, probs_BV: Tensor, key: Key, rows: Tensor) -> Tensor:
        return self._noise.categorical(probs_BV, GumbelKey(key.depth) if isinstance(key, PositionKey) else key, rows)
