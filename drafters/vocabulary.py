"""Drafting from a part of the vocabulary: of an LM head only the rows of the most frequent tokens are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from specdec.drafters.heads import EagleHead, MedusaHeads
from specdec.drafters.heads.frequencies import FrequentTokens
from specdec.drafters.network import fitted
from specdec.model import PagedModel
from specdec.packing import linear_rows

HeadT = TypeVar("HeadT", MedusaHeads, EagleHead)


@dataclass(frozen=True)
class Drafting(Generic[HeadT]):
    """A head as it drafts: itself or a copy with smaller LM heads, what it uses as the target's LM head, and the target's
    ids of its logits (None: logits are over the whole vocabulary)."""

    head: HeadT
    lm_head: Callable[[Tensor], Tensor]
    ids_R: Tensor | None


def drafting(head: HeadT, target: PagedModel, tokens: FrequentTokens | None, int8: bool = False) -> Drafting[HeadT]:
    """The head over `tokens` alone (Zhao et al. 2025, "FR-Spec", section 3), or as it is.

    Its laws are its own over that part, renormalised, so every rule stays exact. A part of the target's LM head is packed as
    `fitted` does it with `int8`. Raises ValueError where the head has a
    reduced vocabulary of its own, and where the LM head is no linear layer.
    """
    own_ids_R = head.draft_to_target_R if isinstance(head, EagleHead) else None
    if tokens is None:
        return Drafting(head, target.lm_head, None if own_ids_R is None else own_ids_R.to(target.device))
    if own_ids_R is not None:
        raise ValueError(
            f"draft_vocab_size={tokens.size}: the head has a vocabulary of its own, of {len(own_ids_R)} tokens; leave it out"
        )
    ids_R = tokens.ids(target.vocab_size)
    if head.config.has_own_lm_head:
        return Drafting(_with_rows(head, ids_R), target.lm_head, ids_R.to(target.device))
    rows = linear_rows(target.model.get_output_embeddings(), ids_R)
    like = rows.weight.new_zeros(1, rows.in_features)
    return Drafting(head, fitted(nn.Sequential(rows), target, lambda net: net(like), int8), ids_R.to(target.device))


def _with_rows(head: HeadT, ids_R: Tensor) -> HeadT:
    head = copy.deepcopy(head)
    if isinstance(head, EagleHead):
        assert head.lm_head is not None
        head.lm_head = linear_rows(head.lm_head, ids_R)
    else:
        for one in head:
            assert isinstance(one, nn.Sequential)
            one[-1] = linear_rows(one[-1], ids_R)
    return head
