"""What must hold of a token tree, checked whenever one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specdec.draws import DrawKind

if TYPE_CHECKING:
    from specdec.tree import TokenTree


def check_tree(tree: TokenTree) -> None:
    """Raises ValueError naming row and value where a tree breaks a rule of `TokenTree`."""
    if not _is_plainly_right(tree):
        _find_fault(tree)


def _is_plainly_right(tree: TokenTree) -> bool:
    """Whether trees on the host without chance keep all rules: what most trees are, seen in a tenth of the time that it
    takes to look for faults."""
    if tree.draft_laws_BNV is not None or tree.tokens_BN.device.type != "cpu" or tree.tokens_BN.ndim != 2:
        return False
    tensors = (tree.tokens_BN, tree.parents_BN, tree.num_nodes_B, tree.draws_BM, tree.kinds_BM)
    if any(one.dtype != torch.int64 or one.device.type != "cpu" for one in tensors):
        return False
    tokens_BN, parents_BN, num_nodes_B, draws_BM, kinds_BM = (one.numpy() for one in tensors)
    batch, nodes = tokens_BN.shape
    shapes = parents_BN.shape, num_nodes_B.shape, draws_BM.shape, kinds_BM.shape
    if shapes != ((batch, nodes), (batch,), (batch, nodes - 1), (batch, nodes - 1)) or not batch or not nodes:
        return False
    if tree.confidence_BN is not None and tree.confidence_BN.shape != (batch, nodes):
        return False
    index_N = np.arange(nodes)
    inside_BN = index_N < num_nodes_B[:, None]
    real_BN = np.where(inside_BN, tokens_BN, 0)
    vocab = (1 << 31) if tree.vocab_size is None else tree.vocab_size
    if num_nodes_B.min() < 1 or num_nodes_B.max() > nodes or real_BN.min() < 0 or real_BN.max() >= vocab:
        return False
    if nodes == 1:
        return bool((parents_BN == -1).all())
    inside_BM, index_M = inside_BN[:, 1:], index_N[1:]
    above_BM = parents_BN[:, 1:]
    is_above_BM = np.where(inside_BM, (above_BM >= 0) & (above_BM < index_M), above_BM == -1)
    is_drawn_BM = (draws_BM == np.where(inside_BM, index_M, -1)) & (kinds_BM == DrawKind.FIXED)
    if not (is_above_BM & is_drawn_BM).all() or (parents_BN[:, 0] != -1).any():
        return False
    # One integer per (parent, token), and one of its own for padding.
    label_BM = np.where(inside_BM, above_BM * (1 << 32) + tokens_BN[:, 1:], -index_M)
    label_BM.sort(1)
    return not (label_BM[:, 1:] == label_BM[:, :-1]).any()


def _find_fault(tree: TokenTree) -> None:
    batch, nodes = tree.tokens_BN.shape if tree.tokens_BN.ndim == 2 else (0, 0)
    if nodes < 1 or tree.parents_BN.shape != (batch, nodes) or tree.num_nodes_B.shape != (batch,):
        raise ValueError(
            f"tokens {tuple(tree.tokens_BN.shape)}, parents {tuple(tree.parents_BN.shape)} and num_nodes "
            f"{tuple(tree.num_nodes_B.shape)} must be [B, N], [B, N] and [B] with N >= 1"
        )
    if tree.draws_BM.ndim != 2 or tree.draws_BM.shape != tree.kinds_BM.shape or tree.draws_BM.shape[0] != batch:
        raise ValueError(
            f"draws {tuple(tree.draws_BM.shape)} and kinds {tuple(tree.kinds_BM.shape)} must both be [B, M]"
        )
    laws = tree.draft_laws_BNV
    if laws is not None and (laws.ndim != 3 or laws.shape[:2] != (batch, nodes)):
        raise ValueError(f"draft laws {tuple(laws.shape)} must be [B, N, V] for tokens {(batch, nodes)}")
    if tree.confidence_BN is not None and tree.confidence_BN.shape != (batch, nodes):
        raise ValueError(f"confidence {tuple(tree.confidence_BN.shape)} must be [B, N] for tokens {(batch, nodes)}")
    index = torch.arange(nodes, device=tree.device)
    inside, parents = tree.is_node_BN, tree.parents_BN
    if not bool(((tree.num_nodes_B >= 1) & (tree.num_nodes_B <= nodes)).all()):
        raise ValueError(f"num_nodes {tree.num_nodes_B.tolist()} must lie in 1..{nodes}")
    expected = torch.where(inside & (index > 0), (parents >= 0) & (parents < index), parents == -1)
    if not bool(expected.all()):
        row, _ = _first(~expected)
        raise ValueError(
            f"row {row}: parents {parents[row].tolist()} must come before their children, -1 for root and padding"
        )
    vocab = tree.vocab_size if laws is None else laws.shape[-1]
    if tree.vocab_size not in (None, vocab):
        raise ValueError(f"vocab_size={tree.vocab_size} differs from the {vocab} tokens of the draft laws")
    outside = (tree.tokens_BN < 0) if vocab is None else (tree.tokens_BN < 0) | (tree.tokens_BN >= vocab)
    if bool((outside & inside).any()):
        raise ValueError(f"token {int(tree.tokens_BN[outside & inside][0])} is outside the vocabulary of {vocab}")
    if nodes > 1 or tree.draws_BM.numel():
        _check_draws(tree)


def _check_draws(tree: TokenTree) -> None:
    drawn = tree.draws_BM >= 0
    if _is_one_fixed_draw_each(tree):
        _refuse_twins(tree, _twin_siblings(tree))
        return
    astray = (tree.draws_BM < -1) | (tree.draws_BM == 0) | (tree.draws_BM >= tree.num_nodes_B[:, None])
    if bool(astray.any()):
        row, _ = _first(astray)
        named = tree.draws_BM[row].tolist()
        raise ValueError(f"row {row}: draws {named} must name drafted nodes (1..num_nodes-1) or be -1")
    unknown = drawn & ((tree.kinds_BM < min(DrawKind)) | (tree.kinds_BM > max(DrawKind)))
    if bool(unknown.any()):
        row, draw = _first(unknown)
        raise ValueError(f"row {row}: draw {draw} has kind {int(tree.kinds_BM[row, draw])}, which is no DrawKind")
    at = tree.draws_BM.clamp_min(0)
    count = torch.zeros_like(tree.tokens_BN).scatter_add_(1, at, drawn.long())
    unreached = tree.is_node_BN[:, 1:] & (count[:, 1:] == 0)
    if bool(unreached.any()):
        row, node = _first(unreached)
        raise ValueError(f"row {row}: node {node + 1} must be reached by at least one draw")
    # Two nodes with one parent and one token, or two draws to one node, are the same token drawn twice.
    once = torch.zeros_like(count).scatter_add_(1, at, (drawn & (tree.kinds_BM != DrawKind.IID)).long())
    _refuse_twins(tree, _twin_siblings(tree) | ((once > 0) & (count > 1)))
    stochastic = drawn & (tree.kinds_BM != DrawKind.FIXED)
    if not bool(stochastic.any()):
        return
    laws = tree.draft_laws_BNV
    if laws is None:
        raise ValueError("stochastic draws need draft_laws_BNV, the laws they were drawn from")
    _check_siblings(tree, drawn, laws)
    rows, draws = stochastic.nonzero(as_tuple=True)
    reached = tree.draws_BM[rows, draws]
    parents = tree.parents_BN[rows, reached]
    used = laws[rows, parents]
    tolerance = 1e-9 if laws.dtype == torch.float64 else 1e-4
    # Asked as "is it within", so that NaN is not.
    unlawful = (used < 0).any(-1) | ~((used.sum(-1) - 1).abs() <= tolerance)
    if bool(unlawful.any()):
        one = int(unlawful.nonzero()[0])
        raise ValueError(
            f"row {int(rows[one])}: the draft law of node {int(parents[one])} has sum {float(used[one].sum())} "
            f"and minimum {float(used[one].min())}; draft laws must be non-negative and sum to 1"
        )
    tokens = tree.tokens_BN[rows, reached]
    impossible = used.gather(1, tokens[:, None]).squeeze(1) <= 0
    if bool(impossible.any()):
        one = int(impossible.nonzero()[0])
        raise ValueError(
            f"row {int(rows[one])}: drafted token {int(tokens[one])} has probability zero under the law of node "
            f"{int(parents[one])} it claims to be drawn from"
        )


def _is_one_fixed_draw_each(tree: TokenTree) -> bool:
    """Whether every drafted node was reached by one draw, without chance, in the order of the nodes: what most trees are."""
    nodes = tree.max_nodes
    if tree.draws_BM.shape[1] != nodes - 1:
        return False
    wanted = torch.where(tree.is_node_BN[:, 1:], torch.arange(1, nodes, device=tree.device), -1)
    return bool(((tree.draws_BM == wanted) & (tree.kinds_BM == DrawKind.FIXED)).all())


def _refuse_twins(tree: TokenTree, twice: Tensor) -> None:
    if bool(twice.any()):
        row, node = _first(twice)
        token, parent = int(tree.tokens_BN[row, node]), int(tree.parents_BN[row, node])
        raise ValueError(
            f"row {row}: token {token} comes twice below node {parent}: siblings must carry distinct tokens; "
            f"an i.i.d. duplicate is one node with several draws"
        )


def _check_siblings(tree: TokenTree, drawn: Tensor, laws: Tensor) -> None:
    """What children of one node may be to each other: drawn in one way, and never drawn where a FIXED one stands."""
    parents_BM = tree.parents_BN.gather(1, tree.draws_BM.clamp_min(0)).clamp_min(0)

    def drawn_as(kind: DrawKind) -> Tensor:
        draws = (drawn & (tree.kinds_BM == kind)).long()
        return torch.zeros_like(tree.tokens_BN).scatter_add_(1, parents_BM, draws) > 0

    iid, without = drawn_as(DrawKind.IID), drawn_as(DrawKind.WITHOUT_REPLACEMENT)
    if bool((iid & without).any()):
        row, node = _first(iid & without)
        raise ValueError(f"row {row}: children of node {node} are drawn both i.i.d. and without replacement")
    rows, draws = (drawn & (tree.kinds_BM == DrawKind.FIXED)).nonzero(as_tuple=True)
    parents, nodes = parents_BM[rows, draws], tree.draws_BM[rows, draws]
    tokens = tree.tokens_BN[rows, nodes]
    taken = (iid | without)[rows, parents] & (laws[rows, parents, tokens] > 0)
    if bool(taken.any()):
        one = int(taken.nonzero()[0])
        raise ValueError(
            f"row {int(rows[one])}: the draft law of node {int(parents[one])} has mass on token {int(tokens[one])}, its "
            f"FIXED child: the law that is sampled has FIXED siblings removed and is renormalised"
        )


def _twin_siblings(tree: TokenTree) -> Tensor:
    """True [B, N] at drafted nodes whose token a sibling carries too."""
    # One integer per (parent, token); sorting beats the N x N comparison for wide trees.
    drafted = tree.is_node_BN & (tree.parents_BN >= 0)
    unique = -1 - torch.arange(tree.max_nodes, device=tree.device)
    label = torch.where(drafted, tree.parents_BN * (1 << 32) + tree.tokens_BN, unique).sort(1)
    repeats = torch.zeros_like(drafted)
    return repeats.scatter_(1, label.indices[:, 1:], label.values[:, 1:] == label.values[:, :-1])


def _first(flags: Tensor) -> tuple[int, int]:
    """Row and column of the first True."""
    row, column = flags.nonzero()[0].tolist()
    return row, column
