"""Which implementation of an op serves a tensor."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.dispatch import use_triton


def test_the_environment_says_which_implementation_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    one = torch.zeros(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    assert use_triton(one)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"SPECDEC_KERNELS=triton cannot serve a tensor on cpu: .*TRITON_INTERPRET=1"):
        use_triton(one)
    monkeypatch.setenv("SPECDEC_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SPECDEC_KERNELS='cuda' is unknown"):
        use_triton(one)
    for choice in ("reference", "auto", ""):
        monkeypatch.setenv("SPECDEC_KERNELS", choice)
        assert not use_triton(one)
