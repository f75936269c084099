"""The reduced vocabulary of a head: the tokens that the training data is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafters.training.records import RecordSet


def token_counts(data: RecordSet, vocab_size: int) -> Tensor:
    """How often each token [V] is one to be learnt. Raises ValueError for a token outside the vocabulary."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for record in data:
        tokens = record.token_ids_T[record.loss_mask_T]
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"{data.name} holds token {int(tokens.max())}, and the target has {vocab_size}: "
                f"make the data with this target"
            )
        counts_V += tokens.bincount(minlength=vocab_size)
    return counts_V


def most_frequent(counts_V: Tensor, size: int, preferred_N: Tensor | None = None) -> Tensor:
    """The ids [R] of the `size` most frequent tokens, ascending; of equals the `preferred_N`, then the lower ids (Li et al.
    2025, EAGLE-3, and Zhao et al. 2025, "FR-Spec", section 3.2). Raises ValueError for a size that the vocabulary does not
    have."""
    if not 1 <= size <= len(counts_V):
        raise ValueError(f"draft_vocab_size={size} must be between 1 and the target's {len(counts_V)} tokens")
    order_V = 2 * counts_V
    if preferred_N is not None:
        order_V[preferred_N] += 1
    return order_V.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(counts_V: Tensor, ids_R: Tensor) -> float:
    """The share of all counted tokens that lie in a vocabulary."""
    return float(counts_V[ids_R].sum() / counts_V.sum().clamp_min(1))
