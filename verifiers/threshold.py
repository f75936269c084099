"""Threshold acceptance, LOSSY: keep what the target finds likely enough."""

from __future__ import annotations

import torch

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers.lossy import longest_passing


class Threshold:
    """A drafted token stays if the target gives it at least the probability `threshold`, the simplest of the rules that trade
    the target's law for length (Cai et al. 2024, Medusa, section 2.3.1, with epsilon alone). The output does NOT follow the
    target's law. Raises ValueError for a threshold out of range.
    """

    name = "threshold"
    lossless = False

    def __init__(self, threshold: float = 0.3) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie in (0, 1]")
        self.threshold = threshold

    def accepts(self, spec: TreeSpec) -> str | None:
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        cut_BN = torch.full(tree.tokens_BN.shape, self.threshold, dtype=laws.all().dtype, device=tree.device)
        return longest_passing(tree, laws, noise, cut_BN)
