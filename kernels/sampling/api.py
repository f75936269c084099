"""Laws and tokens from rows of logits: what a kernel is told, and the dispatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import use_triton
from specdec.kernels.sampling.keys import RowKeys
from specdec.kernels.sampling.reference import draw_reference, laws_reference


@dataclass(frozen=True)
class RowParams:
    """Per row: temperature (0: the largest score), top-k (0: off), top-p (1: off), min-p (0: off); float32 and int64 [R]."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor

    def select(self, rows_R: Tensor) -> RowParams:
        """The parameters of some rows, by index."""
        return RowParams(self.temperature_R[rows_R], self.top_k_R[rows_R], self.top_p_R[rows_R], self.min_p_R[rows_R])


def laws(scores_RV: Tensor, params: RowParams) -> Tensor:
    """Float32 laws [R, V] of scores that hold bias and penalties already.

    Greedy rows and the tokens that top-k keeps are those of the reference exactly. The kernel's exponentials may differ from
    it in the last bits, and so what top-p and min-p keep where a mass or probability lies within rounding of the cut; the
    probabilities agree to float32 rounding then. A row's law depends on that row alone. Raises ValueError for shapes that do
    not fit.
    """
    _check(scores_RV, params.temperature_R)
    if use_triton(scores_RV):
        from specdec.kernels.sampling.triton import laws_triton

        return laws_triton(scores_RV, params)
    return _laws_reference(scores_RV, params)


def sample(scores_RV: Tensor, params: RowParams, keys: RowKeys) -> Tensor:
    """One token [R] per row: `draw` from `laws`, without laws ever being written.

    Greedy rows give their largest score, the first of equal ones. Otherwise the token is that of the reference unless the row's
    random number lies within rounding of the law from a boundary between two tokens; tokens outside top-k, or whose
    exponential is zero, are never drawn. Raises ValueError for shapes that do not fit.
    """
    _check(scores_RV, params.temperature_R)
    _check(scores_RV, keys.seeds_R)
    if use_triton(scores_RV):
        from specdec.kernels.sampling.triton import sample_triton

        return sample_triton(scores_RV, params, keys)
    return draw_reference(_laws_reference(scores_RV, params), keys)


def draw(probs_RV: Tensor, keys: RowKeys) -> Tensor:
    """One token [R] per row of laws, or of weights of any scale, never one of weight zero.

    By inversion in integers, the same token on every device and for every order of summation; with `keys.is_gumbel` by the
    race of the tokens' own numbers. A row without any weight gives token 0. Raises ValueError for shapes that do not fit.
    """
    _check(probs_RV, keys.seeds_R)
    if use_triton(probs_RV):
        from specdec.kernels.sampling.triton import draw_triton

        return draw_triton(probs_RV, keys)
    return draw_reference(probs_RV, keys)


def _check(rows_RV: Tensor, column_R: Tensor) -> None:
    if rows_RV.ndim != 2 or column_R.shape != rows_RV.shape[:1]:
        raise ValueError(f"{tuple(column_R.shape)} rows of parameters do not fit scores {tuple(rows_RV.shape)}")
    if not rows_RV.shape[1]:
        raise ValueError(f"scores {tuple(rows_RV.shape)} have no tokens to draw")


def _laws_reference(scores_RV: Tensor, params: RowParams) -> Tensor:
    scores = scores_RV.to(torch.float32)
    columns = [params.temperature_R, params.top_k_R, params.top_p_R, params.min_p_R]
    temperature, top_k, top_p, min_p = (column[:, None].to(torch.float32) for column in columns)
    return laws_reference(scores, temperature, top_k, top_p, min_p)
