"""Typical acceptance, LOSSY: keep what is likely enough for how certain the target is."""

from __future__ import annotations

import torch

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers.lossy import longest_passing


class Typical:
    """Typical acceptance (Cai et al. 2024, Medusa, section 2.3.1): a drafted token stays if its probability is at least
    min(epsilon, delta exp(-H)), H the entropy of the target's law in nats. The output does NOT follow the target's law.

    Raises ValueError for an epsilon or delta out of range.
    """

    name = "typical"
    lossless = False

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not (0 < epsilon <= 1 and 0 < delta <= 1):
            raise ValueError(f"epsilon={epsilon}, delta={delta}: both must lie in (0, 1]")
        self.epsilon, self.delta = epsilon, delta

    def accepts(self, spec: TreeSpec) -> str | None:
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        target_BNV = laws.all()
        entropy_BN = -torch.xlogy(target_BNV, target_BNV).sum(-1)
        return longest_passing(tree, laws, noise, (self.delta * (-entropy_BN).exp()).clamp_max(self.epsilon))
