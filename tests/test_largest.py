"""The token of the largest logit in C++: that of `argmax`, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.can_run(), reason="no C++ kernels here")


def expected(logits_TV: Tensor) -> list[int]:
    return logits_TV.float().argmax(-1).tolist()


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_is_the_first_of_the_largest(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    # So few values that many are equal, all below zero in one of the rows.
    logits_TV = torch.randint(-3, 4, (count, width), generator=generator).bfloat16()
    logits_TV[-1] -= 8
    assert cpu.largest(logits_TV).tolist() == expected(logits_TV)
    logits_TV = torch.randn(count, width, generator=generator).bfloat16()
    assert cpu.largest(logits_TV).tolist() == expected(logits_TV)
    rows_R = torch.randint(count, (7,), generator=generator)
    assert cpu.largest(logits_TV, rows_R).tolist() == expected(logits_TV[rows_R])


@pytest.mark.parametrize("place", [0, 3, 16, 39])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("nan"), 3.0e38])
def test_it_finds_what_is_no_number_and_what_is_largest_of_all(value: float, place: int) -> None:
    logits_TV = torch.full((2, 40), -float("inf")).bfloat16()
    logits_TV[0, place:] = value
    logits_TV[1, place] = -1e-30
    assert cpu.largest(logits_TV).tolist() == expected(logits_TV) == [place, place]


def test_zeros_are_equal_whatever_their_sign() -> None:
    logits_TV = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0], [-0.0, -0.0, -1.0]]).bfloat16()
    assert cpu.largest(logits_TV).tolist() == expected(logits_TV) == [1, 1, 0]


def test_rows_of_larger_ones_are_found_where_they_lie() -> None:
    wide_TV = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert cpu.largest(wide_TV[:, 8:40]).tolist() == expected(wide_TV[:, 8:40])
