"""Which implementation of an op serves a tensor."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.dispatch import use_triton


def test_the_environment_says_which_implementation_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(1)
    for choice in ("reference", "auto", ""):
        monkeypatch.setenv("SPECDEC_KERNELS", choice)
        assert not use_triton(one)
    monkeypatch.setenv("SPECDEC_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SPECDEC_KERNELS='cuda' is unknown"):
        use_triton(one)
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    with pytest.raises(ValueError, match="SPECDEC_KERNELS=triton, but its heads are too wide"):
        use_triton(one, "its heads are too wide")
