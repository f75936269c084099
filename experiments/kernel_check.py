"""What a check of a kernel is, how large its cases are, and how much it may err."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import use_triton

# A kernel may err this many times as much as the eager reference in the same dtype, both against float64.
MULTIPLE, FLOOR = 3.0, 2e-6


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `passed` None where it could not be looked at, for the reason in `detail`."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: query heads, kv heads and size of heads, context, nodes of a tree, and for sampling rows of
    how many tokens."""

    heads: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (9, 3, 64), (4, 4, 80), (16, 8, 256))
    context: int = 1500
    nodes: int = 64
    rows: int = 288
    vocab: int = 49_152


SMALL = Sizes(((4, 2, 16), (2, 1, 256)), 40, 6, 36, 61)
# What models come in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kind_of(like: Tensor) -> str:
    """What ops on such a tensor run: Triton kernels or their references."""
    return "triton" if use_triton(like) else "eager"


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).abs().max().nan_to_num(torch.inf))
