"""A union's trees in the making: what its quick drafters have is there at once, the others are asked where that pays."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from specdec.cost import Array
from specdec.drafters.outlook import Scores
from specdec.drafters.union import UnionDrafter, part
from specdec.interfaces import Noise, TreePolicy
from specdec.sequence import Sequence
from specdec.tree import TokenTree


class Found:
    """What the drafters that need no model have for each sequence, if their first guess is at least `least` likely to be right;
    `scores` is None where they have nothing."""

    def __init__(
        self, union: UnionDrafter, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise, least: float = 0.0
    ) -> None:
        self._union, self._sequences, self._policy, self._noise = union, sequences, policy, noise
        self._drafts = union.look(sequences, policy, noise, least)
        has_nodes = any(len(draft.tokens) > 1 for drafts in self._drafts for draft in drafts)
        self._rows = union.join(sequences, self._drafts, policy) if has_nodes else []
        self.scores = Scores.of_lists(self._rows) if has_nodes else None

    @property
    def is_all(self) -> bool:
        """Whether nobody is left to ask."""
        return self._union.is_ready

    def drafted(self, depths: Seq[int], keep: Callable[[Array], NDArray[np.bool_]]) -> tuple[Scores, TokenTree]:
        """The trees with what the other drafters have down to `depths`: all of it as it is scored, and what `keep` leaves of
        nodes that are accepted with such probabilities."""
        rows, scores = self._rows, self.scores
        if any(depths) or scores is None:
            self._union.complete(self._sequences, self._drafts, depths, self._policy, self._noise)
            rows = self._union.join(self._sequences, self._drafts, self._policy)
            scores = Scores.of_lists(rows)
        kept_BN = keep(scores.probs_BN)
        kept_BN[:, 0] = True
        return scores, self._union.tree(
            [part(row, kept_N.nonzero()[0].tolist()) for row, kept_N in zip(rows, kept_BN, strict=True)]
        )
