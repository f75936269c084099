"""The CPU's kernels as this machine runs them, and as others do, whose instructions are emulated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdec.kernels.cpu import build, can_run, instruction_set, library

EMULATED = Path(__file__).parent / "emulated"
_AVX2 = ("-mavx2", "-mfma")
_DIGEST = hashlib.sha256((EMULATED / "immintrin.h").read_bytes()).hexdigest()[:16]
_FLAGS = (*_AVX2, "-O2", "-Wno-psabi", "-ffp-contract=off", f"-I{EMULATED}", f"-DDIGEST_{_DIGEST}")
TARGETS = {
    "here": None,
    "avx2": (("avx2", "fma"), _AVX2),
    "emulated-avx512": (("avx2", "fma"), _FLAGS),
    "emulated-avx512_bf16": (("avx2", "fma"), (*_FLAGS, "-D__AVX512BF16__")),
    "emulated-amx": (("avx2", "fma"), (*_FLAGS, "-D__AMX_BF16__")),
}


@pytest.fixture(params=TARGETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs on the kernels of this machine, then on those of others."""
    if not can_run():
        pytest.skip("no C++ kernels for this machine")
    target = TARGETS[request.param]
    if target is None:
        yield
        return
    if request.param == instruction_set():
        pytest.skip("it is this machine's own")
    monkeypatch.setitem(build._TARGETS, request.param, target)
    monkeypatch.setenv("SPECDEC_CPU", request.param)
    library.cache_clear()
    yield
    monkeypatch.undo()
    library.cache_clear()
