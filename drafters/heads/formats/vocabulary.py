"""The reduced vocabulary of an EAGLE-3 head in published form: offsets `d2t` and a mask `t2d`."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafters.heads.formats.findings import Findings


def to_target_ids(d2t_R: Tensor, t2d_V: Tensor | None, vocab_size: int, findings: Findings) -> Tensor:
    """The target's ids [R], int64, of the draft vocabulary: `d2t` holds target id - draft id (EAGLE, cnets.py).

    Notes as problems ids that are out of range, given twice, not ascending (training takes the target's law by `t2d`, so
    in the order of target ids) or other than `t2d` says.
    """
    if d2t_R.ndim != 1 or d2t_R.dtype.is_floating_point or d2t_R.dtype == torch.bool:
        findings.problems.append(f"d2t is {d2t_R.dtype} {[*d2t_R.shape]}, not a list of integers")
        return torch.arange(len(d2t_R) if d2t_R.ndim else 1)
    ids = d2t_R.long() + torch.arange(len(d2t_R))
    values, counts = ids.unique(return_counts=True)
    if len(outside := ids[(ids < 0) | (ids >= vocab_size)]):
        findings.problems.append(f"d2t leads to {int(outside[0])}, outside the vocabulary of {vocab_size}")
    elif len(twice := values[counts > 1]):
        findings.problems.append(f"d2t leads to {int(twice[0])} from {int(counts.max())} draft tokens, not one")
    elif len(late := ids[1:][ids[1:] < ids[:-1]]):
        findings.problems.append(f"d2t leads to {int(late[0])} behind a larger id; ids must ascend, as t2d implies")
    elif t2d_V is not None and (fault := _disagreement(ids, t2d_V, vocab_size)):
        findings.problems.append(fault)
    else:
        return ids
    if t2d_V is not None and t2d_V.ndim == 1 and torch.equal(t2d_V.nonzero()[:, 0], d2t_R.long()):
        findings.problems.append("d2t holds target ids; it must hold offsets, target id - draft id")
    return ids


def to_published(ids_R: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """`d2t` (int64) and `t2d` (bool) of absolute target ids."""
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[ids_R] = True
    return {"d2t": ids_R - torch.arange(len(ids_R)), "t2d": t2d_V}


def _disagreement(ids: Tensor, t2d_V: Tensor, vocab_size: int) -> str | None:
    if t2d_V.shape != (vocab_size,):
        return f"t2d has shape {[*t2d_V.shape]}, the vocabulary {vocab_size} tokens"
    marked = t2d_V.bool()
    if int(marked.sum()) != len(ids) or not bool(marked[ids].all()):
        differing = torch.zeros_like(marked).index_fill_(0, ids, True) ^ marked
        return f"t2d and d2t disagree about {int(differing.sum())} tokens, the first {int(differing.nonzero()[0])}"
    return None
