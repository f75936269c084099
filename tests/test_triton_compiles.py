"""What the compiler makes of the Triton kernels for an H200, which need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Of an SM, less what a program reserves.
SHARED_MEMORY = 227 * 1024
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, object]]:
    """One row per compiled kernel, from a process that does not interpret."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py", "32,8,128,bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_and_two_programs_fit_a_multiprocessor(kernels):
    assert {row["kernel"] for row in kernels} == {"_attend", "_attend_shared", "finish", "_write", "_move"}
    assert all(row["shared"] <= SHARED_MEMORY // 2 for row in kernels)
    assert all(row["spilled"] == 0 for row in kernels if row["kernel"] in ("_attend", "_write", "_move"))


def test_the_invariant_kernels_multiply_alike(kernels):
    """The bits of a tile must not depend on which of the two adds it: the same products, and nothing fused in one alone."""
    shared, finish = (next(row for row in kernels if row["kernel"] == name) for name in ("_attend_shared", "finish"))
    assert shared["products"] == finish["products"] != []
    assert shared["fused"] == finish["fused"] == 0
