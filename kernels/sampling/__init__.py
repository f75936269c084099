"""From logits to laws and tokens, with noise that is hashed in place."""

from specdec.kernels.sampling.api import RowParams, draw, laws, sample
from specdec.kernels.sampling.keys import RowKeys, mix

__all__ = ["RowKeys", "RowParams", "draw", "laws", "mix", "sample"]
